"""gather_rows, scatter_rows_ and the whole update of a negative cache.

The tables are those of a full cache: token ids, their mask, and embeddings. Rows are read and
written at random places. The update refreshes some embeddings and inserts as many new items. Eager
assigns row after row in Python as the known port does: each row is padded to the table's width,
cast, and assigned by an index tensor. "plain rows" is the shortest such loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import splade_fast
from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.inputs.batches import seeded
from splade_fast import reference
from splade_fast.negative_cache import CacheManager, FixedLenFeature, NegativeCache

Action = Literal["read", "write", "update"]


@dataclass(frozen=True)
class _Inputs:
    """Inputs of all contenders, of which each changes its own cache."""

    manager: CacheManager
    caches: Mapping[str, NegativeCache]
    written: Mapping[str, Tensor]  # (1, D) views of a row that is written, by contender
    places: Tensor  # (N,), no duplicates
    fresh: Tensor  # (N, D), for these places
    new: Mapping[str, Tensor]  # N items


def _ours(inputs: _Inputs, action: Action) -> Tensor:
    return _act(
        inputs, action, "ours", splade_fast.gather_rows, splade_fast.scatter_rows_, _update_at_once
    )


def _eager(inputs: _Inputs, action: Action) -> Tensor:
    return _act(
        inputs, action, "eager", reference.gather_rows, reference.scatter_rows_, _update_row_by_row
    )


def _act(
    inputs: _Inputs,
    action: Action,
    contender: str,
    read: Callable[..., dict[str, Tensor]],
    write: Callable[..., None],
    update: Callable[[NegativeCache, _Inputs], None],
) -> Tensor:
    cache = inputs.caches[contender if action != "read" else "ours"]
    if action == "update":  # so short that any other work here would show
        update(cache, inputs)
        return inputs.written[contender]
    tables = cache.data.tables()
    if action == "read":
        return read(tables, inputs.places)["embedding"]
    write(tables, inputs.places, inputs.new)
    return inputs.written[contender]


def _update_at_once(cache: NegativeCache, inputs: _Inputs) -> None:
    inputs.manager.update_cache(
        cache,
        new_items=inputs.new,
        updated_item_data={"embedding": inputs.fresh},
        updated_item_indices=inputs.places,
    )


def _update_row_by_row(cache: NegativeCache, inputs: _Inputs) -> None:
    tables = cache.data.tables()
    youngest = torch.full((len(inputs.places), 1), -1, dtype=torch.int32, device=cache.age.device)
    assign_rows(tables["embedding"], inputs.places, inputs.fresh)
    assign_rows(cache.age, inputs.places, youngest)
    slots = cache.age.topk(len(inputs.places)).indices
    for name, table in tables.items():
        assign_rows(table, slots, inputs.new[name])
    assign_rows(cache.age, slots, youngest)
    cache.age += 1


def _update_by_plain_rows(inputs: _Inputs, action: Action) -> Tensor:
    """Assign rows that already fit, by integers."""
    cache = inputs.caches["plain rows"]
    tables = cache.data.tables()
    for place, row in zip(inputs.places.tolist(), inputs.fresh, strict=True):
        tables["embedding"][place] = row
        cache.age[place] = -1
    slots = cache.age.topk(len(inputs.places)).indices.tolist()
    for name, table in tables.items():
        for slot, row in zip(slots, inputs.new[name], strict=True):
            table[slot] = row
    for slot in slots:
        cache.age[slot] = -1
    cache.age += 1
    return inputs.written["plain rows"]


def assign_rows(table: Tensor, places: Tensor, rows: Tensor) -> None:
    """Assign rows one by one: each padded to the table's width, cast, and assigned by its index."""
    for place, row in zip(places.unsqueeze(1), rows, strict=True):
        missing = (len(table[0]) if table.ndim > 1 else 1) - len(row)
        padded = torch.cat([row, torch.zeros(missing, dtype=row.dtype, device=row.device)])
        table[place] = padded.to(table.dtype)


