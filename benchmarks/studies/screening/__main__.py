"""python -m benchmarks.studies.screening [STUDIES...]: measure, and keep the numbers."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.drawing import draw_if_possible
from benchmarks.harness.facts import merge_into_csv, recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv
from benchmarks.inputs.trained import (
    DIMS,
    TrainedInputs,
    fetched,
    random_inputs,
    sample_texts,
    trained_inputs,
)
from benchmarks.studies.screening import encode, prepare, sizes, survivors, sweep
from benchmarks.studies.screening.facts import Fact, Finding, format_findings, in_order
from examples.docstrings.checkpoint import DEMO

STUDIES = ("survivors", "sweep", "sizes", "prepare", "encode")
DTYPES = ("float32", "bfloat16")

_SWEPT_DOCUMENTS = 16
_TRAINING_DOCUMENTS, _TRAINING_LENGTH = 32, 256
_ENCODED_DOCUMENTS, _ENCODED_LENGTH, _BATCH_SIZE, _K = 64, 128, 32, 256

MakeInputs = Callable[[int], TrainedInputs]
Study = Callable[[], list[Finding]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    path = options.out / f"screening-cpu{'-quick' if options.quick else ''}.csv"
    if options.report:
        facts = read_csv(Fact, path)
        print(format_findings(facts))
        draw_if_possible("benchmarks.studies.screening.plots", facts, path)
        return 0
    torch.set_num_threads(options.threads)
    machine = Machine.current("cpu")
    print(machine.title, flush=True)
    complete = True
    for study in _studies(options):
        try:
            found = study()
        except UnavailableError as error:
            print(f"without: {error}", flush=True)
            complete = False
            continue
        print(format_findings(found), flush=True)
        merge_into_csv(recorded(found, Fact, machine), Fact, path, in_order)
    if path.exists():
        draw_if_possible("benchmarks.studies.screening.plots", read_csv(Fact, path), path)
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.screening", description=__doc__
    )
    parser.add_argument("studies", nargs="*", metavar="STUDIES", help=f"of {STUDIES}; none: all")
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=DIMS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument(
        "--quick", action="store_true", help="tiny random inputs, without encode: does it run?"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds of a measurement")
    parser.add_argument("--seconds", type=float, default=10, help="stop rounds after this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: print and plot the CSV in OUT"
    )
    return parser


def _studies(options: argparse.Namespace) -> Iterator[Study]:
    """One for each model and dtype, made as late as possible: their inputs are large."""
    chosen = options.studies or STUDIES
    dims = [32] if options.quick else options.dims
    measuring = (options.repeats, options.seconds)
    typed = [(dim, getattr(torch, name)) for dim in dims for name in options.dtype]
    inputs = random_inputs if options.quick else trained_inputs
    if "survivors" in chosen:
        for dim in dims:
            yield partial(_survivors, inputs, dim)
    if "sweep" in chosen:
        for dim, dtype in typed:
            yield partial(_sweep, inputs, dim, dtype, *measuring)
    if "sizes" in chosen:
        for dim, dtype in typed:
            yield partial(_sizes, inputs, dim, dtype, *measuring)
    if "prepare" in chosen:
        for dim, dtype in typed:
            yield partial(_prepare, inputs, dim, dtype, *measuring)
        if not options.quick:
            yield partial(_train, *measuring)
    if "encode" in chosen and not options.quick:
        yield partial(_encode, *measuring)


def _survivors(inputs: MakeInputs, dim: int) -> list[Finding]:
    return survivors.study(inputs(dim))


def _sweep(
    inputs: MakeInputs, dim: int, dtype: torch.dtype, rounds: int, seconds: float
) -> list[Finding]:
    return sweep.study(inputs(dim).first(_SWEPT_DOCUMENTS), dtype, sweep.SHARES, rounds, seconds)


def _sizes(
    inputs: MakeInputs, dim: int, dtype: torch.dtype, rounds: int, seconds: float
) -> list[Finding]:
    return sizes.study(inputs(dim), dtype, rounds, seconds)


def _prepare(
    inputs: MakeInputs, dim: int, dtype: torch.dtype, rounds: int, seconds: float
) -> list[Finding]:
    return prepare.study(inputs(dim), dtype, rounds, seconds)


def _train(rounds: int, seconds: float) -> list[Finding]:
    texts = sample_texts(_TRAINING_DOCUMENTS)
    return prepare.study_of_training(fetched(DEMO), texts, _TRAINING_LENGTH, rounds, seconds)


def _encode(rounds: int, seconds: float) -> list[Finding]:
    return encode.study(
        fetched(DEMO),
        sample_texts(_ENCODED_DOCUMENTS),
        k=_K,
        batch_size=_BATCH_SIZE,
        max_length=_ENCODED_LENGTH,
        rounds=rounds,
        seconds=seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
