"""Batches of texts that have about as many tokens each: a batch costs as much as its longest text.

Characters say little of tokens where prose stands beside code, so texts are tokenized several
batches at a time, in the order of their characters, and sorted by tokens within these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHARACTERS = 2**19  # at a time: tokenizers keep more than a hundred bytes of each token


def longest_first(lengths: Sequence[int], batch_size: int) -> Iterator[Tensor]:
    """Places in lengths, the longest first: of whole batches that are tokenized at a time.

    Args:
        lengths: characters of each text.
        batch_size: texts of a batch.
    """
    # A copy: torch takes no array whose strides are negative.
    order = torch.from_numpy(np.argsort(lengths, kind="stable")[::-1].copy())
    first = 0
    while first < len(order):
        longest = max(1, lengths[int(order[first])])
        places = order[first : first + max(1, _CHARACTERS // (longest * batch_size)) * batch_size]
        first += len(places)
        yield places


def batches_by_tokens(
    inputs: Mapping[str, Any], batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Rows (on the CPU) and inputs of each batch, most tokens first, padded to the longest of them.

    Args:
        inputs: attention_mask (N, L), other tensors (N, L), and what all batches share.
        batch_size: rows of a batch.
    """
    mask: Tensor = inputs["attention_mask"].cpu()
    tokens = mask.count_nonzero(1)
    for rows in tokens.argsort(descending=True, stable=True).split(batch_size):
        used = mask.index_select(0, rows).any(0).nonzero()
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(1)
        batch = {
            name: value[:, columns].index_select(0, rows.to(value.device))
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }
        yield rows, batch


def is_padded_to_longest(inputs: Mapping[str, Any]) -> bool:
    """Whether every tensor is (N, L) as attention_mask, and L the most tokens that any row has."""
    mask = inputs.get("attention_mask")
    return (
        isinstance(mask, Tensor)
        and all(v.shape == mask.shape for v in inputs.values() if isinstance(v, Tensor))
        and int(mask.count_nonzero(1).max()) == mask.shape[1]
    )
