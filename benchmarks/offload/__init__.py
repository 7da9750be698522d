"""Benchmarks of `torchmoe.offload`: one file per question, `python -m benchmarks.offload.NAME`."""
