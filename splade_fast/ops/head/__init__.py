"""head: hidden states -> pooled rows, or their largest entries, without storing logits."""

from splade_fast.ops.head.head import splade_head
from splade_fast.ops.head.topk import splade_head_topk

__all__ = ["splade_head", "splade_head_topk"]
