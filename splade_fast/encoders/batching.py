"""Batches of texts of similar numbers of tokens: a batch costs as much as its longest text.

Tokenizing all texts before the first batch would take too much memory, and the number of characters
alone predicts the number of tokens badly. So texts are sorted by characters, tokenized several
batches at a time, and sorted by tokens within these batches. A batch ends early where its next text
is so short that padding would cost more than another batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Largest number of characters tokenized at a time: a tokenizer needs over 100 bytes for each token.
_CHARACTERS = 2**19
# Largest number of padding tokens in a batch. Another batch costs about as much as these, whatever
# the size of the model: its modules are called from Python, and its weights are read again.
_PADDING = 40


def longest_first(lengths: Sequence[int], batch_size: int) -> Iterator[Tensor]:
    """Yield the places of texts in `lengths`, longest first, in groups to be tokenized at a time.

    Args:
        lengths: number of characters of each text.
        batch_size: number of texts of a batch; a group holds whole batches.
    """
    # torch takes no array with negative strides, so the reversed order is copied.
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
    """Split tokenized texts into batches, those with the most tokens first.

    Args:
        inputs: attention_mask (N, L), other tensors (N, L), and values that all batches share.
        batch_size: largest number of rows of a batch.

    Yields:
        The rows of a batch, (B,) on the CPU, and the inputs of these rows, padded to the longest.
    """
    mask: Tensor = inputs["attention_mask"].cpu()
    tokens = mask.count_nonzero(1)
    order = tokens.argsort(descending=True, stable=True)
    for rows in order.split(_batch_sizes(tokens[order].tolist(), batch_size)):
        batch = cut_columns(inputs, _columns_with_tokens(mask.index_select(0, rows)))
        yield (
            rows,
            {
                name: value.index_select(0, rows.to(value.device))
                if isinstance(value, Tensor)
                else value
                for name, value in batch.items()
            },
        )


def _batch_sizes(lengths: Sequence[int], largest: int) -> list[int]:
    """Return the numbers of texts in batches of texts with so many tokens, the longest first."""
    sizes: list[int] = []
    longest = size = padding = 0
    for length in lengths:
        padding += longest - length
        if size == 0 or size == largest or padding > _PADDING:
            sizes.append(0)
            longest, size, padding = length, 0, 0
        size += 1
        sizes[-1] = size
    return sizes


def without_padding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the columns behind the last token of any text; reading their number waits for a GPU.

    Padding before the tokens stays, since models count positions from the first column.

    Args:
        inputs: attention_mask (N, L) and others, see `cut_columns`.
    """
    return cut_columns(inputs, slice(_columns_with_tokens(inputs["attention_mask"]).stop))


def cut_columns(inputs: Mapping[str, Any], columns: slice) -> dict[str, Any]:
    """Cut the tensors that have as many columns as attention_mask, and keep everything else."""
    width = inputs["attention_mask"].shape[1]
    return {
        name: value[:, columns]
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width
        else value
        for name, value in inputs.items()
    }


def _columns_with_tokens(attention_mask: Tensor) -> slice:
    """Return the columns from the first to the last token of all rows, at least one column."""
    used = attention_mask.any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)


def is_padded_to_longest(inputs: Mapping[str, Any]) -> bool:
    """Return whether all tensors are (N, L) and L is the largest number of tokens of a row."""
    mask = inputs.get("attention_mask")
    return (
        isinstance(mask, Tensor)
        and all(v.shape == mask.shape for v in inputs.values() if isinstance(v, Tensor))
        and int(mask.count_nonzero(1).max()) == mask.shape[1]
    )
