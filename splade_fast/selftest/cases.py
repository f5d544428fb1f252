"""Cases of the self-test: an op, its inputs, and the same function in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splade_fast import ops, reference
from splade_fast.ops.gather import update_cache_
from splade_fast.reference.score import sparse_scores, sparse_search

_BATCH, _LENGTH, _DIM, _VOCABULARY = 8, 32, 256, 4096
_QUERIES, _DOCUMENTS = 16, 1024
_SLOTS, _ROWS = 1024, 64
_KEPT = 64

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype on one device."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(self.dtype)

    def lattice(self, *shape: int) -> Tensor:
        """Return multiples of 1/2 up to 3/2, whose products and sums are exact in every dtype."""
        x = torch.randint(-3, 4, shape, generator=self.generator, device=self.device) / 2
        return x.to(self.dtype)

    def sparse(self, *shape: int) -> Tensor:
        """Return rows on the lattice, of which 1 in 64 entries is not 0."""
        chance = torch.rand(shape, generator=self.generator, device=self.device)
        return self.lattice(*shape).abs().masked_fill(chance > 1 / 64, 0)

    def integers(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op, compared with the same function in plain PyTorch.

    Args:
        op: name of the op.
        make: function that draws the inputs.
        ours: the op on the inputs; all results as one tensor.
        plain: the same in plain PyTorch.
        is_exact: whether the results are equal to the bit; otherwise they differ by rounding.
    """

    op: str
    make: Callable[[Draw], Tensors]
    ours: Function
    plain: Function
    is_exact: bool = False


def all_cases() -> Iterator[Case]:
    """Yield the cases of all ops."""
    for pooling in ("max", "sum"):
        options = {"pooling": pooling}
        yield _differentiable(
            f"splade_pool {pooling}", _pool_inputs, ops.splade_pool, reference.splade_pool, options
        )
        yield _differentiable(
            f"splade_head {pooling}", _head_inputs, ops.splade_head, reference.splade_head, options
        )
    yield _differentiable(
        "splade_head packed", _packed_head_inputs, ops.splade_head, reference.splade_head, {}
    )
    yield Case(
        "splade_head screened",
        _head_inputs,
        lambda x: _head(x, algorithm="screened"),
        lambda x: reference.splade_head(*_head_arguments(x)),
    )
    yield Case(
        "splade_head_topk",
        _head_inputs,
        lambda x: ops.splade_head_topk(*_head_arguments(x), k=_KEPT).to_dense(),
        lambda x: reference.prune_topk(_head(x), _KEPT),
        is_exact=True,
    )
    yield Case(
        "prune_topk",
        lambda draw: {"x": draw.normal(_QUERIES, _VOCABULARY)},
        lambda x: ops.prune_topk(x["x"], _KEPT),
        lambda x: reference.prune_topk(x["x"], _KEPT),
        is_exact=True,
    )
    yield Case(
        "SparseRows.from_dense",
        lambda draw: {"x": draw.normal(_QUERIES, _VOCABULARY)},
        lambda x: _joined(*_parts(ops.SparseRows.from_dense(x["x"], _KEPT))),
        lambda x: _joined(*reference.prune_rows(x["x"], _KEPT, 0.0)),
        is_exact=True,
    )
    yield Case(
        "sparse_scores",
        _score_inputs,
        lambda x: ops.sparse_scores(*_sparse_rows(x)),
        lambda x: sparse_scores(x["queries"], *_documents(x)),
    )
    yield Case(
        "sparse_search",
        _score_inputs,
        lambda x: _joined(*ops.sparse_search(*_sparse_rows(x), 10)),
        lambda x: _joined(*sparse_search(x["queries"], *_documents(x), 10)),
        is_exact=True,
    )
    yield from _sampling_cases()
    yield from _table_cases()


