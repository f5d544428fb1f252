"""Inputs of the benchmarks: random, trained and encoded ones."""
