"""Batches of `SparseEncoder.encode`, sorted by tokens instead of by characters.

The features of a batch equal those that the model's `preprocess` returns for its texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule, Transformer
from torch import Tensor, nn

from splade_fast.encoders.batching import batches_by_tokens, is_padded_to_longest, longest_first
from splade_fast.encoders.threads import tokenizer_lock
from splade_fast.integrations.sentence_transformers.modules import HiddenTransformer

Features = dict[str, Any]

_TAKES_PROCESSING = "processing_kwargs" in inspect.signature(Transformer.preprocess).parameters


def batches(
    model: Any,
    modules: Sequence[nn.Module],
    texts: Sequence[Any],
    batch_size: int,
    prompt: str | None,
    options: dict[str, Any],
) -> Iterator[tuple[Tensor, Features]]:
    """Yield the positions in `texts` and the features of each batch, the longest texts first.

    Args:
        model: the SparseEncoder.
        modules: all modules in it.
        texts, batch_size, prompt: see `SparseEncoder.encode`.
        options: further arguments of `preprocess`.
    """
    locks = _tokenizer_locks(modules)

    def preprocess(places: Tensor) -> Features:
        chosen = [texts[i] for i in places.tolist()]
        return _preprocess_fast(model, locks, chosen, prompt, options)

    if len(texts) == 1:  # nothing to sort, and a query should not wait for it
        first = torch.zeros(1, dtype=torch.int64)
        yield first, preprocess(first)
        return
    lengths = [model._input_length(text) for text in texts]

    def split_evenly(order: Tensor) -> Iterator[tuple[Tensor, Features]]:
        return ((places, preprocess(places)) for places in order.split(batch_size))

    shortest = min(range(len(texts)), key=lengths.__getitem__)
    if (
        model._can_flatten_inputs()  # flattened inputs have no padding
        or not all(isinstance(text, str) for text in texts)
        # A compiled model may need the fixed width that such padding gives.
        or not is_padded_to_longest(preprocess(torch.tensor([shortest])))
    ):
        order = np.argsort([-length for length in lengths])
        if model._can_flatten_inputs():
            order = model._interleave_sorted_indices(order)
        yield from split_evenly(torch.from_numpy(order))
        return
    for places in longest_first(lengths, batch_size):
        features = preprocess(places)
        if is_padded_to_longest(features):
            for rows, batch in batches_by_tokens(features, batch_size):
                yield places[rows], batch
        else:
            yield from split_evenly(places)


def _preprocess_fast(
    model: Any,
    locks: Sequence[Any],
    texts: Sequence[Any],
    prompt: str | None,
    options: dict[str, Any],
) -> Features:
    """Return the features of `preprocess`, converted to tensors by numpy where this is safe.

    numpy reads the lists of a tokenizer much faster than torch.
    """
    first = model[0]
    if (
        _TAKES_PROCESSING
        and isinstance(first, HiddenTransformer)
        # Query expansion and messages work on tensors.
        and getattr(first, "query_expansion", None) is None
        and "message" not in first.modality_config
        and "processing_kwargs" not in options
    ):
        options = {**options, "processing_kwargs": {"common": {"return_tensors": None}}}
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        features = model.preprocess(texts, prompt=prompt, **options)
    return {
        name: torch.from_numpy(np.array(value)) if isinstance(value, list) else value
        for name, value in features.items()
    }


def _tokenizer_locks(modules: Sequence[nn.Module]) -> list[Any]:
    """Return the locks of all tokenizers, one for each route of a Router.

    They are in one order in all threads, so that threads never block each other.
    """
    tokenizers: list[Any] = [m.tokenizer for m in modules if isinstance(m, InputModule)]
    locks = {id(lock): lock for lock in map(tokenizer_lock, filter(None, tokenizers))}
    return [lock for _, lock in sorted(locks.items())]