def _differentiable(
    name: str,
    make: Callable[[Draw], Tensors],
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    options: dict[str, Any],
) -> Case:
    return Case(
        name,
        make,
        partial(_value_and_gradients, partial(ours, **options)),
        partial(_value_and_gradients, partial(plain, **options)),
    )


def _value_and_gradients(function: Callable[..., Tensor], inputs: Tensors) -> Tensor:
    """Return the result and its gradients with respect to all inputs of its dtype."""
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    result = function(**leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    # Another factor for each entry, so that a gradient at a wrong place shows.
    factor = torch.arange(result.numel(), device=result.device).view_as(result) % 7 + 1
    gradients = torch.autograd.grad((result * factor.to(result.dtype)).sum(), wanted)
    return _joined(result.detach(), *gradients)


def _joined(*parts: Tensor) -> Tensor:
    """Return all parts as one vector, in the widest dtype."""
    dtype = torch.float64 if any(part.dtype == torch.int64 for part in parts) else parts[0].dtype
    return torch.cat([part.flatten().to(dtype) for part in parts])


# The head ---------------------------------------------------------------------------------------


def _attention_mask(draw: Draw) -> Tensor:
    """Return a mask (B, L) of right-padded rows with at least one token."""
    lengths = 1 + draw.integers(_LENGTH, _BATCH, 1)
    return torch.arange(_LENGTH, device=draw.device) < lengths


def _pool_inputs(draw: Draw) -> Tensors:
    logits = draw.normal(_BATCH, _LENGTH, _VOCABULARY)
    return {"logits": logits, "attention_mask": _attention_mask(draw)}


def _head_inputs(draw: Draw) -> Tensors:
    return {
        "hidden": draw.lattice(_BATCH, _LENGTH, _DIM),
        "weight": draw.lattice(_VOCABULARY, _DIM),
        "bias": draw.lattice(_VOCABULARY),
        "attention_mask": _attention_mask(draw),
    }


def _head_arguments(inputs: Tensors) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in ("hidden", "weight", "bias", "attention_mask"))


def _head(inputs: Tensors, algorithm: str = "auto") -> Tensor:
    return ops.splade_head(*_head_arguments(inputs), algorithm=algorithm)


def _packed_head_inputs(draw: Draw) -> Tensors:
    padded = _head_inputs(draw)
    mask = padded.pop("attention_mask")
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return padded | {"hidden": padded["hidden"][mask], "cu_seqlens": starts.int()}


# Sparse rows ------------------------------------------------------------------------------------


