"""Calls of every public op with drawn arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import splade_fast as sf
from splade_fast.ops.gather import update_cache_
from tests.fuzz.inputs import Draws
from tests.ops.inputs import DTYPES, POOLINGS

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def pool(draws: Draws) -> Call:
    batch, length, vocabulary = draws.integer(0, 4), draws.integer(0, 9), draws.integer(0, 70)
    logits = draws.values((batch, length, vocabulary), draws.dtype(), special=True)
    mask = draws.mask(batch, length) if draws.boolean() else None
    return sf.splade_pool, (logits, mask), draws.pooling()


def _decoder(
    draws: Draws, dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[Tensor, Tensor | None, torch.dtype]:
    vocabulary, depth, dtype = draws.integer(0, 150), draws.integer(0, 40), draws.choice(dtypes)
    weight = draws.values((vocabulary, depth), dtype)
    return weight, draws.values((vocabulary,), dtype) if draws.boolean() else None, dtype


def _sequences(draws: Draws, depth: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    batch, length = draws.integer(0, 5), draws.integer(0, 20)
    if draws.boolean():
        bounds = draws.bounds(batch, length if batch else 0)
        return draws.values((int(bounds[-1]), depth), dtype), {"cu_seqlens": bounds}
    mask = draws.mask(batch, length) if draws.boolean() else None
    return draws.values((batch, length, depth), dtype), {"attention_mask": mask}


ALGORITHMS = ("auto", "dense", "screened")


def head(draws: Draws) -> Call:
    weight, bias, dtype = _decoder(draws)
    hidden, sequences = _sequences(draws, weight.shape[1], dtype)
    options = {**sequences, **draws.pooling(), "algorithm": draws.choice(ALGORITHMS)}
    return sf.splade_head, (hidden, weight, bias), options


def head_topk(draws: Draws) -> Call:
    """Draw exact values: rounding would decide between entries that are equal without it."""
    weight, bias, dtype = _decoder(draws, (torch.float32, torch.float64))
    hidden, sequences = _sequences(draws, weight.shape[1], dtype)
    k = draws.choice((None, 1, 2, 7, 1000, 2**62))
    options = {"pooling": draws.choice(POOLINGS), "activation": "relu", "k": k}
    options = {**sequences, **options, "algorithm": draws.choice(ALGORITHMS)}
    return sf.splade_head_topk, (hidden, weight, bias), options


def prune(draws: Draws) -> Call:
    x = draws.values((draws.integer(0, 5), draws.integer(0, 200)), draws.dtype(), special=True)
    k = draws.choice((None, 1, 3, 64, 2**62))
    if k is not None and draws.boolean():
        return sf.prune_topk, (x, k), {}
    options = {
        "threshold": draws.choice((0.0, 0.5, 1.0)),
        "max_ratio": draws.choice((None, 0.0, 0.5, 1.0)),
        "mass": draws.choice((None, 0.0, 0.5, 1.0)),
    }
    return sf.SparseRows.from_dense, (x, k), options


def to_dense(draws: Draws) -> Call:
    rows = draws.sparse_rows(draws.integer(0, 5), draws.integer(0, 90), draws.dtype())
    return rows.to_dense, (), {}


def _scored(draws: Draws) -> tuple[Any, sf.SparseRows]:
    num_cols = draws.integer(0, 90)
    documents = draws.sparse_rows(draws.integer(0, 30), num_cols, draws.dtype())
    queries = draws.integer(0, 5)
    if draws.boolean():
        return draws.sparse_rows(queries, num_cols, draws.dtype()), documents
    return draws.values((queries, num_cols), draws.dtype()), documents


def scores(draws: Draws) -> Call:
    return sf.sparse_scores, _scored(draws), {}


def search(draws: Draws) -> Call:
    return sf.sparse_search, (*_scored(draws), draws.choice((1, 2, 10, 2**62))), {}


def _masks(draws: Draws, batch: int, slots: int) -> dict[str, Any]:
    kind = draws.choice(("none", "bool", "slots"))
    exclude = None
    if kind == "bool":
        exclude = draws.mask(batch, slots)
    elif kind == "slots":
        shape = (batch, draws.integer(0, 4))
        exclude = torch.randint(-3, slots + 3, shape, generator=draws.generator())
    return {"valid": draws.mask(slots) if draws.boolean() else None, "exclude": exclude}


def sample(draws: Draws) -> Call:
    if draws.boolean():
        queries, cache = _scored(draws)
    else:
        depth = draws.integer(0, 20)
        queries = draws.values((draws.integer(0, 5), depth), draws.dtype())
        cache = draws.values((draws.integer(0, 90), depth), draws.dtype())
    options = {
        "num_samples": draws.choice((1, 2, 5, 100)),
        "scale": draws.choice((1.0, -0.5)),
        "inv_temp": draws.choice((1.0, 0.0, 2.0)),
        "top_k": draws.choice((None, 1, 2, 7, 80, 2**40)),
        "top_k_method": draws.choice(("grouped", "exact")),
        "rng": sf.Philox(draws.integer(0, 2**60), "cpu"),
        **_masks(draws, len(queries), len(cache)),
    }
    return sf.sample_negatives, (queries, cache), options


def gumbel_max(draws: Draws) -> Call:
    batch, slots = draws.integer(0, 5), draws.integer(0, 90)
    given = draws.values((batch, slots), draws.dtype(), special=True)
    valid = None
    if draws.boolean():
        valid = draws.mask(slots) if draws.boolean() else draws.mask(batch, slots)
    rng = sf.Philox(draws.integer(0, 2**60), "cpu")
    return sf.gumbel_max, (given, draws.choice((1, 3, 100))), {"valid": valid, "rng": rng}


_TABLE_DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64)


def _tables(draws: Draws, rows: int) -> dict[str, Tensor]:
    return {
        str(number): torch.randint(
            0, 2, (rows, *draws.choice(((), (0,), (1,), (3,), (5, 2)))), generator=draws.generator()
        ).to(draws.choice(_TABLE_DTYPES))
        for number in range(draws.integer(1, 3))
    }


def _places(draws: Draws, rows: int) -> Tensor:
    count = draws.integer(0, 12) if rows else 0
    return torch.randint(0, max(rows, 1), (count,), generator=draws.generator())


def _rows(draws: Draws, count: int, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draw rows to write to the tables."""
    generator = draws.generator()
    return {
        name: draws.layout(
            torch.randint(0, 2, (count, *table.shape[1:]), generator=generator).to(table.dtype)
        )
        for name, table in tables.items()
    }


