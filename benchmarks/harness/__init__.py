"""Harness: checks, timings, memory, results and plots of a benchmark case."""