def _parts(rows: ops.SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.indices, rows.values, rows.lengths


def _score_inputs(draw: Draw) -> Tensors:
    queries, documents = (draw.sparse(count, _VOCABULARY) for count in (_QUERIES, _DOCUMENTS))
    rows = ops.SparseRows.from_dense(documents.cpu())
    names = ("indices", "values", "lengths")
    return {"queries": queries} | {
        name: part.to(draw.device) for name, part in zip(names, _parts(rows), strict=True)
    }


def _documents(inputs: Tensors) -> tuple[Tensor, Tensor]:
    used = torch.arange(inputs["indices"].shape[1], device=inputs["indices"].device)
    is_used = used < inputs["lengths"][:, None]
    return inputs["indices"].masked_fill(~is_used, -1), inputs["values"]


def _sparse_rows(inputs: Tensors) -> tuple[ops.SparseRows, ops.SparseRows]:
    documents = ops.SparseRows(inputs["indices"], inputs["values"], inputs["lengths"], _VOCABULARY)
    return ops.SparseRows.from_dense(inputs["queries"]), documents


# Draws ------------------------------------------------------------------------------------------


def _sample_inputs(draw: Draw) -> Tensors:
    return {"queries": draw.lattice(_QUERIES, _DIM), "cache": draw.lattice(_SLOTS, _DIM)}


def _sampling_cases() -> Iterator[Case]:
    choices: dict[str, dict[str, Any]] = {
        "sample_negatives": {},
        "sample_negatives top_k": {"top_k": 32},
        "sample_negatives exact top_k": {"top_k": 32, "top_k_method": "exact"},
    }
    for name, options in choices.items():
        yield Case(
            name, _sample_inputs, partial(_draws, options), partial(_plain_draws, options), True
        )
    yield Case(
        "sample_negatives logsumexp",
        _sample_inputs,
        lambda x: _samples(x, {}).logsumexp,
        lambda x: _plain_samples(x, {})[2],
    )
    yield Case(
        "gumbel_max",
        lambda draw: {"scores": draw.lattice(_QUERIES, _SLOTS)},
        lambda x: ops.gumbel_max(x["scores"], 4, rng=_generator(x["scores"])),
        lambda x: reference.gumbel_max(x["scores"], _generator(x["scores"]).state, 4),
        is_exact=True,
    )


def _generator(like: Tensor) -> ops.Philox:
    return ops.Philox(7, like.device)


def _samples(inputs: Tensors, options: dict[str, Any]) -> ops.NegativeSamples:
    rng = _generator(inputs["cache"])
    return ops.sample_negatives(
        inputs["queries"], inputs["cache"], num_samples=4, rng=rng, **options
    )


def _draws(options: dict[str, Any], inputs: Tensors) -> Tensor:
    return _samples(inputs, options).indices


def _plain_draws(options: dict[str, Any], inputs: Tensors) -> Tensor:
    return _plain_samples(inputs, options)[0]


def _plain_samples(
    inputs: Tensors, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, cache = inputs["queries"], inputs["cache"]
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ cache.to(wide).t()
    return reference.sample_negatives(scores, _generator(cache).state, 4, **options)


# Tables -----------------------------------------------------------------------------------------


def _table_inputs(draw: Draw) -> Tensors:
    return {
        "embedding": draw.normal(_SLOTS, _DIM),
        "ids": draw.integers(_VOCABULARY, _SLOTS, 32),
        "slots": torch.randperm(_SLOTS, generator=draw.generator, device=draw.device)[:_ROWS],
        "rows": draw.normal(_ROWS, _DIM),
        "new_ids": draw.integers(_VOCABULARY, _ROWS, 32),
        "age": draw.integers(1000, _SLOTS).int(),
    }


def _table_cases() -> Iterator[Case]:
    yield _table_case("gather_rows", _gather, ops.gather_rows, reference.gather_rows)
    yield _table_case("scatter_rows_", _scatter, ops.scatter_rows_, reference.scatter_rows_)
    yield _table_case("update_cache_", _update, update_cache_, reference.update_cache_)


def _table_case(
    name: str,
    act: Callable[[Callable[..., Any], Tensors], Tensor],
    ours: Callable[..., Any],
    plain: Callable[..., Any],
) -> Case:
    return Case(name, _table_inputs, partial(act, ours), partial(act, plain), is_exact=True)


def _tables(inputs: Tensors) -> Tensors:
    return {name: inputs[name].clone() for name in ("embedding", "ids")}


def _gather(function: Callable[..., Any], inputs: Tensors) -> Tensor:
    tables = {name: inputs[name] for name in ("embedding", "ids")}
    return _joined(*function(tables, inputs["slots"]).values())


def _scatter(function: Callable[..., Any], inputs: Tensors) -> Tensor:
    tables = _tables(inputs)
    function(tables, inputs["slots"], {"embedding": inputs["rows"], "ids": inputs["new_ids"]})
    return _joined(*tables.values())


def _update(function: Callable[..., Any], inputs: Tensors) -> Tensor:
    tables, age = _tables(inputs), inputs["age"].clone()
    valid = torch.ones_like(age, dtype=torch.bool)
    function(
        tables,
        age,
        valid,
        new_rows={"embedding": inputs["rows"], "ids": inputs["new_ids"]},
        refreshed_rows={"embedding": -inputs["rows"]},
        refreshed_slots=inputs["slots"],
    )
    return _joined(*tables.values(), age)
