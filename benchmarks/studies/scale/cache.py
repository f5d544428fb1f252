"""The negative cache against its slots: a draw from it, and an update of it. All in float32."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases.sample import SampleCase
from benchmarks.cases.score import ScoreCase
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.results import EXTRA_MEMORY, Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.inputs.batches import seeded
from benchmarks.studies.scale.work import CaseWork, Work, Works, WrongError, measure_time, mebibytes
from splade_fast import SparseRows
from splade_fast.negative_cache import (
    CacheManager,
    FixedLenFeature,
    NegativeCache,
    SparseFeature,
)

SLOTS = (65_536, 131_072, 262_144, 524_288, 1_048_576)
DIMS = (64, 256, 768)
_SPARSE = "sparse k128"
CACHE = "cache"

_TOKENS = 128
_SAMPLE = SampleCase(direction="forward", dtype=torch.float32, device="cpu", sparse=True)
_ROWS = ScoreCase(direction="forward", dtype=torch.float32, device="cpu", queries=0, docs=0)


@dataclass(frozen=True)
class UpdateWork(Work):
    """Update of a full cache: some embeddings are refreshed, as many new items come in."""

    slots: int
    dim: int | None  # None: sparse
    batch: int = 64

    def measure(self, rounds: Rounds) -> list[Measurement]:
        _Update(replace(self, slots=4 * self.batch)).step()  # libraries do not count
        update = _Update(self)
        peak = peak_growth(update.step)
        found = [
            measure_time(update.step, rounds),
            mebibytes(EXTRA_MEMORY, peak),
            mebibytes(CACHE, sum(table.nbytes for table in update.cache.data.tables().values())),
        ]
        if not update.has_fresh_rows():
            raise WrongError("the refreshed embeddings are not in the cache")
        return found


class _Update:
    """A full cache, and the rows that a step puts into it."""

    def __init__(self, work: UpdateWork) -> None:
        self._work = work
        self._manager, self.cache = self._full_cache()
        generator = seeded("cpu")
        half = work.slots // 2  # the oldest are in the first
        self._places = half + torch.randperm(half, generator=generator)[: work.batch]
        self._fresh, new = self._embeddings(0), self._embeddings(1)
        ids = torch.randint(_ROWS.vocab, (work.batch, _TOKENS), generator=generator)
        self._new = {"ids": ids.int(), "embedding": new}

    def _full_cache(self) -> tuple[CacheManager, NegativeCache]:
        """Make a cache with all slots valid, the first the oldest, and all pages in memory."""
        dim, slots = self._work.dim, self._work.slots
        embedding = (
            SparseFeature(_ROWS.vocab, _ROWS.doc_terms)
            if dim is None
            else FixedLenFeature([dim], torch.float32)
        )
        specs = {"ids": FixedLenFeature([_TOKENS], torch.int32), "embedding": embedding}
        manager = CacheManager(specs, slots)
        cache = manager.init_cache()
        for table in cache.data.tables().values():
            table += 0
        cache.valid.fill_(True)
        cache.age += torch.arange(slots, dtype=torch.int32).flip(0)
        return manager, cache

    def _embeddings(self, seed: int) -> Tensor | SparseRows:
        batch, dim = self._work.batch, self._work.dim
        if dim is None:
            return _ROWS.rows(batch, _ROWS.doc_terms, seed)
        return torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed))

    def step(self) -> None:
        self._manager.update_cache(
            self.cache,
            new_items=self._new,
            updated_item_data={"embedding": self._fresh},
            updated_item_indices=self._places,
        )

    def has_fresh_rows(self) -> bool:
        found = self.cache.data["embedding"][self._places]
        if isinstance(found, SparseRows):
            return isinstance(self._fresh, SparseRows) and found.equal(self._fresh)
        return isinstance(self._fresh, Tensor) and torch.equal(found, self._fresh)


def fill_slots(slots: int, folder: Path) -> Works:
    sparse = replace(_SAMPLE, slots=slots)
    dense = [replace(sparse, sparse=False, dim=dim) for dim in DIMS]
    return [
        (f"draw, {_SPARSE}", CaseWork(sparse)),
        *((f"draw, dense D{case.dim}", CaseWork(case)) for case in dense),
        (f"update, {_SPARSE}", UpdateWork(slots, None)),
        (f"update, dense D{DIMS[-1]}", UpdateWork(slots, DIMS[-1])),
    ]
