"""Encoding and training with a SparseEncoder of sentence-transformers, as it was and accelerated.

"times faster" without a head: the bound that tokenizer, transformer and optimizer set.
"""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Rounds, median_times
from benchmarks.studies.sentence_transformers.workloads import (
    BODY,
    OURS,
    SETTINGS,
    THEIRS,
    WORKS,
    Workload,
)

DTYPES = (torch.float32, torch.bfloat16)

# Bounds of the model as it was over the accelerated one.
MIN_TIMES_FASTER = {"encode": 8.0, "gradients": 4.0, "step": 4.0}
MIN_TIMES_SMALLER = 4.0


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {
        f"{work} {name} {str(dtype).removeprefix('torch.')}": partial(
            measure, Workload(setting, dtype), work, rounds
        )
        for name, setting in SETTINGS.items()
        for dtype in DTYPES
        for work in WORKS
    }


def measure(workload: Workload, work: str, rounds: Rounds) -> list[Measurement]:
    """Measure the median time and the peak memory of both contenders, and what bounds them."""
    setting = workload.setting
    measurement = partial(
        Measurement,
        study="sentence_transformers",
        part=work,
        subject=f"{setting.name}, D {setting.dim}",
        dtype=str(workload.dtype).removeprefix("torch."),
    )
    ours = partial(measurement, contender=OURS)
    runs = workload.runs(work)
    found = []
    if work == "encode":
        vectors, their_vectors = (runs[name]().to_dense() for name in (OURS, THEIRS))
        largest = (vectors.double() - their_vectors.double()).abs().max().item()
        share = (vectors > 0).double().mean().item()
        found = [
            ours(quantity="largest difference", value=largest),
            ours(quantity="active entries", value=100 * share, unit="%"),
        ]
    times = median_times(runs, rounds)
    del runs
    peaks = {name: measure_peak(workload, work, name) / 2**20 for name in (OURS, THEIRS)}
    for name, milliseconds in times.items():
        if work == "encode":
            speed = setting.documents / milliseconds * 1e3
            found.append(
                measurement(contender=name, quantity="documents/s", value=speed, unit="1/s")
            )
        else:
            found.append(
                measurement(contender=name, quantity="time", value=milliseconds, unit="ms")
            )
        if name in peaks:
            found.append(
                measurement(contender=name, quantity="peak memory", value=peaks[name], unit="MiB")
            )
    return [
        *found,
        measurement(
            contender=BODY,
            quantity="times faster",
            value=times[THEIRS] / times[BODY],
            unit="times",
        ),
        ours(
            quantity="times faster",
            value=times[THEIRS] / times[OURS],
            unit="times",
            at_least=MIN_TIMES_FASTER[work],
        ),
        ours(
            quantity="times smaller",
            value=peaks[THEIRS] / max(peaks[OURS], 1),
            unit="times",
            at_least=MIN_TIMES_SMALLER,
        ),
    ]


def measure_peak(workload: Workload, work: str, contender: str) -> int:
    """Measure in a fresh process: pages left to the allocator would be reused unseen."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        threads = torch.get_num_threads()
        return pool.submit(workload.peak, work, contender, threads).result()
