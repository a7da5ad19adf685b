"""Comparisons that anybody can run: `python -m benchmarks NAME`."""
