"""The negative cache against its slots: a draw from it, and an update of it. All in float32."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases.sample import SampleCase
from benchmarks.cases.score import ScoreCase
from benchmarks.harness.memory import peak_growth
from benchmarks.inputs.inputs import seeded
from benchmarks.studies.scale.findings import EXTRA_MEMORY, Quantity
from benchmarks.studies.scale.work import CaseWork, Rounds, Work, WrongError, mebibytes, timed
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
UPDATE_SPARSE, UPDATE_DENSE = f"update, {_SPARSE}", f"update, dense D{DIMS[-1]}"
CACHE = "cache"

_TOKENS = 128
_SAMPLE = SampleCase(direction="forward", dtype=torch.float32, device="cpu", sparse=True)
_ROWS = ScoreCase(direction="forward", dtype=torch.float32, device="cpu", queries=0, docs=0)


@dataclass(frozen=True)
class UpdateWork(Work):
    """A full cache of token ids and embeddings: some are refreshed, as many new ones come in."""

    slots: int
    dim: int | None  # None: sparse
    batch: int = 64

    def measure(self, rounds: Rounds) -> list[Quantity]:
        _Update(replace(self, slots=4 * self.batch)).step()  # libraries do not count
        update = _Update(self)
        peak = peak_growth(update.step)
        found = [
            timed(update.step, rounds),
            mebibytes(EXTRA_MEMORY, peak),
            mebibytes(CACHE, sum(table.nbytes for table in update.cache.data.tables().values())),
        ]
        if not update.is_right():
            raise WrongError("the refreshed embeddings are not in the cache")
        return found


class _Update:
    """A cache, and what a step puts into it."""

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
        """All slots are valid, the first is the oldest, and all pages of it exist."""
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

    def is_right(self) -> bool:
        found = self.cache.data["embedding"][self._places]
        if isinstance(found, SparseRows):
            return isinstance(self._fresh, SparseRows) and found.equal(self._fresh)
        return isinstance(self._fresh, Tensor) and torch.equal(found, self._fresh)


def of_slots(slots: int) -> dict[str, Work]:
    dense = replace(_SAMPLE, sparse=False, slots=slots)
    found: dict[str, Work] = {f"draw, {_SPARSE}": CaseWork(replace(_SAMPLE, slots=slots))}
    found |= {f"draw, dense D{dim}": CaseWork(replace(dense, depth=dim)) for dim in DIMS}
    return found | {
        UPDATE_SPARSE: UpdateWork(slots, None),
        UPDATE_DENSE: UpdateWork(slots, DIMS[-1]),
    }
