"""sample_negatives from a full cache, dense or sparse, beside the formula in plain PyTorch.

The logsumexp is compared, since the draws themselves are random. Dense embeddings are normal with a
scale that gives scores a standard deviation of 3; sparse ones are those of the score cases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import splade_fast
from benchmarks.cases.score import Formats, ScoreCase, embedding_bag_scores, one_read
from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.inputs.batches import seeded
from splade_fast import Philox, SparseRows

_SCORE_DEVIATION = 3.0
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class _Extra:
    """Inputs of only some contenders, made before any timing."""

    rng: Philox
    formats: Formats | None  # sparse rows as embedding_bag takes them


def _ours(
    queries: Any, cache: Any, extra: _Extra, *, top_k: int | None, num_samples: int
) -> Tensor:
    found = splade_fast.sample_negatives(
        queries, cache, num_samples=num_samples, top_k=top_k, rng=extra.rng
    )
    return found.logsumexp


def _eager(
    queries: Any, cache: Any, extra: _Extra, *, top_k: int | None, num_samples: int
) -> Tensor:
    """Write scores, the groups' maxima, noise, argmax and logsumexp to memory one by one."""
    formats = extra.formats
    scores = queries @ cache.t() if formats is None else embedding_bag_scores(formats)
    return _draw(scores, top_k, num_samples)


def _densified(
    queries: SparseRows, cache: SparseRows, extra: _Extra, *, top_k: int | None, num_samples: int
) -> Tensor:
    """Multiply the rows as dense ones, some at a time."""
    dense = queries.to_dense()
    parts = [
        dense @ cache[start : start + _ROWS_AT_ONCE].to_dense().t()
        for start in range(0, len(cache), _ROWS_AT_ONCE)
    ]
    return _draw(torch.cat(parts, dim=1), top_k, num_samples)


def _draw(scores: Tensor, top_k: int | None, num_samples: int) -> Tensor:
    if top_k is not None:
        scores = scores.view(len(scores), top_k, -1).amax(-1)
    noise = torch.empty_like(scores).exponential_().log_().neg_()
    (scores + noise).topk(num_samples, dim=1)
    return scores.logsumexp(1)


@dataclass(frozen=True, kw_only=True)
class SampleCase(Case):
    op: ClassVar[str] = "sample"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_eager)

    sparse: bool
    queries: int = 64
    slots: int = 131_072
    top_k: int | None = None
    num_samples: int = 1
    dim: int = 768  # of dense embeddings
    vocab: int = 30522
    query_terms: int = 30
    doc_terms: int = 128

    @property
    def shape(self) -> str:
        size = f"V{self.vocab} k{self.doc_terms}" if self.sparse else f"D{self.dim}"
        grouped = "" if self.top_k is None else f" top{self.top_k}"
        return f"B{self.queries} C{self.slots} {size}{grouped} m{self.num_samples}"

    @property
    def layout(self) -> str:
        return "sparse" if self.sparse else "dense"

    @property
    def fill(self) -> float:
        return 1.0

    @property
    def targets(self) -> tuple[Target, ...]:
        memory = Target("MiB peak extra memory", 8)
        if self.device != "cpu":
            return (Target("times faster than eager", 1),)
        if self.sparse:
            return (Target("times faster than peer", 10), memory)
        return (Target("times the floor", 1.3), memory)

    def tiny(self) -> "SampleCase":
        top_k = None if self.top_k is None else 10
        return replace(self, queries=3, slots=200, dim=16, vocab=500, doc_terms=20, top_k=top_k)

    def peer(self) -> Implementation:
        if not self.sparse:
            raise ImportError("no library draws from a cache in one pass")
        return _densified

    def build(self, *, floors: bool = True) -> Workload:
        return self._build_sparse() if self.sparse else self._build_dense()

    def _build_sparse(self) -> Workload:
        score = ScoreCase(
            direction="forward",
            dtype=self.dtype,
            device=self.device,
            queries=self.queries,
            docs=self.slots,
            vocab=self.vocab,
        )
        queries = score.rows(self.queries, self.query_terms, 0)
        cache = score.rows(self.slots, self.doc_terms, 1)
        formats = Formats(queries, cache, score)
        return self._workload(
            queries, cache, formats, lambda: score.exact(queries, cache), one_read(cache)
        )

    def _build_dense(self) -> Workload:
        generator = seeded(self.device)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        scale = _SCORE_DEVIATION / self.dim**0.5
        queries = (torch.randn(self.queries, self.dim, **options) * scale).to(self.dtype)
        cache = torch.randn(self.slots, self.dim, **options).to(self.dtype)

        def exact() -> Tensor:
            parts = cache.split(_ROWS_AT_ONCE)
            return torch.cat([queries.double() @ part.double().t() for part in parts], dim=1)

        products: dict[str, Callable[[], object]] = {
            "queries x cache": lambda: torch.mm(queries, cache.t()),
            "cache x queries": lambda: torch.mm(cache, queries.t()),
        }
        return self._workload(queries, cache, None, exact, products)

    def _workload(
        self,
        queries: Any,
        cache: Any,
        formats: Formats | None,
        exact_scores: Callable[[], Tensor],
        floors: dict[str, Callable[[], object]],
    ) -> Workload:
        def exact() -> dict[str, Tensor]:
            scores = exact_scores()
            if self.top_k is not None:
                scores = scores.view(len(scores), self.top_k, -1).amax(-1)
            return {"output": scores.logsumexp(1)}

        return Workload(
            arguments=(queries, cache, _Extra(Philox(0, self.device), formats)),
            options={"top_k": self.top_k, "num_samples": self.num_samples},
            leaves={},
            upstream=torch.empty(0),
            exact=exact,
            floors=floors,
        )


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[SampleCase]:
    found = []
    for dtype in dtypes:
        base = SampleCase(direction="forward", dtype=dtype, device=device, sparse=False)
        found += [base, replace(base, top_k=64), replace(base, sparse=True)]
        if dtype == dtypes[0]:
            found += [replace(base, sparse=True, top_k=64), replace(base, num_samples=8)]
        if device != "cpu":
            found.append(replace(base, queries=1024))
    return [case.tiny() for case in found[:4]] if quick else found
