"""Races against peers, numerics and latencies, on an H200. Run from the checkout's root: ``python -m benchmarks.X``."""
