"""splade_fast: exact, fused kernels for learned sparse retrieval (SPLADE) in PyTorch."""

from splade_fast._library import build_info
from splade_fast._version import __version__
from splade_fast.ops import splade_head, splade_pool

__all__ = ["__version__", "build_info", "splade_head", "splade_pool"]
