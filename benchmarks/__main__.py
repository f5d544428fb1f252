"""Benchmarks: cases compare one op with others, studies answer larger questions.

python -m benchmarks [CASE ...]            check, time in turns, keep the results as CSV
python -m benchmarks study NAME [TEXT ...] measure all whose names have these texts
python -m benchmarks report [PAGE]         tables and plots of all results
python -m benchmarks compare OLD NEW       ratios to the floor in two folders of results
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import cases, studies
from benchmarks.harness.case import UnavailableError
from benchmarks.harness.compare import compare
from benchmarks.harness.instruction_sets import LEVELS, restart_with
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import RESULTS, to_rows, update_csv
from benchmarks.harness.run_case import CONTENDERS, Options, run_case
from benchmarks.harness.tables import format_measurements
from benchmarks.harness.timing import QUICK, Rounds

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
ROUNDS = {"cpu": 11, "cuda": 50}
PAGE = Path("docs/benchmarks.md")


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "study": _run_study,
        "report": _write_report,
        "compare": _compare,
    }
    if given and given[0] in commands:
        return commands[given[0]](given[1:])
    return _run_cases(given)


def _run_cases(arguments: Sequence[str]) -> int:
    parser = _measuring_parser("python -m benchmarks")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{cases.names()}; none: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="default: by device"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=("eager", "compile", "peer", "others", "memory")
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="cases whose titles have these texts"
    )
    options = parser.parse_args(arguments)
    _check_names(parser, "case", options.cases, cases.names())
    restart_with(options.isa, arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    machine = _start(options.threads, options.device)
    rounds = Rounds(options.rounds or ROUNDS[options.device], options.seconds)
    measuring = Options(
        rounds=QUICK if options.quick else rounds,
        contenders=[name for name in CONTENDERS if name not in options.skip],
        has_others="others" not in options.skip,
        has_memory="memory" not in options.skip,
    )
    dtypes = [getattr(torch, name) for name in options.dtype or DTYPES[options.device]]
    suffix = _suffix(options.isa) + ("-quick" if options.quick else "")
    is_complete = True
    for name in options.cases or cases.names():
        path = options.out / f"{name}-{options.device}{suffix}.csv"
        for case in cases.load(name, options.device, dtypes, quick=options.quick):
            if not all(text in case.title for text in options.only):
                continue
            try:
                found = run_case(case, measuring)
            except UnavailableError as error:
                print(f"without {case.shape}: {error}", flush=True)
                is_complete = False
                continue
            print(f"\n{case.title}\n{format_measurements(found)}", flush=True)
            is_complete &= found[0].is_within_bounds  # the error
            update_csv(to_rows(found, machine), path)
    return 0 if is_complete else 1


def _run_study(arguments: Sequence[str]) -> int:
    parser = _measuring_parser("python -m benchmarks study")
    parser.add_argument("name", metavar="NAME", help=f"{studies.names()}")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="none: all measurements")
    parser.add_argument("--list", action="store_true", help="print the names of the measurements")
    options = parser.parse_args(arguments)
    _check_names(parser, "study", [options.name], studies.names())
    restart_with(options.isa, ["study", *arguments])
    rounds = Rounds(options.rounds or studies.ROUNDS, options.seconds)
    measurements = studies.load(options.name, rounds)
    chosen = [name for name in measurements if all(text in name for text in options.texts)]
    if not chosen:
        parser.error(f"no measurement has {options.texts}; there are {', '.join(measurements)}")
    if options.list:
        print("\n".join(chosen))
        return 0
    device = studies.device(options.name)
    machine = _start(options.threads, device)
    path = options.out / f"{options.name}-{device}{_suffix(options.isa)}.csv"
    is_complete = True
    for name in chosen:
        try:
            found = measurements[name]()
        except UnavailableError as error:
            print(f"without {name}: {error}", flush=True)
            is_complete = False
            continue
        print(f"\n{name}\n{format_measurements(found)}", flush=True)
        update_csv(to_rows(found, machine), path)
    return 0 if is_complete else 1


def _write_report(arguments: Sequence[str]) -> int:
    from benchmarks.harness.report import write_report  # needs matplotlib and pandas

    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("page", nargs="?", type=Path, default=PAGE, help="default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    options = parser.parse_args(arguments)
    write_report(options.results, options.page)
    print(options.page)
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="Compare the times of ours, in floors, of the cases that both folders have.",
    )
    parser.add_argument("old", type=Path, help="folder of CSVs")
    parser.add_argument("new", type=Path, help="folder of CSVs")
    parser.add_argument(
        "--limit", type=float, default=1.25, help="ratio that fails, default %(default)s"
    )
    options = parser.parse_args(arguments)
    return compare(options.old, options.new, options.limit)


def _measuring_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--isa", choices=LEVELS, help="hold all contenders to a CPU's lesser set")
    parser.add_argument("--rounds", type=int, help="rounds of a measurement")
    parser.add_argument("--seconds", type=float, default=60, help="end the rounds after this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs")
    return parser


def _suffix(isa: str | None) -> str:
    return f"-{isa}" if isa is not None else ""


def _check_names(
    parser: argparse.ArgumentParser, kind: str, given: Sequence[str], known: Sequence[str]
) -> None:
    if unknown := [name for name in given if name not in known]:
        parser.error(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")


def _start(threads: int, device: str) -> Machine:
    torch.set_num_threads(threads)
    machine = Machine.current(device)
    print(machine.title, flush=True)
    return machine


if __name__ == "__main__":
    sys.exit(main())
