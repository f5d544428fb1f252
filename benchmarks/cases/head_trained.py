"""splade_head and splade_head_topk on a trained checkpoint and real texts: few entries are active.

The synthetic cases of `head` have 5 % or all of the entries active, a trained SPLADE model 0.5 %,
which makes the screened product fast. "dense" is ours without it. A training step changes the
weight, so that each forward+backward of ours prepares it again.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import splade_fast
from benchmarks.cases.head import HeadCase
from benchmarks.harness.case import Implementation, Target, Workload
from benchmarks.inputs.peer import PeerHead
from benchmarks.inputs.trained_states import ACTIVE, TrainedInputs, trained_inputs
from splade_fast import SparseRows, reference


class _TrainingWorkload(Workload):
    def clear_gradients(self) -> None:
        super().clear_gradients()
        with torch.no_grad():
            self.leaves["weight"][:0].zero_()  # counts as a change, as an optimiser's step does


@dataclass(frozen=True, kw_only=True)
class TrainedHeadCase(HeadCase):
    batch: int = 32
    length: int = 256
    dim: int = 128
    vocab: int = 30522
    real: bool = True

    @property
    def targets(self) -> tuple[Target, ...]:
        memory = Target("MiB peak extra memory", 64)
        if self.direction == "forward+backward":
            return (Target("times faster than eager", 20), memory)
        # The bare product of bfloat16 is no floor of float32.
        return (Target("times the floor", 0.35), memory) if self._is_float32 else (memory,)

    @property
    def layout(self) -> str:
        return "real texts" if self.real else super().layout

    @property
    def _is_float32(self) -> bool:
        return self.dtype == torch.float32

    def tiny(self) -> "TrainedHeadCase":
        return dataclasses.replace(self, batch=3, length=16, dim=32, vocab=500, real=False)

    def lengths(self) -> Tensor:
        return _states(self.dim).mask.sum(1) if self.real else super().lengths()

    def others(self) -> Mapping[str, Callable[[], Implementation]]:
        return {"dense": lambda: partial(splade_fast.splade_head, algorithm="dense")}

    def build(self, *, floors: bool = True) -> Workload:
        workload = super().build(floors=floors)
        if self.direction == "forward":
            return workload
        return _TrainingWorkload(**vars(workload))

    def _inputs(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.real:
            return super()._inputs(generator)
        states = _states(self.dim)
        hidden, weight, bias = (
            tensor.to(self.device, self.dtype, copy=True)
            for tensor in (states.hidden, states.weight, states.bias)
        )
        return hidden, weight, bias, states.mask.to(self.device)


@dataclass(frozen=True, kw_only=True)
class HopperScreenedHeadCase(TrainedHeadCase):
    """Screened head on a GPU, where "auto" is dense; SPLADE_FAST_HOPPER=1 enables its kernels."""

    ours: ClassVar[Implementation] = staticmethod(
        partial(splade_fast.splade_head, algorithm="screened")
    )

    dim: int = 768

    @property
    def targets(self) -> tuple[Target, ...]:
        return (Target("times the floor", 0.65),)


@functools.cache
def _states(dim: int) -> TrainedInputs:
    return trained_inputs(dim)


def _ours_topk(*arguments: Tensor, k: int) -> Tensor:
    return _sorted_values(splade_fast.splade_head_topk(*arguments, k=k), k)


def _dense_topk(*arguments: Tensor, k: int) -> Tensor:
    pooled = splade_fast.splade_head(*arguments, algorithm="dense")
    return _sorted_values(SparseRows.from_dense(pooled, k), k)


def _sorted_values(rows: SparseRows, k: int) -> Tensor:
    padded = torch.nn.functional.pad(rows.values, (0, k - rows.width))
    return padded.sort(dim=1, descending=True)[0]


def _largest_of(head: Implementation) -> Implementation:
    def largest(*arguments: Tensor, k: int) -> Tensor:
        return head(*arguments).topk(k, dim=1)[0]

    return largest


@dataclass(frozen=True, kw_only=True)
class TrainedTopkCase(TrainedHeadCase):
    """Case that compares the values alone, largest first; "active" is the share of k values."""

    op: ClassVar[str] = "head_topk"
    ours: ClassVar[Implementation] = staticmethod(_ours_topk)
    eager: ClassVar[Implementation] = staticmethod(_largest_of(reference.splade_head))

    k: int = 256

    @property
    def shape(self) -> str:
        return f"{super().shape} k{self.k}"

    def tiny(self) -> "TrainedTopkCase":
        return dataclasses.replace(self, batch=3, length=16, dim=32, vocab=500, k=20, real=False)

    def peer(self) -> Implementation:
        return _largest_of(PeerHead(self.direction))

    def others(self) -> Mapping[str, Callable[[], Implementation]]:
        return {"dense": lambda: _dense_topk}

    def build(self, *, floors: bool = True) -> Workload:
        return dataclasses.replace(super().build(floors=floors), options={"k": self.k})

    def _exact(self, *arguments: Any) -> dict[str, Tensor]:
        return {"output": super()._exact(*arguments)["output"].topk(self.k, dim=1)[0]}


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[TrainedHeadCase]:
    forward, *others = (
        TrainedHeadCase(direction="forward", dtype=dtype, device=device) for dtype in dtypes
    )
    found = [
        forward,
        TrainedTopkCase(direction="forward", dtype=forward.dtype, device=device),
        dataclasses.replace(forward, direction="forward+backward"),
        *others,
    ]
    if quick:
        return [case.tiny() for case in found[:3]]
    if device == "cuda" and os.environ.get("SPLADE_FAST_HOPPER") == "1":
        for dtype in dtypes:
            if dtype in (torch.bfloat16, torch.float16):
                on_hopper = HopperScreenedHeadCase(direction="forward", dtype=dtype, device=device)
                made_up = dataclasses.replace(on_hopper, real=False, active=ACTIVE)
                found += [on_hopper, made_up]
    return found
