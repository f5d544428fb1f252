"""Benchmarks of every op against its plain PyTorch reference and the floor of the machine."""
