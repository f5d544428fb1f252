"""The public ops. Each module holds all of one op's Python: function, fake, autograd, autocast."""

from splade_fast.ops.head import splade_head
from splade_fast.ops.pool import splade_pool

__all__ = ["splade_head", "splade_pool"]
