"""Tests of the search for equal rows, against a plain comparison of all entries."""

import pytest
import torch
from torch import Tensor

from splade_fast.negative_cache.matching import matches


def plain(items: dict[str, Tensor], stored: dict[str, Tensor]) -> Tensor:
    return torch.stack(
        [
            (item.flatten(1)[:, None] == stored[name].flatten(1)[None]).all(2)
            for name, item in items.items()
        ]
    ).all(0)


def tables(rows: int, length: int, shared: int) -> dict[str, Tensor]:
    """Return rows that start with the same `shared` entries and come from few distinct rows."""
    ids = torch.randint(0, 2, (rows, length), dtype=torch.int32)
    ids[:, :shared] = 7
    return {"ids": ids, "mask": ids[:, : length // 2] > 0}


@pytest.mark.parametrize("length", [2, 16, 17, 40])
@pytest.mark.parametrize("shared", [0, 16])
@pytest.mark.parametrize(("items", "rows"), [(5, 300), (0, 4), (3, 0), (3, 1)])
def test_equal_rows_match(items, rows, length, shared):
    mine, stored = tables(items, length, shared), tables(rows, length, shared)
    repeated = torch.arange(min(items, rows))
    for name, table in stored.items():
        table[repeated * 2 % max(rows, 1)] = mine[name][repeated]
    found = matches(mine, stored)
    assert found.shape == (items, rows)
    assert torch.equal(found, plain(mine, stored))


def test_rows_that_differ_in_one_late_entry_do_not_match():
    item = torch.randint(0, 1000, (1, 64))
    stored = item.repeat(64, 1)
    stored[torch.arange(64), torch.arange(64)] += 1
    assert not matches({"ids": item}, {"ids": stored}).any()
    assert matches({"ids": item}, {"ids": item.repeat(3, 1)}).all()
