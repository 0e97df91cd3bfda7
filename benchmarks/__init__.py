"""Benchmarks of the cost and the quality of pruning, run as ``python -m benchmarks.NAME``."""
