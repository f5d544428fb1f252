"""Selection of parameters: every pair of values, or with make test-all every combination."""

import os
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

ALL = "TEST_ALL"  # the variable of the environment that make test-all sets


def covering_rows(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices in which every pair of values of every two columns occurs.

    Takes the row that adds most new pairs, the first of equals, until there are no new pairs.

    Args:
        sizes: number of values of each column.
    """
    columns = list(combinations(range(len(sizes)), 2))
    candidates = [
        (row, {(i, j, row[i], row[j]) for i, j in columns}) for row in product(*map(range, sizes))
    ]
    missing = set().union(*(pairs for _, pairs in candidates))
    rows = []
    while missing:
        row, pairs = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        missing -= pairs
        rows.append(row)
    return sorted(rows)


def pairwise(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with every pair of values, or with their product where TEST_ALL is set.

    Args:
        values: the values of each argument of the test; a value may be a `pytest.param`.
    """
    choices = [[_param(value) for value in column] for column in values.values()]
    sizes = [len(column) for column in choices]
    is_whole = bool(os.environ.get(ALL)) or len(sizes) < 3
    rows = product(*map(range, sizes)) if is_whole else covering_rows(sizes)
    return pytest.mark.parametrize(
        tuple(values),
        [_joined([column[i] for column, i in zip(choices, row, strict=True)]) for row in rows],
    )


def _param(value: Any) -> Any:
    return value if isinstance(value, type(pytest.param())) else pytest.param(value)


def _joined(params: Sequence[Any]) -> Any:
    ids = [_id(param) for param in params]
    return pytest.param(
        *(value for param in params for value in param.values),
        marks=[mark for param in params for mark in param.marks],
        id="-".join(ids),
    )


def _id(param: Any) -> str:
    if param.id is not None:
        return str(param.id)
    (value,) = param.values
    return str(getattr(value, "__name__", value)).removeprefix("torch.")
