"""Share of the negative cache in a training step.

A step of the demo's checkpoint on pairs of its corpus: queries and documents are encoded, the loss
over a full sparse cache is computed and its backward run, AdamW steps. The clock is read inside the
step: the cache's part is the time of the handler without the document network (scores of all slots,
draw, gather, loss, refresh, insert). The forward of the drawn documents is a cost of the method,
whatever the cache is made of.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.results import TIME, Measurement
from benchmarks.harness.timing import WARM_UPS, Rounds, garbage_collection_off
from benchmarks.inputs.trained_states import fetched
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import Pair, docstring_pairs
from splade_fast.encoders.batching import without_padding
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    Scale,
    SparseFeature,
)

BATCH, SLOTS = 32, 131_072
ENCODED = 2048  # documents that the slots hold, again and again
_LENGTH, _K = 128, 256


@dataclass
class _Clock:
    """Milliseconds of the parts of a step, by name."""

    parts: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = run(*arguments, **options)
            self.parts[name] = self.parts.get(name, 0) + (time.perf_counter() - start) * 1e3
            return result

        return call


class _Training:
    """Model, optimiser, and a cache whose slots hold encoded documents of the corpus."""

    def __init__(self, folder: Path, pairs: Sequence[Pair], slots: int, encoded: int) -> None:
        self.encoder = SpladeEncoder.from_pretrained(folder).train()
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=2e-5)
        inputs = tuple(self.tokenized([pair.document for pair in pairs[:1]]))
        specs = {name: FixedLenFeature([_LENGTH], torch.int32) for name in inputs}
        embedding = SparseFeature(self.encoder.vocab_size, _K, torch.bfloat16)
        self.manager = CacheManager({**specs, "embedding": embedding}, slots)
        keys: dict[str, Any] = {"embedding_key": "embedding", "data_keys": inputs}
        loss = CacheClassificationLoss(**keys, score_transform=Scale(1.0), exclude="input_ids")
        self.handler = CacheLossHandler(self.manager, loss, **keys)
        self._fill([pair.document for pair in pairs[:encoded]])

    def _fill(self, texts: list[str]) -> None:
        """Fill all slots with these texts, again and again, of many ages."""
        self.encoder.eval()
        rows = self.encoder.encode(texts, k=_K, max_length=_LENGTH, show_progress=False)
        self.encoder.train()
        inputs = self.tokenized(texts)
        cache = self.handler.cache
        for start in range(0, cache.size, len(texts)):
            missing = cache.size - start
            items = {name: tensor[:missing] for name, tensor in inputs.items()}
            self.manager.update_cache(cache, new_items={**items, "embedding": rows[:missing]})
        cache.age.copy_(torch.arange(cache.size).flip(0))

    def tokenized(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.encoder.tokenize(list(texts), _LENGTH)

    def network(self, features: dict[str, Tensor]) -> Tensor:
        inputs = without_padding({name: ids.long() for name, ids in features.items()})
        vectors: Tensor = self.encoder(**inputs)
        return vectors

    def step(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Take one step; return the milliseconds of its parts."""
        clock = _Clock()
        queries = self.tokenized([pair.query for pair in pairs])
        documents = self.tokenized([pair.document for pair in pairs])
        handler_step = clock.timed("handler", self.handler.update_cache_and_compute_loss)
        update = CacheManager.update_cache
        self.manager.update_cache = clock.timed(  # type: ignore[method-assign]
            "update", partial(update, self.manager)
        )
        start = time.perf_counter()
        encoded = clock.timed("encode", lambda: [self.network(t) for t in (queries, documents)])()
        network = clock.timed("drawn documents", self.network)
        loss = handler_step(network, *encoded, documents)
        clock.timed("backward", loss.backward)()
        clock.timed("optimizer", self.optimizer.step)()
        self.optimizer.zero_grad()
        clock.parts["step"] = (time.perf_counter() - start) * 1e3
        clock.parts["cache"] = clock.parts.pop("handler") - clock.parts["drawn documents"]
        return clock.parts


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {"step": lambda: measure_steps(rounds.rounds)}


def measure_steps(steps: int) -> list[Measurement]:
    """Return the median milliseconds of each part, and its share of the step.

    Raises:
        UnavailableError: no installed package has docstrings.
    """
    pairs = docstring_pairs()
    if not pairs:
        raise UnavailableError("installed packages must have docstrings, found none")
    training = _Training(fetched(DEMO), pairs, SLOTS, ENCODED)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    parts: list[dict[str, float]] = []
    with garbage_collection_off():
        for step in range(WARM_UPS + steps):
            first = step * BATCH
            rows = [order[i % len(order)] for i in range(first, first + BATCH)]
            parts.append(training.step([pairs[row] for row in rows]))
    measured = parts[WARM_UPS:]
    measurement = partial(
        Measurement,
        study="cache_training",
        part=f"B{BATCH} L{_LENGTH} C{SLOTS} k{_K}",
        rounds=steps,
    )
    times = [
        measurement(
            subject=name,
            quantity=TIME,
            value=statistics.median(part[name] for part in measured),
            unit="ms",
        )
        for name in measured[0]
    ]
    shares = [
        measurement(
            subject=name,
            quantity="share of the training step",
            value=100 * statistics.median(part[name] / part["step"] for part in measured),
            unit="%",
        )
        for name in ("cache", "update", "drawn documents")
    ]
    return times + shares
