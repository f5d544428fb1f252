"""Encoding and training with sentence-transformers, with and without splade_fast."""

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.facts import merge_into_csv, recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.timing import Contender, time_in_turns
from benchmarks.studies.screening.facts import Fact, Finding, format_findings, in_order
from benchmarks.studies.sentence_transformers.workloads import (
    BODY,
    OURS,
    SETTINGS,
    THEIRS,
    WORKS,
    Workload,
)

DTYPES = ("float32", "bfloat16")

# Of the model as it was over the accelerated one.
MIN_TIMES_FASTER = {"encode": 8.0, "gradients": 4.0, "step": 4.0}
MIN_TIMES_SMALLER = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.sentence_transformers", description=__doc__
    )
    parser.add_argument("works", nargs="*", metavar="WORKS", help=f"of {WORKS}; none: all")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20, help="stop rounds after this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results")
    options = parser.parse_args(arguments)
    if unknown := set(options.works) - set(WORKS):
        parser.error(f"no work {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    torch.set_num_threads(options.threads)
    machine = Machine.current("cpu")
    print(machine.title, flush=True)
    path = options.out / "sentence_transformers-cpu.csv"
    for name in options.models:
        for dtype in options.dtype:
            workload = Workload(SETTINGS[name], getattr(torch, dtype))
            for work in options.works or WORKS:
                found = measured(workload, work, options.rounds, options.seconds)
                print(format_findings(found), flush=True)
                merge_into_csv(recorded(found, Fact, machine), Fact, path, in_order)
    return 0


def measured(workload: Workload, work: str, rounds: int, seconds: float) -> list[Finding]:
    """Median time of a round and peak memory of both contenders, and what bounds them."""
    setting = workload.setting
    finding = partial(
        Finding,
        study=work,
        model=setting.name,
        dim=setting.dim,
        dtype=str(workload.dtype).split(".")[1],
    )
    runs = workload.runs(work)
    found = []
    if work == "encode":
        ours, theirs = (runs[name]().to_dense() for name in (OURS, THEIRS))
        largest = (ours.double() - theirs.double()).abs().max().item()
        share = (ours > 0).double().mean().item()
        found = [
            finding(variant=OURS, quantity="largest difference", value=largest, unit=""),
            finding(variant=OURS, quantity="active entries", value=100 * share, unit="%"),
        ]
    contenders = {name: Contender(run) for name, run in runs.items()}
    times = {
        name: statistics.median(values)
        for name, values in time_in_turns(
            contenders, rounds=rounds, seconds=seconds, device="cpu"
        ).items()
    }
    del runs, contenders
    peaks = {name: _peak(workload, work, name) / 2**20 for name in (OURS, THEIRS)}
    for name, milliseconds in times.items():
        if work == "encode":
            speed = setting.documents / milliseconds * 1e3
            found.append(finding(variant=name, quantity="documents/s", value=speed, unit="1/s"))
        else:
            found.append(finding(variant=name, quantity="time", value=milliseconds, unit="ms"))
        if name in peaks:
            peak = finding(variant=name, quantity="peak memory", value=peaks[name], unit="MiB")
            found.append(peak)
    return [
        *found,
        finding(
            variant=BODY,
            quantity="times faster",
            value=times[THEIRS] / times[BODY],
            unit="times",
        ),
        finding(
            variant=OURS,
            quantity="times faster",
            value=times[THEIRS] / times[OURS],
            unit="times",
            at_least=MIN_TIMES_FASTER[work],
        ),
        finding(
            variant=OURS,
            quantity="times smaller",
            value=peaks[THEIRS] / max(peaks[OURS], 1),
            unit="times",
            at_least=MIN_TIMES_SMALLER,
        ),
    ]


def _peak(workload: Workload, work: str, contender: str) -> int:
    """In a fresh process: pages that others left to the allocator would be reused unseen."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        threads = torch.get_num_threads()
        return pool.submit(workload.peak, work, contender, threads).result()


if __name__ == "__main__":
    sys.exit(main())
