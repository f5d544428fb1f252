"""Cost of a training step with our ops and a sparse cache, or with plain PyTorch.

Each contender runs in a process of its own with the same trainer, model, data and seed.
"splade_fast" has our ops and a sparse cache, "pytorch" the formulas of `splade_fast.reference`
under autograd and a dense cache.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.memory import peak_growth
from examples.docstrings.corpus import Pair
from examples.docstrings.training import FINE_TUNING, train

CONTENDERS = ("splade_fast", "pytorch")
LENGTH = 128
MAX_QUERY_LENGTH = 48
_LEAP = 4
_STEPS_TO_THE_PEAK = 3  # the first draws nothing from the cache, which is still empty


@dataclass(frozen=True)
class Setting:
    """A training whose steps are measured."""

    contender: str
    loss: str = "negative_cache"  # or in_batch, which has no cache
    batch_size: int = 32
    steps: int = 5
    cache_size: int = 8192
    threads: int = 2
    seed: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `train`."""
        settings = FINE_TUNING | {
            "loss": self.loss,
            "per_device_train_batch_size": self.batch_size,
            "max_document_length": LENGTH,
            "max_query_length": MAX_QUERY_LENGTH,
            "logging_steps": 1,
            "disable_tqdm": True,
            "cache_size": 0,
        }
        if self.loss == "negative_cache":
            settings |= {
                "cache_size": self.cache_size,
                "cache_document_length": LENGTH,
                "cache_embeddings": "sparse" if self.contender == "splade_fast" else "dense",
                "cache_k": 1024,  # nothing is cut, so that both compute the same loss
            }
        return settings


@dataclass(frozen=True)
class StepCost:
    """Seconds of each step but the first, losses of all, and MiB above the loaded model."""

    seconds: list[float]
    losses: list[float]
    peak_mib: float

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def long_pairs(pairs: Sequence[Pair], tokenizer: Any) -> list[Pair]:
    """Return the pairs whose document has LENGTH tokens or more, so that no batch has padding."""
    documents = [pair.document for pair in pairs]
    tokens = tokenizer(documents, truncation=True, max_length=LENGTH).input_ids
    return [pair for pair, ids in zip(pairs, tokens, strict=True) if len(ids) >= LENGTH]


def step_cost(setting: Setting, model: str, pairs: Sequence[Pair]) -> StepCost:
    """Train some steps in a process of its own, and measure them.

    Args:
        setting: the training to measure.
        model: name or folder of the checkpoint.
        pairs: to train on; see `long_pairs`.

    Raises:
        RuntimeError: the process failed; carries what it wrote to stderr.
    """
    environment = dict(os.environ)
    environment.pop("SPLADE_FAST_REFERENCE", None)
    if setting.contender == "pytorch":
        environment["SPLADE_FAST_REFERENCE"] = "1"
    with TemporaryDirectory() as folder:
        given = {"setting": asdict(setting), "model": model, "pairs": [asdict(p) for p in pairs]}
        (Path(folder) / "given.json").write_text(json.dumps(given), encoding="utf-8")
        command = [sys.executable, "-m", __spec__.name, folder]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        if finished.returncode != 0:
            raise RuntimeError(f"{setting.contender} failed:\n{finished.stderr}")
        found = json.loads((Path(folder) / "cost.json").read_text(encoding="utf-8"))
    return StepCost(**found)


