"""Comparison of all ops with plain PyTorch on the user's own machine."""

from splade_fast.selftest.compare import Outcome, run_selftest

__all__ = ["Outcome", "run_selftest"]