def gather(draws: Draws) -> Call:
    rows = draws.integer(0, 20)
    tables = {name: draws.layout(table) for name, table in _tables(draws, rows).items()}
    return sf.gather_rows, (tables, _places(draws, rows)), {}


def scatter(draws: Draws) -> Call:
    tables = _tables(draws, draws.integer(0, 20))
    places = _places(draws, len(tables["0"]))
    rows = _rows(draws, len(places), tables)
    mask = draws.mask(len(places)) if draws.boolean() else None
    return sf.scatter_rows_, (tables, places, rows), {"mask": mask}


def cache_step(draws: Draws) -> Call:
    slots = draws.integer(0, 20)
    tables = _tables(draws, slots)
    age = torch.randint(-1, 5, (slots,), generator=draws.generator()).int()
    options: dict[str, Any] = {"use_lru": draws.boolean()}
    if draws.boolean():
        count = draws.integer(0, slots)
        options["new_rows"] = _rows(draws, count, tables)
        options["new_mask"] = draws.mask(count) if draws.boolean() else None
    if draws.boolean():
        places = _places(draws, slots)
        options["refreshed_rows"] = _rows(draws, len(places), {"0": tables["0"]})
        options["refreshed_slots"] = places
        options["refreshed_mask"] = draws.mask(len(places)) if draws.boolean() else None
    valid = torch.rand(slots, generator=draws.generator()) < 0.5
    return update_cache_, (tables, age, valid), options


CALLS: dict[str, Callable[[Draws], Call]] = {
    function.__name__: function
    for function in (
        pool,
        head,
        head_topk,
        prune,
        to_dense,
        scores,
        search,
        sample,
        gumbel_max,
        gather,
        scatter,
        cache_step,
    )
}
