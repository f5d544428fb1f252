"""Values of a run for each query in a file, and a paired test between two runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from splade_fast._atomic_files import whole_file
from splade_fast.search.lines import DataError, parse_lines, quote_start

Test = Literal["t", "wilcoxon", "permutation"]
PerQuery = dict[str, dict[str, float]]  # {measure: {query id: value}}

_HEADER = "data\tquery_id\tmeasure\tvalue"
_RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """Result of a measure for two runs over the same queries.

    Args:
        measure: name of the measure.
        queries: number of queries.
        mean: mean of the first run.
        other_mean: mean of the second run.
        p_value: probability of such a difference or a larger one, in both directions, if the runs
            were equally good.
    """

    measure: str
    queries: int
    mean: float
    other_mean: float
    p_value: float

    @property
    def difference(self) -> float:
        """Mean of the first run less that of the second."""
        return self.mean - self.other_mean


def compare_runs(
    run: Mapping[str, Mapping[str, float]],
    other: Mapping[str, Mapping[str, float]],
    *,
    test: Test = "t",
    seed: int = 0,
) -> list[Comparison]:
    """Compare two runs by the measures that both have, with a paired test over the queries.

    Args:
        run: {measure: {query id: value}}, as `Measures.per_query` returns it.
        other: the same of another run, for the same queries.
        test: "t" for Student's paired t-test, "wilcoxon" for the signed-rank test, "permutation"
            for Fisher's randomisation test with 9999 draws. Runs without any difference have a
            p-value of 1.
        seed: seed of the draws.

    Raises:
        DataError: the runs have no measure in common, fewer than two queries, or other queries.
        ImportError: scipy is not installed.
        ValueError: there is no such test.

    Source: Smucker et al. 2007, "A comparison of statistical significance tests for information
    retrieval evaluation".

    Example::

        >>> from splade_fast.search.significance import compare_runs
        >>> better = {"MRR@10": {"q1": 1.0, "q2": 0.5, "q3": 0.8}}
        >>> worse = {"MRR@10": {"q1": 0.5, "q2": 0.1, "q3": 0.2}}
        >>> [found] = compare_runs(better, worse)
        >>> round(found.difference, 3), round(found.p_value, 3)
        (0.5, 0.013)
    """
    if test not in get_args(Test):
        raise ValueError(f"test must be one of {', '.join(get_args(Test))}, got {test!r}")
    shared = [measure for measure in run if measure in other]
    if not shared:
        raise DataError(
            f"both runs must have a measure in common, got {', '.join(run)} and {', '.join(other)}"
        )
    return [_compare(measure, run[measure], other[measure], test, seed) for measure in shared]


def _compare(
    measure: str, values: Mapping[str, float], others: Mapping[str, float], test: Test, seed: int
) -> Comparison:
    odd = sorted(values.keys() ^ others.keys())
    if odd:
        raise DataError(
            f"both runs must have the same queries for {measure}, got {len(values)} and "
            f"{len(others)}, with {odd[0]!r} in one of them"
        )
    if len(values) < 2:
        raise DataError(f"runs must have at least 2 queries to be compared, got {len(values)}")
    pairs = [values[query_id] for query_id in values], [others[query_id] for query_id in values]
    means = [sum(side) / len(side) for side in pairs]
    p_value = 1.0 if pairs[0] == pairs[1] else _p_value(*pairs, test, seed)
    return Comparison(measure, len(values), means[0], means[1], p_value)


def _p_value(values: Sequence[float], others: Sequence[float], test: Test, seed: int) -> float:
    try:
        import numpy as np
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "a comparison needs the package scipy: pip install splade_fast[recipe]"
        ) from error
    if test == "t":
        differences = {round(a - b, 12) for a, b in zip(values, others, strict=True)}
        if len(differences) == 1:  # no variance: the statistic is infinite
            return 0.0
        return float(stats.ttest_rel(values, others).pvalue)
    if test == "wilcoxon":
        return float(stats.wilcoxon(values, others).pvalue)

    def statistic(a: Any, b: Any, axis: int = -1) -> Any:
        return np.mean(a - b, axis=axis)

    found = stats.permutation_test(
        (np.asarray(values), np.asarray(others)),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def write_per_query(path: str | os.PathLike[str], runs: Mapping[str, PerQuery]) -> None:
    """Write lines `data<TAB>query_id<TAB>measure<TAB>value`; the file appears whole or not at all.

    Args:
        path: file; an existing one is replaced.
        runs: {name of the data: {measure: {query id: value}}}.
    """
    lines = (
        f"{data}\t{query_id}\t{measure}\t{value!r}\n"
        for data, run in runs.items()
        for measure, values in run.items()
        for query_id, value in values.items()
    )
    with whole_file(path) as temporary:
        temporary.write_text(f"{_HEADER}\n{''.join(lines)}", encoding="utf-8")


def read_per_query(path: str | os.PathLike[str]) -> dict[str, PerQuery]:
    """Read a file of `write_per_query`.

    Raises:
        DataError: there is no such file, or a line is malformed.
    """
    runs: dict[str, PerQuery] = {}
    for data, query_id, measure, value in _iterate_lines(Path(path)):
        runs.setdefault(data, {}).setdefault(measure, {})[query_id] = value
    return runs


def _iterate_lines(path: Path) -> Iterator[tuple[str, str, str, float]]:
    header: str | None = None
    for _, line in parse_lines(path, _parse_line):
        if header is None:
            header = _HEADER
            if line is not None:
                raise DataError(f"{path} must begin with the line {_HEADER!r}")
        elif line is not None:
            yield line
    if header is None:
        raise DataError(f"{path} must begin with the line {_HEADER!r}, got nothing")


def _parse_line(line: str) -> tuple[str, str, str, float] | None:
    if line == _HEADER:
        return None
    fields = line.split("\t")
    if len(fields) != 4:
        raise DataError(f"expected data, query_id, measure and value, got {quote_start(line)}")
    return fields[0], fields[1], fields[2], float(fields[3])
