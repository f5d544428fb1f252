"""A whole step over a full negative cache: score, draw, gather, embed, refresh, insert.

The document network is an embedding bag, so that the cache takes most of the time. Eager is the
same step in plain PyTorch: scores, softmax and noise in memory, rows assigned one by one. The
interpretable losses of the first step are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.cases.gather import InPlaceCase, assign_rows
from benchmarks.harness.case import Implementation, Target, Workload
from benchmarks.inputs.batches import seeded
from splade_fast.negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    NegativeCache,
    Scale,
)

_SCALE = 20.0
_WORDS = 1000
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class _Inputs:
    handler: CacheLossHandler
    other: NegativeCache  # eager's
    network: nn.EmbeddingBag
    queries: Tensor
    positives: Tensor
    ids: Tensor
    top_k: int | None

    def embed(self, features: Any) -> Tensor:
        embeddings: Tensor = self.network(features["ids"].long())
        return embeddings


def _ours(inputs: _Inputs) -> Tensor:
    result = inputs.handler.step(
        inputs.embed, inputs.queries, inputs.positives, {"ids": inputs.ids}
    )
    return result.interpretable_loss


def _eager(inputs: _Inputs) -> Tensor:
    cache, queries = inputs.other, inputs.queries
    embeddings, ids = cache.data["embedding"], cache.data["ids"]
    assert isinstance(embeddings, Tensor)
    assert isinstance(ids, Tensor)
    scores = _SCALE * (queries @ embeddings.t())
    if inputs.top_k is not None:
        scores, places = scores.view(len(queries), inputs.top_k, -1).max(-1)
        group = torch.arange(inputs.top_k, device=scores.device) * (len(embeddings) // inputs.top_k)
        slots_of = places + group
    noise = -torch.log(-torch.log(torch.rand_like(scores)))
    drawn = (scores + noise).argmax(1, keepdim=True)
    slots = (drawn if inputs.top_k is None else slots_of.gather(1, drawn)).squeeze(1)
    fresh = inputs.embed({"ids": ids[slots]})
    own = _SCALE * (queries * inputs.positives).sum(1)
    log_p = torch.cat([own[:, None], scores], 1).log_softmax(1)[:, 0]
    # The training loss belongs to a step's time and memory, though nothing is trained here.
    (-torch.expm1(log_p) * (_SCALE * (queries * fresh).sum(1) - own)).mean()
    young = torch.full((len(slots), 1), -1, dtype=torch.int32, device=slots.device)
    assign_rows(embeddings, slots, fresh)
    assign_rows(cache.age, slots, young)
    oldest = cache.age.topk(len(queries)).indices
    for table, rows in ((embeddings, inputs.positives), (ids, inputs.ids)):
        assign_rows(table, oldest, rows)
    assign_rows(cache.age, oldest, young)
    cache.age += 1
    return -log_p


@dataclass(frozen=True, kw_only=True)
class CacheStepCase(InPlaceCase):
    op: ClassVar[str] = "negative_cache"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_eager)

    top_k: int | None = None
    queries: int = 64
    slots: int = 131_072
    dim: int = 768
    tokens: int = 32

    @property
    def shape(self) -> str:
        grouped = "" if self.top_k is None else f" top{self.top_k}"
        return f"step B{self.queries} C{self.slots} D{self.dim}{grouped}"

    @property
    def layout(self) -> str:
        return "dense"

    @property
    def targets(self) -> tuple[Target, ...]:
        return (Target("times faster than eager", 1),)

    def tiny(self) -> "CacheStepCase":
        top_k = None if self.top_k is None else 10
        return replace(self, queries=3, slots=200, dim=16, tokens=8, top_k=top_k)

    def build(self, *, floors: bool = True) -> Workload:
        generator = seeded("cpu")
        keys: dict[str, Any] = {"embedding_key": "embedding", "data_keys": ("ids",)}
        specs = {
            "ids": FixedLenFeature([self.tokens], torch.int32),
            "embedding": FixedLenFeature([self.dim], self.dtype),
        }
        network = nn.EmbeddingBag(_WORDS, self.dim).to(self.device, self.dtype)
        network.weight.requires_grad_(False)
        network.weight.copy_(torch.randn(_WORDS, self.dim, generator=generator))
        loss = CacheClassificationLoss(
            **keys, score_transform=Scale(_SCALE), top_k=self.top_k, reducer=None
        )
        handler = CacheLossHandler(CacheManager(specs, self.slots), loss, **keys).to(self.device)
        other = CacheManager(specs, self.slots).init_cache().to(self.device)
        cache = handler.cache
        tables = cache.data.tables()
        for start in range(0, self.slots, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, self.slots - start)
            ids = torch.randint(_WORDS, (count, self.tokens), generator=generator)
            rows = slice(start, start + count)
            tables["ids"][rows] = ids.int().to(self.device)
            tables["embedding"][rows] = network(ids.to(self.device))
        cache.valid.fill_(True)
        cache.age += torch.arange(self.slots, dtype=torch.int32, device=self.device).flip(0)
        other.load_state_dict(cache.state_dict())
        ids = torch.randint(_WORDS, (2, self.queries, self.tokens), generator=generator)
        ids = ids.int().to(self.device)
        queries, positives = network(ids[0].long()), network(ids[1].long())
        inputs = _Inputs(handler, other, network, queries, positives, ids[1], self.top_k)
        embeddings = tables["embedding"]
        products: dict[str, Callable[[], object]] = {
            "queries x cache": lambda: torch.mm(queries, embeddings.t()),
            "cache x queries": lambda: torch.mm(embeddings, queries.t()),
        }
        return Workload(
            arguments=(inputs,),
            options={},
            leaves={},
            upstream=torch.empty(0),
            exact=lambda: {"output": self._exact(queries, positives, embeddings)},
            floors=products if floors else {},
        )

    def _exact(self, queries: Tensor, positives: Tensor, embeddings: Tensor) -> Tensor:
        wide = queries.double()
        parts = embeddings.split(_ROWS_AT_ONCE)
        scores = _SCALE * torch.cat([wide @ part.double().t() for part in parts], dim=1)
        if self.top_k is not None:
            scores = scores.view(len(queries), self.top_k, -1).amax(-1)
        own = _SCALE * (wide * positives.double()).sum(1, keepdim=True)
        return -torch.cat([own, scores], 1).log_softmax(1)[:, 0]


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[CacheStepCase]:
    base = CacheStepCase(direction="forward", dtype=torch.float32, device=device)
    found = [base, replace(base, top_k=64)]
    return [case.tiny() for case in found] if quick else found
