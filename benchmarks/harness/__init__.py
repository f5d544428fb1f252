"""Checks, timings, memory, results, plots and comparison of benchmarks."""
