"""The sections of the report on the CPU backend, one question each; see `benchmarks.cpu_report`."""
