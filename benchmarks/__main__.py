"""python -m benchmarks [CASES...]: check, time in turns, and keep the results."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.harness.case import UnavailableError
from benchmarks.harness.drawing import draw_if_possible
from benchmarks.harness.driver import CONTENDERS, Options, run_case
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import Row, write_csv
from benchmarks.harness.tables import format_case

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
ROUNDS = {"cpu": 11, "cuda": 50}
REPORT = Path("docs/benchmarks.md")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(cases.names()):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(cases.names())}")
    if options.report:
        return _report(options.out, options.report)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    machine = Machine.current(options.device)
    print(machine.title, flush=True)
    outcomes = [_run_op(op, options, machine) for op in options.cases or cases.names()]
    return 0 if all(outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASES", help=f"of {cases.names()}; none: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="default: by device"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it all run?")
    parser.add_argument("--repeats", type=int, help=f"rounds a case, default {ROUNDS}")
    parser.add_argument("--seconds", type=float, default=60, help="stop a case's rounds after this")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=("eager", "compile", "peer", "others", "memory")
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=REPORT,
        metavar="PAGE",
        help="measure nothing: one Markdown page, default %(const)s, of all CSVs in OUT",
    )
    return parser


def _run_op(op: str, options: argparse.Namespace, machine: Machine) -> bool:
    """Measures the cases of an op; rows reach the disk case by case. True if all were correct."""
    names = options.dtype or DTYPES[options.device]
    dtypes = [getattr(torch, name) for name in names]
    measuring = Options(
        rounds=options.repeats or ROUNDS[options.device],
        seconds=0.0 if options.quick else options.seconds,
        contenders=tuple(name for name in CONTENDERS if name not in options.skip),
        others="others" not in options.skip,
        memory="memory" not in options.skip,
    )
    suffix = "-quick" if options.quick else ""
    path = options.out / f"{op}-{options.device}{suffix}.csv"
    rows: list[Row] = []
    complete = True
    for case in cases.load(op, options.device, dtypes, quick=options.quick):
        try:
            found = run_case(case, measuring, machine)
        except UnavailableError as error:
            print(f"without {case.shape}: {error}", flush=True)
            complete = False
            continue
        print(f"\n{format_case(found)}", flush=True)
        rows += found
        write_csv(rows, Row, path)
    if rows:
        draw_if_possible("benchmarks.harness.plots", rows, path.with_suffix(".svg"))
    return complete and all(row.correct for row in rows)


def _report(results: Path, page: Path) -> int:
    from benchmarks.report import write_report  # needs matplotlib

    write_report(results, page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
