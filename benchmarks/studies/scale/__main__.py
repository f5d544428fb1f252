"""python -m benchmarks.studies.scale [STUDIES...]: measure, and keep the numbers."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.drawing import draw_if_possible
from benchmarks.harness.facts import merge_into_csv, recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv, write_csv
from benchmarks.studies.scale import cache, encode, head, load, on_paper, search
from benchmarks.studies.scale.findings import Fact, Finding, format_findings, in_order
from benchmarks.studies.scale.power_law import Exponent, exponents, format_exponents
from benchmarks.studies.scale.work import Rounds, Work, measured_alone

Works = Mapping[str, Work]


@dataclass(frozen=True)
class Study:
    axis: str
    sizes: tuple[int, ...]
    works: Callable[[int, Path], Works]  # of a size, by variant; the folder takes their files


STUDIES = {
    "encode": Study("documents", encode.DOCUMENTS, encode.of_documents),
    "load": Study("documents", load.DOCUMENTS, load.of_documents),
    "search": Study("documents", search.DOCUMENTS, search.of_documents),
    "cache": Study("slots", cache.SLOTS, lambda slots, _: cache.of_slots(slots)),
    "vocabulary": Study("entries", head.VOCABULARIES, lambda vocab, _: head.of_vocabulary(vocab)),
    "length": Study("tokens", head.LENGTHS, lambda length, _: head.of_length(length)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    path = options.out / "scale-cpu.csv"
    if options.report:
        _report(path)
        return 0
    torch.set_num_threads(options.threads)
    machine = Machine.current("cpu")
    print(machine.title, flush=True)
    rounds = Rounds(options.rounds, options.seconds)
    complete = True
    for name in options.studies or STUDIES:
        study = STUDIES[name]
        for size in options.sizes or study.sizes:
            try:
                found = measured(name, study, size, rounds)
            except UnavailableError as error:
                print(f"without {name} of {size:,} {study.axis}: {error}", flush=True)
                complete = False
                continue
            print(format_findings(found), flush=True)
            merge_into_csv(recorded(found, Fact, machine), Fact, path, in_order)
    if path.exists():
        _report(path)
    return 0 if complete else 1


def measured(name: str, study: Study, size: int, rounds: Rounds) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            Finding(study=name, variant=variant, axis=study.axis, size=size, **asdict(quantity))
            for variant, work in study.works(size, Path(folder)).items()
            for quantity in measured_alone(work, rounds)
        ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.scale", description=__doc__)
    parser.add_argument(
        "studies", nargs="*", metavar="STUDIES", help=f"of {tuple(STUDIES)}; none: all"
    )
    parser.add_argument("--sizes", nargs="+", type=int, help="instead of those of each study")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20, help="stop rounds after this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results")
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: fit, plot and extrapolate the CSV in OUT",
    )
    return parser


def _report(path: Path) -> None:
    """The exponents and the plot beside the CSV, and what is computed from it."""
    facts = read_csv(Fact, path)
    found = exponents(facts)
    print(format_exponents(found))
    if {"encode", "load", "search", "cache"} <= {exponent.study for exponent in found}:
        print(on_paper.section(facts))
    write_csv(found, Exponent, path.with_name(f"scale_exponents{path.stem[5:]}.csv"))
    draw_if_possible("benchmarks.studies.scale.plots", facts, path.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(main())
