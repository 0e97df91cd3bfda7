"""Benchmarks, run as ``python -m benchmarks.NAME``: what pruning costs, and what it gives."""
