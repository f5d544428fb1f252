"""head_topk: hidden states -> the k largest entries of each pooled row, without a dense (B, V)."""

import torch
from torch import Tensor

from splade_fast._checks import check_count, check_floating
from splade_fast.ops.head.head import check_sequences, splade_head
from splade_fast.ops.sparse_rows import SparseRows

# Size of a block of dense pooled rows, which are pruned before the next block is computed.
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
    logit_scale: float | Tensor = 1.0,
    algorithm: str = "auto",
) -> SparseRows:
    """Compute the k largest vocabulary weights of each sequence, without gradients.

    Equals `SparseRows.from_dense(splade_head(…), k)`, computed for a block of sequences at a time,
    so that no dense (B, V) exists. On the CPU the results are the same to the bit with max and last
    pooling, and with sum and mean pooling if one block holds the batch.

    Args:
        hidden: (B, L, D), or packed (T, D) with cu_seqlens.
        weight: (V, D), weight of the decoder.
        bias: (V,) or None.
        attention_mask: (B, L); positions with 0 are left out. None: all positions take part.
        k: largest number of entries of a row, at least 0. None keeps all positive entries.
        cu_seqlens: (B + 1,) int32. Its values are read, which waits for a GPU.
        pooling, activation, logit_scale, algorithm: as in `splade_head`.

    Returns:
        SparseRows of B rows over V columns.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as `splade_head` and
            `SparseRows.from_dense`.

    Example::

        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> weight = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [3.0, 0.0]])
        >>> sf.splade_head_topk(hidden, weight, k=1, activation="relu").to_dicts()
        [{2: 3.0}]
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    k = None if k is None else check_count("k", k, 0)
    # Checks of single blocks would not see a mask with too many rows. splade_head checks the
    # decoder, whose dtype may be another under autocast.
    mask = check_sequences(hidden, attention_mask, cu_seqlens)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    batch = hidden.shape[0] if bounds is None else len(bounds) - 1
    block = max(1, _BLOCK_BYTES // max(1, weight.shape[0] * hidden.element_size()))
    parts = []
    for first in range(0, max(batch, 1), block):
        last = min(first + block, batch)
        if bounds is None or cu_seqlens is None:
            rows, starts = hidden[first:last], None
            block_mask = None if mask is None else mask[first:last]
        else:
            rows, block_mask = hidden[bounds[first] : bounds[last]], None
            starts = cu_seqlens[first : last + 1] - bounds[first]
        pooled = splade_head(
            rows,
            weight,
            bias,
            block_mask,
            cu_seqlens=starts,
            pooling=pooling,
            activation=activation,
            logit_scale=logit_scale,
            algorithm=algorithm,
        )
        parts.append(SparseRows.from_dense(pooled, k))
    return parts[0] if len(parts) == 1 else SparseRows.cat(parts)
