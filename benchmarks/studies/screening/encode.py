"""Texts to pruned vectors, stage by stage, and beside sentence-transformers.

The stages are those of SpladeEncoder.encode, one after another, with the dense head as it was
before and with the one that chooses; the contenders are called as their users do.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.timing import WARM_UPS, Contender, garbage_collection_off, time_in_turns
from benchmarks.studies.screening.facts import Finding
from examples.docstrings.contenders import as_sparse_rows, load_contender
from splade_fast.encoders.hidden_states import find_decoder, hidden_before_decoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.ops.head import splade_head
from splade_fast.ops.sparse_rows import SparseRows

STAGES = ("tokenize", "body", "head", "prune")
ALGORITHMS = {"before: dense head": "dense", "after: screened head": "auto"}
OURS, PEER = "splade_fast", "sentence-transformers"
MIN_TIMES_PEER = 8.0
MAX_DIFFERENCE = 1e-5


def study(
    folder: Path,
    texts: Sequence[str],
    *,
    k: int,
    batch_size: int,
    max_length: int,
    rounds: int,
    seconds: float,
) -> list[Finding]:
    # Sorted, as the contenders that sort by characters do.
    ordered = sorted(texts, key=len, reverse=True)
    encoder = SpladeEncoder.from_pretrained(folder)
    finding = partial(
        Finding,
        study="encode",
        model=f"{len(texts)} texts of <= {max_length} tokens",
        dim=find_decoder(encoder.model).weight.shape[1],
        dtype="float32",
    )
    found = []
    for variant, stages in _profile(encoder, ordered, k, batch_size, max_length, rounds).items():
        total = sum(stages.values())
        for stage, milliseconds in stages.items():
            share = 100 * milliseconds / total
            found += [
                finding(variant=variant, quantity=stage, value=milliseconds, unit="ms"),
                finding(variant=variant, quantity=f"{stage}, share", value=share, unit="%"),
            ]
        speed = len(texts) / total * 1e3
        found.append(finding(variant=variant, quantity="documents/s", value=speed, unit="1/s"))
    for kept in (None, k):
        title = "all entries" if kept is None else f"k={kept}"
        speeds, difference = _compared(
            folder, ordered, kept, batch_size, max_length, rounds, seconds
        )
        found += [
            finding(variant=f"{name}, {title}", quantity="documents/s", value=speed, unit="1/s")
            for name, speed in speeds.items()
        ]
        ours = partial(finding, variant=f"{OURS}, {title}")
        found += [
            ours(
                quantity=f"over {PEER}",
                value=speeds[OURS] / speeds[PEER],
                unit="times",
                at_least=MIN_TIMES_PEER,
            ),
            ours(quantity="max difference", value=difference, unit="", at_most=MAX_DIFFERENCE),
        ]
    return found


@torch.inference_mode()
def _profile(
    encoder: SpladeEncoder,
    texts: Sequence[str],
    k: int,
    batch_size: int,
    max_length: int,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each stage over all batches, in turns."""
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in ALGORITHMS}
    with garbage_collection_off():
        for turn in range(WARM_UPS + rounds):
            for variant in list(ALGORITHMS)[:: 1 if turn % 2 else -1]:
                stages = dict.fromkeys(STAGES, 0.0)
                for start in range(0, len(texts), batch_size):
                    batch = texts[start : start + batch_size]
                    _add_batch(encoder, batch, k, max_length, ALGORITHMS[variant], stages)
                if turn >= WARM_UPS:
                    samples[variant].append(stages)
    return {
        variant: {stage: statistics.median(s[stage] for s in found) for stage in STAGES}
        for variant, found in samples.items()
    }


def _add_batch(
    encoder: SpladeEncoder,
    texts: Sequence[str],
    k: int,
    max_length: int,
    algorithm: str,
    stages: dict[str, float],
) -> None:
    marks = [time.perf_counter()]

    def end_of_stage() -> None:
        marks.append(time.perf_counter())

    inputs = encoder.tokenize(texts, max_length)
    end_of_stage()
    hidden = hidden_before_decoder(encoder.model, **inputs)
    end_of_stage()
    decoder = find_decoder(encoder.model)
    pooled = splade_head(
        hidden, decoder.weight, decoder.bias, inputs["attention_mask"], algorithm=algorithm
    )
    end_of_stage()
    SparseRows.from_dense(pooled, k)
    end_of_stage()
    for stage, begin, end in zip(STAGES, marks[:-1], marks[1:], strict=True):
        stages[stage] += (end - begin) * 1e3


def _compared(
    folder: Path,
    texts: list[str],
    k: int | None,
    batch_size: int,
    max_length: int,
    rounds: int,
    seconds: float,
) -> tuple[dict[str, float], float]:
    """Documents per second, and the largest difference between the vectors."""
    encoders: dict[str, Callable[[], object]] = {
        name: partial(load_contender(name, str(folder), max_length, k), texts, batch_size)
        for name in (OURS, PEER)
    }
    ours, theirs = (as_sparse_rows(encode()).to_dense() for encode in encoders.values())
    times = time_in_turns(
        {name: Contender(encode) for name, encode in encoders.items()},
        rounds=rounds,
        seconds=seconds,
        device="cpu",
    )
    speeds = {name: len(texts) / statistics.median(values) * 1e3 for name, values in times.items()}
    return speeds, (ours - theirs).abs().max().item()