def largest_batch(
    measure_peak: Callable[[int], float], limit_mib: float, known: dict[int, float], *, largest: int
) -> int:
    """Find the largest batch whose peak stays within limit_mib, to an eighth of itself.

    The peak is about linear in the batch size, so one guess on the line through the known sizes and
    one an eighth beside it are enough most often. Bisection covers the other cases.

    Args:
        measure_peak: returns the peak in MiB of one batch size.
        limit_mib: the memory.
        known: {batch size: its peak}, at least two; new measurements are added.
        largest: no larger batch is tried.

    Returns:
        A batch size that was measured, or 0 if none fits.
    """
    for guess in itertools.cycle((_on_the_line, _beside, _between)):
        fitting = max((b for b, peak in known.items() if peak <= limit_mib), default=0)
        above = min((b for b, peak in known.items() if peak > limit_mib), default=largest + 1)
        if above - fitting <= max(1, fitting // 8):
            break
        batch = guess(known, limit_mib, fitting, above)
        # Small batches say little about the slope, so a leap is limited: memory must not run out.
        batch = min(max(batch, fitting + 1), above - 1, _LEAP * max(fitting, 1))
        known[batch] = measure_peak(batch)
    return fitting


def _on_the_line(known: dict[int, float], limit_mib: float, fitting: int, above: int) -> int:
    """Return the batch where the line through the two nearest known batches meets the limit."""
    low, high = sorted(sorted(known, key=lambda b: abs(known[b] - limit_mib))[:2])
    slope = (known[high] - known[low]) / (high - low)
    return low + int((limit_mib - known[low]) / slope) if slope > 0 else above


def _beside(known: dict[int, float], limit_mib: float, fitting: int, above: int) -> int:
    """Return a batch an eighth beside the last one, which confirms a good guess."""
    last = list(known)[-1]
    if abs(known[last] - limit_mib) > limit_mib / 5:
        return _on_the_line(known, limit_mib, fitting, above)
    return last + max(1, last // 8) if last == fitting else last - max(1, last // 9)


def _between(known: dict[int, float], limit_mib: float, fitting: int, above: int) -> int:
    if above not in known:
        return _on_the_line(known, limit_mib, fitting, above)
    return math.isqrt(max(1, fitting) * above)


def batch_within(
    limit_mib: float, setting: Setting, cost: StepCost, model: str, pairs: Sequence[Pair]
) -> int:
    """Find the largest batch whose training peaks within limit_mib above the model.

    Args:
        limit_mib: the memory.
        setting: the training; its batch size is the first guess.
        cost: the cost of the setting.
        model, pairs: as in step_cost.
    """

    def measure_peak(batch_size: int) -> float:
        tried = replace(setting, batch_size=batch_size, steps=_STEPS_TO_THE_PEAK)
        return step_cost(tried, model, pairs).peak_mib

    small = max(1, setting.batch_size // 4)
    known = {setting.batch_size: cost.peak_mib, small: measure_peak(small)}
    return largest_batch(measure_peak, limit_mib, known, largest=len(pairs))


def loss_difference(costs: Mapping[str, StepCost]) -> float:
    """Return the largest difference between the losses of a step."""
    steps: Iterable[tuple[float, ...]] = zip(*(c.losses for c in costs.values()), strict=True)
    return max(max(losses) - min(losses) for losses in steps)


def _clock(ended: list[float]) -> Any:
    """Return a callback of the trainer that records the time at the end of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    return Clock()


def measure(folder: Annotated[Path, typer.Argument()]) -> None:
    """Train with the setting of folder/given.json, and write cost.json beside it."""
    from splade_fast.encoders.splade import SpladeEncoder

    given = json.loads((folder / "given.json").read_text(encoding="utf-8"))
    setting = Setting(**given["setting"])
    torch.set_num_threads(setting.threads)
    encoder = SpladeEncoder.from_pretrained(given["model"])
    pairs = [Pair(**pair) for pair in given["pairs"]]
    ended: list[float] = []
    progress: list[Any] = []

    def run() -> None:
        progress.extend(
            train(
                encoder,
                pairs,
                setting.steps,
                setting.arguments,
                callbacks=[_clock(ended)],
                seed=setting.seed,
            )
        )

    peak_mib = peak_growth(run) / 2**20
    seconds = [b - a for a, b in itertools.pairwise(ended)]
    cost = StepCost(seconds, [point.loss for point in progress], peak_mib)
    (folder / "cost.json").write_text(json.dumps(asdict(cost)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(measure)
