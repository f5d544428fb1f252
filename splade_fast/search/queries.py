"""Vectors of queries."""

from __future__ import annotations

from collections.abc import Sequence

from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows


def encode_queries(
    encoder: TextEncoder, queries: Sequence[str], max_length: int, batch_size: int
) -> SparseRows:
    """Return the vectors (Q, V) of the queries, with the prompt that the encoder has for them."""
    return encoder.encode(
        queries,
        batch_size=batch_size,
        max_length=max_length,
        show_progress=False,
        prompt_name=encoder.settings.prompt_for("query"),
    )
