"""The head against V, and the head and the pool against L: forward and backward, float32."""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases.head import HeadCase
from benchmarks.cases.pool import PoolCase
from benchmarks.harness.case import Direction
from benchmarks.studies.scale.work import CaseWork, Works

VOCABULARIES = (15_625, 31_250, 62_500, 125_001, 250_002)
LENGTHS = (512, 1024, 2048, 4096, 8192)

_BACKWARD: Direction = "forward+backward"
_HEAD = HeadCase(
    direction=_BACKWARD,
    dtype=torch.float32,
    device="cpu",
    batch=4,
    length=128,
    dim=384,  # that of small multilingual models
    vocab=30_522,
)
# Logits are an input of the pool and as large as L · V: a smaller V leaves room for them.
_POOL = PoolCase(
    direction=_BACKWARD,
    dtype=torch.float32,
    device="cpu",
    batch=1,
    length=128,
    vocab=8192,
    mean_fill=1.0,
)


def grow_vocabulary(vocab: int, folder: Path) -> Works:
    return _beside_eager("head", replace(_HEAD, vocab=vocab))


def grow_length(length: int, folder: Path) -> Works:
    """Make one whole text: only its tokens grow with L."""
    head = replace(_HEAD, batch=1, length=length, mean_fill=1.0)
    pool = replace(_POOL, length=length)
    return _beside_eager("head", head) + _beside_eager("pool", pool)


def _beside_eager(name: str, case: HeadCase | PoolCase) -> Works:
    return [(name, CaseWork(case)), (name, CaseWork(case, "eager"))]
