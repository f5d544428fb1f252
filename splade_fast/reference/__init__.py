"""Plain PyTorch versions of every op: slow, readable, the yardstick of tests and benchmarks."""

from splade_fast.reference.head import splade_head
from splade_fast.reference.pool import splade_pool

__all__ = ["splade_head", "splade_pool"]
