"""Benchmarks: one file per claim, peers measured in the same run. See README.md."""
