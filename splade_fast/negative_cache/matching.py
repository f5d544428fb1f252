"""Comparison of items with the slots of a cache, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from splade_fast.negative_cache.features import Tables

_ROWS_AT_ONCE = 8192
# The first 16 tokens of most texts differ, and 16 token ids fill one cache line.
_FIRST_ENTRIES = 16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def matches(items: Tables, stored: Tables) -> Tensor:
    """Return (N, C) bool, True where item n and row c are equal in all tables.

    Items of a single number, such as an id, are compared directly. Longer items are compared in
    three steps: 64-bit fingerprints of the first entries, then fingerprints of whole rows where the
    first agree, then all entries where both agree. These steps synchronise with a GPU.

    Args:
        items: tables (N, ...) by name, in the form that the cache stores.
        stored: tables (C, ...) of the cache by the same names.
    """
    if sum(table[0].numel() if len(table) else 1 for table in items.values()) == 1:
        (name,) = items
        mine, theirs = _integers(items[name]), _integers(stored[name]).to(items[name].device)
        return mine == theirs.t()
    device = next(iter(items.values())).device
    first = [_fingerprints(_first_entries(tables), device) for tables in (items, stored)]
    near = torch.isin(first[1], first[0]).nonzero().squeeze(1)
    candidates = {name: table[near.to(table.device)] for name, table in stored.items()}
    agree = _fingerprints(items, device)[:, None] == _fingerprints(candidates, device)
    n, c = agree.nonzero(as_tuple=True)
    equal_mask = torch.ones_like(n, dtype=torch.bool)
    for name, table in items.items():
        theirs = _integers(candidates[name])[c.to(candidates[name].device)].to(device)
        equal_mask &= (_integers(table)[n] == theirs).all(1)
    match_mask = torch.zeros(len(agree), len(first[1]), dtype=torch.bool, device=device)
    return match_mask.index_put((n, near[c]), equal_mask)


def matches_any(groups: Sequence[Iterable[str]], items: Tables, stored: Tables) -> Tensor:
    """Return (N, C) bool, True where item n and row c are equal in all tables of a group.

    Args:
        groups: names of tables, at least one group.
        items, stored: as in `matches`.
    """
    masks = [
        matches({name: items[name] for name in group}, {name: stored[name] for name in group})
        for group in groups
    ]
    return torch.stack(masks).any(0)


def _first_entries(tables: Tables) -> Tables:
    return {name: _integers(table)[:, :_FIRST_ENTRIES] for name, table in tables.items()}


def _integers(table: Tensor) -> Tensor:
    """View a table as integers, (N, entries)."""
    return table.reshape(len(table), prod(table.shape[1:])).view(_INTEGERS[table.element_size()])


def _fingerprints(tables: Tables, device: torch.device) -> Tensor:
    """Return a random linear combination of the entries of each row modulo 2^64, (N,) int64."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for table in tables.values():
        entries = _integers(table)
        factors = torch.randint(-(2**63), 2**63 - 1, (entries.shape[1],), generator=generator)
        factors = factors.to(device)
        parts = [(part.to(device).long() * factors).sum(1) for part in entries.split(_ROWS_AT_ONCE)]
        total = total + torch.cat(parts)
    return total
