"""Sizes of the demo for the speed of the machine, so that it ends in a few minutes anywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from examples.docstrings.corpus import spread
from splade_fast.encoders.splade import SpladeEncoder

_FULL_RATE = 300.0  # documents a second on two cores with AVX-512, with some reserve
_ENCODING_SECONDS = 45
_SAMPLE = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts of the demo."""

    documents: int
    compared: int = 320  # documents of the comparison of encoders
    steps: int = 300  # of the fine-tuning
    cost_steps: int = 5  # of the comparison of training steps
    should_find_largest_batch: bool = True


def choose_sizes(documents_per_second: float, documents: int) -> Sizes:
    """Return the full sizes on a fast machine, and less of everything on a slower one.

    Args:
        documents_per_second: the result of `encoding_rate`.
        documents: size of the whole corpus.
    """
    share = documents_per_second / _FULL_RATE
    if share >= 1:
        return Sizes(documents)
    return Sizes(
        documents=min(documents, max(1000, int(documents_per_second * _ENCODING_SECONDS))),
        compared=max(64, int(320 * share)),
        steps=max(50, int(300 * share)),
        cost_steps=3,
        should_find_largest_batch=False,
    )


def encoding_rate(
    encoder: SpladeEncoder, texts: Sequence[str], batch_size: int, max_length: int
) -> float:
    """Return the documents a second of a sample of the texts, once warm."""
    sample = list(spread(texts, _SAMPLE))
    for _ in range(2):
        start = time.perf_counter()
        encoder.encode(sample, batch_size=batch_size, max_length=max_length, show_progress=False)
        seconds = time.perf_counter() - start
    return len(sample) / seconds
