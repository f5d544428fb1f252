"""head_topk: hidden states -> the k largest entries of each pooled row, without a dense (B, V)."""

import torch
from torch import Tensor

from splade_fast._checks import check_count, check_floating
from splade_fast.ops.head.head import check_sequences, splade_head
from splade_fast.ops.sparse_rows import SparseRows

# Pooled rows of a block, dense for as long as it takes to prune them.
_BLOCK_BYTES = 16 * 2**20


@torch.no_grad()
def splade_head_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    k: int | None,
    cu_seqlens: Tensor | None = None,
    pooling: str = "max",
    activation: str = "log1p_relu",
    algorithm: str = "auto",
) -> SparseRows:
    """SparseRows.from_dense(splade_head(…), k), a block of sequences at a time; for inference.

    Follows SPLADE (Formal et al., SIGIR 2021) with pruning to the largest entries. On the CPU equal
    to that to the bit with max pooling, and with sum pooling where one block holds the batch.

    Args:
        hidden: (B, L, D), or packed (T, D) with cu_seqlens.
        weight: (V, D), the decoder's weight.
        bias: (V,) or None.
        attention_mask: (B, L), nonzero = counts. None: all count.
        k: keep at most the k largest entries of a row, at least 0; None keeps all that are
            positive.
        cu_seqlens: (B + 1,) int32; its values are read, which waits for a GPU.
        pooling, activation, algorithm: as in splade_head.

    Returns:
        SparseRows of B rows over V columns.

    Raises:
        TypeError, ValueError, RuntimeError: as splade_head and SparseRows.from_dense.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    k = None if k is None else check_count("k", k, 0)  # as from_dense does, after the head
    # Of the whole: a block alone could not tell that a mask has too many rows. The decoder is
    # checked by splade_head, which knows what autocast makes of it.
    mask = check_sequences(hidden, attention_mask, cu_seqlens)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    batch = hidden.shape[0] if bounds is None else len(bounds) - 1
    block = max(1, _BLOCK_BYTES // max(1, weight.shape[0] * hidden.element_size()))
    parts = []
    for first in range(0, max(batch, 1), block):
        last = min(first + block, batch)
        if bounds is None or cu_seqlens is None:
            rows, starts = hidden[first:last], None
            counts = None if mask is None else mask[first:last]
        else:
            rows, counts = hidden[bounds[first] : bounds[last]], None
            starts = cu_seqlens[first : last + 1] - bounds[first]
        pooled = splade_head(
            rows,
            weight,
            bias,
            counts,
            cu_seqlens=starts,
            pooling=pooling,
            activation=activation,
            algorithm=algorithm,
        )
        parts.append(SparseRows.from_dense(pooled, k))
    return SparseRows.cat(parts)
