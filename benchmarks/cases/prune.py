"""The k largest entries of each row: as SparseRows (from_dense), or as a dense tensor (prune_topk).

The peer is torch.topk, for dense output with its values scattered into zeros.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import splade_fast
from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.harness.floors import one_read
from benchmarks.inputs.batches import seeded
from splade_fast import reference


def _ours(x: Tensor, *, k: int, dense: bool) -> Tensor:
    return splade_fast.prune_topk(x, k) if dense else splade_fast.SparseRows.from_dense(x, k).values


def _eager(x: Tensor, *, k: int, dense: bool) -> Tensor:
    return reference.prune_topk(x, k) if dense else reference.prune_rows(x, k, 0.0)[1]


def _topk(x: Tensor, *, k: int, dense: bool) -> Tensor:
    """Find the k largest; for sparse output, making rows of them is not included."""
    values, columns = x.topk(k, dim=1)
    return torch.zeros_like(x).scatter_(1, columns, values) if dense else values


@dataclass(frozen=True, kw_only=True)
class PruneCase(Case):
    op: ClassVar[str] = "prune"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_eager)

    batch: int
    vocab: int
    k: int
    positive: float  # share of positive entries
    dense: bool = False  # output; else sparse rows

    @property
    def shape(self) -> str:
        return f"B{self.batch} V{self.vocab} k{self.k}"

    @property
    def layout(self) -> str:
        return "dense" if self.dense else "rows"

    @property
    def fill(self) -> float:
        return self.positive

    @property
    def targets(self) -> tuple[Target, ...]:
        return (Target("times faster than peer", 5 if self.positive < 1 else 1),)

    def tiny(self) -> "PruneCase":
        return dataclasses.replace(self, batch=3, vocab=500, k=20)

    def peer(self) -> Implementation:
        if self.direction == "forward+backward" and not self.dense:
            raise ImportError("torch.topk of rows with fewer than k entries has another shape")
        return _topk

    def build(self, *, floors: bool = True) -> Workload:
        generator = seeded(self.device)
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        x = torch.rand(self.batch, self.vocab, generator=generator, **options) + 0.01
        if self.positive < 1:
            chance = torch.rand(x.shape, generator=generator, device=self.device)
            x.masked_fill_(chance >= self.positive, 0)
        shape = _ours(x, k=self.k, dense=self.dense).shape
        upstream = torch.randn(shape, generator=generator, **options)
        x.requires_grad_(self.direction == "forward+backward")
        return Workload(
            arguments=(x,),
            options={"k": self.k, "dense": self.dense},
            leaves={"x": x},
            upstream=upstream,
            exact=lambda: self._exact(x, upstream),
            floors=one_read(x.detach()) if floors else {},
        )

    def _exact(self, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        x64 = x.detach().double().requires_grad_(x.requires_grad)
        output = _eager(x64, k=self.k, dense=self.dense)
        if not x.requires_grad:
            return {"output": output}
        output.backward(upstream.double())
        assert x64.grad is not None
        return {"output": output.detach(), "x": x64.grad}


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[PruneCase]:
    found = []
    for dtype in dtypes:
        base = PruneCase(
            direction="forward",
            dtype=dtype,
            device=device,
            batch=64,
            vocab=30522,
            k=256,
            positive=0.02,
        )
        if quick:
            tiny = base.tiny()
            both = [tiny, dataclasses.replace(tiny, direction="forward+backward")]
            return [
                dataclasses.replace(case, dense=dense) for case in both for dense in (False, True)
            ]
        found += [base, dataclasses.replace(base, positive=1.0)]
        if dtype == dtypes[0]:
            wide = dataclasses.replace(base, vocab=250_002)
            found += [wide, dataclasses.replace(wide, positive=1.0)]
            found += [dataclasses.replace(case, dense=True) for case in (base, wide)]
    return found
