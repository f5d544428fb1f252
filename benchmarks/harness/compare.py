"""Comparison of two folders of results by how many floors ours took, not by time.

Another or a busier machine changes the time of the floor too, which is measured in the same rounds.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.results import FLOOR, TIME, Row, read_csv


def compare(old: Path, new: Path, limit: float) -> int:
    """Print a line for each case; return 1 if one takes `limit` times as many floors, else 0.

    Raises:
        FileNotFoundError: the folders have no case in common.
    """
    before, after = times_the_floor(old), times_the_floor(new)
    if not before.keys() & after.keys():
        raise FileNotFoundError(f"{old} and {new} must have a case in common, got none")
    slower = 0
    for case in sorted(before.keys() & after.keys()):
        ratio = after[case] / before[case]
        slower += ratio >= limit
        flag = "SLOWER" if ratio >= limit else ""
        print(
            f"  {after[case]:10.2f}  was {before[case]:8.2f}  x {ratio:.2f} {flag:<6}  "
            f"{' '.join(case)}"
        )
    print(f"{slower} slower by {limit:g} times or more")
    return 1 if slower else 0


def times_the_floor(results: Path) -> dict[tuple[str, ...], float]:
    """Return the time of ours over that of the floor, by case.

    Lower quartiles, since they vary less from run to run than medians.
    """
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for path in sorted(results.glob("*.csv")):
        for row in read_csv(path):
            if row.quantity == TIME and row.p25 is not None:
                times.setdefault(_case(path, row), {})[row.contender] = row.p25
    return {case: _ratio(found) for case, found in times.items() if {"ours", FLOOR} <= {*found}}


def _ratio(times: Mapping[str, float]) -> float:
    return times["ours"] / times[FLOOR]


def _case(path: Path, row: Row) -> tuple[str, ...]:
    return path.stem, row.subject, f"{row.axis} {row.size}", row.dtype, row.device, row.part
