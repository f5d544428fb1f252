"""Share of the negative cache in a training step, kept as CSV.

A step of the demo's checkpoint on pairs of its corpus: queries and documents are encoded, the loss
over a full sparse cache is computed and its backward run, AdamW steps. The clock is read inside the
step: what the handler takes beside the document network is the cache's part (scores of all slots,
draw, gather, loss, refresh, insert); the document network's forward of the drawn documents is what
the method costs whatever the cache is made of.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.facts import recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import write_csv
from benchmarks.harness.timing import WARM_UPS, garbage_collection_off
from benchmarks.inputs.trained import fetched
from benchmarks.studies.screening.facts import Fact, Finding, format_findings
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import Pair, docstring_pairs
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    Scale,
    SparseFeature,
)
from splade_fast.training.gradient_cache import without_padding

_LENGTH, _K = 128, 256


@dataclass
class _Clock:
    """Milliseconds of the parts of a step, added up by name."""

    parts: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = run(*arguments, **options)
            self.parts[name] = self.parts.get(name, 0) + (time.perf_counter() - start) * 1e3
            return result

        return call


class _Training:
    """A model, its optimiser, and a cache whose slots hold encoded documents of the corpus."""

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
        """All slots, with the same documents again and again, of many ages."""
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
        """One step; the milliseconds of its parts."""
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


def study(*, batch: int, slots: int, encoded: int, steps: int) -> list[Finding]:
    """Medians over the steps: milliseconds of each part, and the cache's share of the step."""
    pairs = docstring_pairs()
    if not pairs:
        raise RuntimeError("the study needs installed packages with docstrings, found none")
    training = _Training(fetched(DEMO), pairs, slots, encoded)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    parts: list[dict[str, float]] = []
    with garbage_collection_off():
        for step in range(WARM_UPS + steps):
            first = step * batch
            rows = [order[i % len(order)] for i in range(first, first + batch)]
            parts.append(training.step([pairs[row] for row in rows]))
    measured = parts[WARM_UPS:]
    medians = {name: statistics.median(p[name] for p in measured) for name in measured[0]}
    shares = {
        name: 100 * statistics.median(part[name] / part["step"] for part in measured)
        for name in ("cache", "update", "drawn documents")
    }
    finding = partial(
        Finding,
        study="cache training",
        model=f"B{batch} L{_LENGTH} C{slots} k{_K}",
        dim=training.encoder.vocab_size,
        dtype="float32",
    )
    return [
        *(
            finding(variant=name, quantity="median", value=value, unit="ms")
            for name, value in medians.items()
        ),
        *(
            finding(variant=name, quantity="share of the training step", value=value, unit="%")
            for name, value in shares.items()
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.cache_training")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--slots", type=int, default=131_072)
    parser.add_argument("--encoded", type=int, default=2048, help="documents that the slots hold")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = Machine.current("cpu")
    print(machine.title, flush=True)
    findings = study(
        batch=options.batch, slots=options.slots, encoded=options.encoded, steps=options.steps
    )
    print(format_findings(findings))
    write_csv(recorded(findings, Fact, machine), Fact, options.out / "cache_training-cpu.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
