"""Benchmarks: one file per question, each run as `python -m benchmarks.NAME`."""