@dataclass(frozen=True, kw_only=True)
class InPlaceCase(Case):
    """Case in which each contender changes its own tables, which no compiler may trace."""

    @property
    def fill(self) -> float:
        return 1.0

    def implementation(self, contender: str) -> Implementation:
        if contender == "compile":
            raise NotImplementedError("the tables change in place")
        return super().implementation(contender)

    def peer(self) -> Implementation:
        raise ImportError("the known packages are not on the package index")


@dataclass(frozen=True, kw_only=True)
class GatherCase(InPlaceCase):
    op: ClassVar[str] = "gather"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_eager)

    action: Action
    rows: int = 64
    slots: int = 131_072
    dim: int = 768
    tokens: int = 128

    @property
    def shape(self) -> str:
        return f"{self.action} N{self.rows} C{self.slots} D{self.dim} tokens {self.tokens}"

    @property
    def layout(self) -> str:
        return "tables"

    @property
    def targets(self) -> tuple[Target, ...]:
        if self.action == "update":
            return (Target("times faster than eager", 50),)
        return (Target("times faster than eager", 1),)

    def others(self) -> Mapping[str, Callable[[], Implementation]]:
        if self.action != "update":
            return {}
        return {"plain rows": lambda: _update_by_plain_rows}

    def tiny(self) -> "GatherCase":
        return replace(self, rows=5, slots=200, dim=16, tokens=8)

    def build(self, *, floors: bool = True) -> Workload:
        specs = {
            "ids": FixedLenFeature([self.tokens], torch.int32),
            "mask": FixedLenFeature([self.tokens], torch.bool),
            "embedding": FixedLenFeature([self.dim], self.dtype),
        }
        manager = CacheManager(specs, self.slots)
        generator = seeded("cpu")
        # The places that are written are not those of the oldest items.
        places = torch.randperm(self.slots // 2, generator=generator)[: self.rows] + self.slots // 2
        caches = {}
        contenders = {"read": ("ours",), "write": ("ours", "eager")}
        for contender in contenders.get(self.action, ("ours", "eager", "plain rows")):
            cache = manager.init_cache()
            for table in cache.data.tables().values():
                table.fill_(1)  # all pages of it exist
            cache.age += torch.arange(self.slots, dtype=torch.int32).flip(0)
            caches[contender] = cache.to(self.device)
        written = {
            name: cache.data.tables()["embedding"].narrow(0, int(places[0]), 1)
            for name, cache in caches.items()
        }
        fresh = torch.randn(self.rows, self.dim, generator=generator).to(self.dtype)
        new = {
            "ids": torch.randint(30522, (self.rows, self.tokens), generator=generator).int(),
            "mask": torch.rand(self.rows, self.tokens, generator=generator) < 0.7,
            "embedding": fresh if self.action == "write" else fresh.flip(0).contiguous(),
        }
        inputs = _Inputs(
            manager,
            caches,
            written,
            places.to(self.device),
            fresh.to(self.device),
            {name: rows.to(self.device) for name, rows in new.items()},
        )
        expected = torch.ones(self.rows, self.dim) if self.action == "read" else fresh[:1]
        return Workload(
            arguments=(inputs, self.action),
            options={},
            leaves={},
            upstream=torch.empty(0),
            exact=lambda: {"output": expected.double().to(self.device)},
            floors=self._floors(inputs) if floors else {},
        )

    def _floors(self, inputs: _Inputs) -> dict[str, Callable[[], Any]]:
        """Return a copy of as many bytes in one piece."""
        sources = [*inputs.new.values()]
        if self.action == "update":
            sources.append(inputs.fresh)
        targets = [torch.empty_like(rows) for rows in sources]
        return {
            "copy": lambda: [
                target.copy_(rows) for target, rows in zip(targets, sources, strict=True)
            ]
        }


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[GatherCase]:
    kinds: list[tuple[Action, int]] = [
        ("read", 64),
        ("read", 8192),
        ("write", 64),
        ("write", 8192),
        ("update", 64),
    ]
    found = [
        GatherCase(direction="forward", dtype=dtypes[0], device=device, action=action, rows=rows)
        for action, rows in kinds
    ]
    return [case.tiny() for case in found] if quick else found
