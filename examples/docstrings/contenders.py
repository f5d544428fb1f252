"""Three libraries that encode texts with the same checkpoint, each called as its users do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from splade_fast.ops.sparse_rows import SparseRows

# (texts sorted by length, batch size) -> vectors that `as_sparse_rows` converts
Encode = Callable[[list[str], int], object]


def load_contender(name: str, model: str, max_length: int, k: int | None = None) -> Encode:
    """Load the checkpoint with one of CONTENDERS, and return its encoding function.

    Args:
        name: a key of CONTENDERS.
        model: name or folder of the checkpoint.
        max_length: number of tokens to which texts are truncated.
        k: number of largest entries to keep of each vector; None keeps all.
    """
    return CONTENDERS[name](model, max_length, k)


def as_sparse_rows(encoded: object) -> SparseRows:
    """Convert the vectors that a contender returned to SparseRows."""
    if isinstance(encoded, SparseRows):
        return encoded
    if not isinstance(encoded, torch.Tensor):
        raise TypeError(f"encoded must be SparseRows or a tensor, got {type(encoded).__name__}")
    return SparseRows.from_dense(encoded.to_dense())


def _splade_fast(model: str, max_length: int, k: int | None) -> Encode:
    from splade_fast.encoders.splade import SpladeEncoder

    encoder = SpladeEncoder.from_pretrained(model)
    return lambda texts, batch_size: encoder.encode(
        texts, k=k, batch_size=batch_size, max_length=max_length, show_progress=False
    )


def _transformers(model: str, max_length: int, k: int | None) -> Encode:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from splade_fast.encoders.settings import read_settings
    from splade_fast.reference.pool import splade_pool
    from splade_fast.reference.prune import prune_topk

    settings = read_settings(model, {})
    tokenizer = AutoTokenizer.from_pretrained(model)
    masked_lm = AutoModelForMaskedLM.from_pretrained(model).eval()

    @torch.inference_mode()
    def encode(texts: list[str], batch_size: int) -> object:
        vectors = []
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            pooled = splade_pool(
                masked_lm(**inputs).logits,
                inputs["attention_mask"],
                pooling=settings.pooling,
                activation=settings.activation,
            )
            if k is not None:
                pooled = prune_topk(pooled, k)
            vectors.append(pooled.to_sparse())
        return torch.cat(vectors)

    return encode


def _sentence_transformers(model: str, max_length: int, k: int | None) -> Encode:
    from sentence_transformers import SparseEncoder

    encoder = SparseEncoder(model, device="cpu")
    encoder.max_seq_length = max_length
    return lambda texts, batch_size: encoder.encode(
        texts, batch_size=batch_size, max_active_dims=k, show_progress_bar=False
    )


CONTENDERS: dict[str, Callable[[str, int, int | None], Encode]] = {
    "splade_fast": _splade_fast,
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
}
