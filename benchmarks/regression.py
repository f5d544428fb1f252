"""python -m benchmarks.regression [SAVED]: the newest run of test_regression.py and a saved one.

Compared is how many floors each case took, not how many seconds; what takes at least LIMIT times as
many as before is flagged, and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FLOORS = "times_floor"  # of pytest-benchmark's extra_info
LIMIT = 1.25
STORAGE = Path(".benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression", description=__doc__)
    parser.add_argument(
        "saved", nargs="?", default="", help="number or part of the name; none: the run before"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="default %(default)s")
    parser.add_argument("--storage", type=Path, default=STORAGE)
    options = parser.parse_args(arguments)
    runs = sorted(options.storage.glob("*/*.json"), key=lambda path: path.name)
    if not runs:
        print(f"no saved run in {options.storage}", file=sys.stderr)
        return 2
    *earlier, newest = runs
    matching = [run for run in earlier if options.saved in run.stem]
    if not matching:
        wanted = f"matches {options.saved!r}" if options.saved else "is there yet"
        print(f"no run before {newest.stem} {wanted}: nothing to compare with")
        return 2 if options.saved else 0
    print(f"{newest.stem} against {matching[-1].stem}, times the floor")
    slower = compare(load(matching[-1]), load(newest), options.limit)
    print(f"{len(slower)} slower by {options.limit:g} times or more")
    return 1 if slower else 0


def load(path: Path) -> dict[str, float]:
    """Times the floor, by case."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {
        run["name"]: run["extra_info"][FLOORS]
        for run in saved["benchmarks"]
        if FLOORS in run["extra_info"]
    }


def compare(old: Mapping[str, float], new: Mapping[str, float], limit: float) -> list[str]:
    """Prints a line a case; the names of those that became slower."""
    slower = []
    for name, now in new.items():
        if name not in old:
            print(f"  {now:10.2f}  new                 {name}")
            continue
        ratio = now / old[name]
        if ratio >= limit:
            slower.append(name)
        flag = "SLOWER" if ratio >= limit else ""
        print(f"  {now:10.2f}  was {old[name]:8.2f}  x {ratio:.2f} {flag:<6}  {name}")
    for name in old.keys() - new.keys():
        print(f"  gone: {name}")
    return slower


if __name__ == "__main__":
    sys.exit(main())
