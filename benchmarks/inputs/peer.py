"""The pooling module of sentence-transformers, called as that library does."""

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness.case import Direction


@cache
def _pooling(direction: Direction) -> Any:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    return SpladePooling().train(direction == "forward+backward")


class PeerPool:
    """Pool with the arguments of splade_pool.

    Raises:
        ImportError: sentence-transformers is missing.
    """

    def __init__(self, direction: Direction) -> None:
        self._pooling = _pooling(direction)

    def __call__(
        self, logits: Tensor, attention_mask: Tensor | None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        features = {"token_embeddings": logits, "attention_mask": attention_mask}
        if cu_seqlens is not None:
            features = {"token_embeddings": logits[None], "cu_seq_lens_q": cu_seqlens}
        pooled: Tensor = self._pooling(features)["sentence_embedding"]
        return pooled


class PeerHead:
    """Head with the arguments of splade_head: the decoder, then the pooling module."""

    def __init__(self, direction: Direction) -> None:
        self._pool = PeerPool(direction)

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        attention_mask: Tensor | None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        logits = linear(hidden, weight, bias)
        return self._pool(logits, attention_mask, cu_seqlens=cu_seqlens)
