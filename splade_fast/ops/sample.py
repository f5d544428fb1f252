"""sample: Gumbel-Max draws from given scores, and from a cache without its (B, C) scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from splade_fast import _library, reference
from splade_fast._checks import (
    check_choice,
    check_count,
    check_device,
    check_floating,
    check_tensor,
)
from splade_fast.ops.autograd import accumulation_dtype
from splade_fast.ops.rng import Philox
from splade_fast.ops.score import check_same_space, op_tensors, plain_scores
from splade_fast.ops.sparse_rows import SparseRows

TOP_K_METHODS = {"grouped": 0, "exact": 1}

# What the counter of the noise has room for.
_MAX_SLOTS = 2**34
_MAX_QUERIES = 2**32

_INFINITY = float("inf")


class NegativeSamples(NamedTuple):
    """What `sample_negatives` draws for each of B queries; no gradient."""

    indices: Tensor  # (B, m) int64, rows of the cache in the order of the draw; -1: none left
    scores: Tensor  # (B, m), scaled; -inf where there is no row
    logsumexp: Tensor  # (B,) of the scaled scores of all rows that may be drawn; -inf where none
    perturbed: Tensor  # (B, m), inv_temp * scores + noise, descending


@torch.no_grad()
def gumbel_max(
    scores: Tensor,
    num_samples: int = 1,
    *,
    inv_temp: float = 1.0,
    valid: Tensor | None = None,
    rng: Philox | None = None,
) -> Tensor:
    """indices[b] = the first num_samples of argsort(inv_temp * scores[b] + G[b], descending).

    With G Gumbel noise these are draws without replacement with probabilities
    softmax(inv_temp * scores[b]) (Kool, van Hoof, Welling, ICML 2019). Equal perturbed scores come
    by ascending slot. -inf is never drawn; +inf and, before it, NaN always are.

    Args:
        scores: (B, C), float32, float64, bfloat16 or float16, any strides.
        num_samples: draws of each row, m, at least 1.
        inv_temp: inverse temperature, at least 0; 0 draws uniformly.
        valid: (C,) or (B, C) bool; what is False is never drawn. None: all may be.
        rng: the generator, which goes one step on. None: one that is seeded from torch's default
            generator of the device.

    Returns:
        (B, m) int64; -1 where fewer than m slots can be drawn. No gradient.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype, device or range.
    """
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (queries, slots), got {tuple(scores.shape)}")
    batch, num_slots = scores.shape
    num_samples = _check_draw(num_samples, inv_temp)
    _check_offsets(batch, num_slots, 0, 0)
    if valid is not None:
        per_query = isinstance(valid, Tensor) and valid.ndim == 2
        _check_bool("valid", valid, (batch, num_slots) if per_query else (num_slots,), scores)
    state = _state(rng, scores.device)
    if _library.has_kernels(scores.device):
        indices: Tensor = torch.ops.splade_fast.sample_scores(
            scores, state, num_samples, inv_temp, valid, 0, 0
        )[3]
    else:
        indices = reference.gumbel_max(scores, state, num_samples, inv_temp=inv_temp, valid=valid)
    if rng is not None:
        rng.advance()
    return indices


@torch.no_grad()
def sample_negatives(
    queries: SparseRows | Tensor,
    cache: SparseRows | Tensor,
    *,
    num_samples: int = 1,
    scale: float = 1.0,
    inv_temp: float = 1.0,
    top_k: int | None = None,
    top_k_method: str = "grouped",
    valid: Tensor | None = None,
    exclude: Tensor | None = None,
    rng: Philox | None = None,
    slot_offset: int = 0,
    query_offset: int = 0,
) -> NegativeSamples:
    """Slots c drawn with probability softmax(inv_temp * s)[c], s = scale * queries[b] · cache[c].

    One pass over the cache by tiles: scores, their logsumexp and the draws; (B, C) never exists.
    The noise depends on the seed, the step, the query's and the slot's number alone, so shards of a
    cache draw what the whole would: of their candidates the first by `perturbed` are its draws,
    equal ones by ascending slot. Streaming negatives of Lindgren et al., NeurIPS 2021; draws
    without replacement as Kool, van Hoof, Welling, ICML 2019.

    Slots of score -inf are never drawn; those of +inf and, before them, of NaN always are, the
    lowest first. NaN makes the logsumexp NaN.

    Args:
        queries: (B, D) beside a dense cache; (B, V) or SparseRows beside a sparse one.
        cache: (C, D) or SparseRows of C rows over V columns, on the device of the queries.
        num_samples: draws of each query without replacement, m, at least 1.
        scale: factor of the scores.
        inv_temp: inverse temperature of the draw, at least 0; 0 draws uniformly. It affects neither
            `scores` nor `logsumexp`.
        top_k: count and draw only so many slots of each query, at least 1; None: all.
        top_k_method: "grouped" cuts the C slots into top_k contiguous groups, the first C % top_k
            of them one slot longer, and keeps the highest of each, as the paper's code does;
            "exact" keeps the top_k highest. Equal scores: the lowest slot.
        valid: (C,) bool; what is False is neither counted nor drawn, whatever its row holds.
        exclude: what else a query must not count or draw: (B, E) int64 slots, where those outside
            [0, C), such as -1, are unused; or (B, C) bool.
        rng: the generator, which goes one step on. None: one that is seeded from torch's default
            generator of the device.
        slot_offset: number of the first slot among those of all shards; indices stay local.
        query_offset: number of the first query, likewise.

    Returns:
        NegativeSamples in float32 (float64 where queries or cache are); no gradient.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype, device or range.
        RuntimeError: on the CPU, a length or a used index of sparse rows is out of its range.
    """
    _check_scored(queries, cache)
    batch, num_slots = len(queries), len(cache)
    like = cache if isinstance(cache, Tensor) else cache.values
    num_samples = _check_draw(num_samples, inv_temp)
    if not isinstance(scale, int | float) or not -_INFINITY < scale < _INFINITY:
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if top_k is not None:
        top_k = check_count("top_k", top_k, 1)
    exact = check_choice("top_k_method", top_k_method, TOP_K_METHODS) == TOP_K_METHODS["exact"]
    if valid is not None:
        _check_bool("valid", valid, (num_slots,), like)
    if exclude is not None:
        _check_exclude(exclude, batch, num_slots, like)
    _check_offsets(batch, num_slots, slot_offset, query_offset)
    draw = _Draw(
        num_samples, scale, inv_temp, top_k, exact, valid, exclude, slot_offset, query_offset
    )
    found = _sample(queries, cache, _state(rng, like.device), draw)
    if rng is not None:
        rng.advance()
    return found


@torch.no_grad()
def sample_scores(
    scores: Tensor,
    slots: Tensor | None,
    rng: Philox,
    *,
    num_samples: int = 1,
    inv_temp: float = 1.0,
    slot_offset: int = 0,
    query_offset: int = 0,
) -> NegativeSamples:
    """The draws of `sample_negatives` from scores that are there, in the present step of rng.

    Args:
        scores: (B, N) float32 or float64, -inf where a slot must be neither counted nor drawn.
        slots: (B, N) int64, ascending, whose scores they are; None: those from slot_offset on.
        rng: is not advanced.
        others: as in `sample_negatives`.
    """
    if slots is not None:
        # As many as count, which are few.
        kept = reference.sample_kept(
            scores, slots, rng.state, num_samples, inv_temp=inv_temp, query_offset=query_offset
        )
        return NegativeSamples(*kept)
    if _library.has_kernels(scores.device):
        drawn, perturbed, logsumexp, indices = torch.ops.splade_fast.sample_scores(
            scores, rng.state, num_samples, inv_temp, None, slot_offset, query_offset
        )
        return NegativeSamples(indices, drawn, logsumexp, perturbed)
    return NegativeSamples(
        *reference.sample_negatives(
            scores,
            rng.state,
            num_samples,
            inv_temp=inv_temp,
            slot_offset=slot_offset,
            query_offset=query_offset,
        )
    )


class _Draw(NamedTuple):
    """What the ops take besides scores and state, in their order."""

    num_samples: int
    scale: float
    inv_temp: float
    top_k: int | None
    exact: bool
    valid: Tensor | None
    exclude: Tensor | None
    slot_offset: int
    query_offset: int


def _sample(
    queries: SparseRows | Tensor, cache: SparseRows | Tensor, state: Tensor, draw: _Draw
) -> NegativeSamples:
    if not _library.has_kernels(state.device):
        return _sample_plainly(queries, cache, state, draw)
    if isinstance(cache, SparseRows):
        found = torch.ops.splade_fast.sample_sparse(*op_tensors(queries, cache), state, *draw)
    else:
        found = torch.ops.splade_fast.sample_dense(queries, cache, state, *draw)
    scores, perturbed, logsumexp, indices = found
    return NegativeSamples(indices, scores, logsumexp, perturbed)


def _sample_plainly(
    queries: SparseRows | Tensor, cache: SparseRows | Tensor, state: Tensor, draw: _Draw
) -> NegativeSamples:
    return NegativeSamples(
        *reference.sample_negatives(
            _plain_products(queries, cache) * draw.scale,
            state,
            draw.num_samples,
            inv_temp=draw.inv_temp,
            top_k=draw.top_k,
            top_k_method="exact" if draw.exact else "grouped",
            valid=draw.valid,
            exclude=draw.exclude,
            slot_offset=draw.slot_offset,
            query_offset=draw.query_offset,
        )
    )


def _state(rng: Philox | None, device: torch.device) -> Tensor:
    """(2,) int64: seed and step."""
    if rng is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
    if not isinstance(rng, Philox):
        raise TypeError(f"rng must be a Philox or None, got {type(rng).__name__}")
    if rng.device != device:
        raise ValueError(f"rng must be on the device of the scores, {device}, got {rng.device}")
    return rng.state


def _plain_products(queries: SparseRows | Tensor, cache: SparseRows | Tensor) -> Tensor:
    """(B, C) in the accumulation dtype, where there are no kernels."""
    if isinstance(cache, SparseRows):
        return plain_scores(queries, cache)
    assert isinstance(queries, Tensor)
    acc = accumulation_dtype(torch.promote_types(queries.dtype, cache.dtype))
    with torch.autocast(cache.device.type, enabled=False):
        return queries.to(acc) @ cache.to(acc).t()


def _check_scored(queries: Any, cache: Any) -> None:
    if isinstance(cache, SparseRows):
        check_same_space(queries, cache, docs_name="cache")
        return
    if not isinstance(cache, Tensor):
        raise TypeError(f"cache must be a tensor or SparseRows, got {type(cache).__name__}")
    check_floating("cache", cache)
    if cache.ndim != 2:
        raise ValueError(f"cache must be (slots, depth), got {tuple(cache.shape)}")
    if isinstance(queries, SparseRows):
        raise TypeError("queries must be a tensor beside a dense cache, got SparseRows")
    check_floating("queries", queries)
    if queries.ndim != 2 or queries.shape[1] != cache.shape[1]:
        raise ValueError(
            f"queries must be (queries, {cache.shape[1]}) as the cache is {tuple(cache.shape)}, "
            f"got {tuple(queries.shape)}"
        )
    check_device("queries", queries, "cache", cache)


def _check_draw(num_samples: int, inv_temp: object) -> int:
    """The number of samples."""
    num_samples = check_count("num_samples", num_samples, 1)
    if not isinstance(inv_temp, int | float) or not 0 <= inv_temp < _INFINITY:
        raise ValueError(f"inv_temp must be a finite number of at least 0, got {inv_temp!r}")
    return num_samples


def _check_bool(name: str, mask: object, shape: tuple[int, ...], like: Tensor) -> None:
    check_tensor(name, mask)
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(mask.shape)}")
    check_device(name, mask, "the scores", like)


def _check_exclude(exclude: Tensor, batch: int, num_slots: int, like: Tensor) -> None:
    check_tensor("exclude", exclude)
    if exclude.dtype == torch.bool:
        _check_bool("exclude", exclude, (batch, num_slots), like)
        return
    if exclude.dtype != torch.int64:
        raise TypeError(f"exclude must be int64 slots or bool, got {exclude.dtype}")
    if exclude.ndim != 2 or exclude.shape[0] != batch:
        raise ValueError(
            f"exclude must be (queries, slots to exclude) = ({batch}, any), "
            f"got {tuple(exclude.shape)}"
        )
    check_device("exclude", exclude, "the scores", like)


def _check_offsets(batch: int, num_slots: int, slot_offset: int, query_offset: int) -> None:
    for name, offset, count, limit in (
        ("slot_offset", slot_offset, num_slots, _MAX_SLOTS),
        ("query_offset", query_offset, batch, _MAX_QUERIES),
    ):
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise TypeError(f"{name} must be an integer, got {type(offset).__name__}")
        if offset < 0 or offset + count > limit:
            raise ValueError(f"{name} must be at least 0 and at most {limit - count}, got {offset}")


def _fake_scores(
    scores: Tensor, state: Tensor, num_samples: int, *draw: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_samples(scores, scores.dtype, scores.shape[0], num_samples)


def _fake_dense(
    queries: Tensor, cache: Tensor, state: Tensor, num_samples: int, *draw: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(queries.dtype, cache.dtype)
    return _empty_samples(cache, dtype, queries.shape[0], num_samples)


def _fake_sparse(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_values, doc_values, num_samples = arguments[1], arguments[4], arguments[8]
    dtype = torch.promote_types(query_values.dtype, doc_values.dtype)
    return _empty_samples(doc_values, dtype, query_values.shape[0], num_samples)


def _empty_samples(
    like: Tensor, dtype: torch.dtype, batch: int | torch.SymInt, num_samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(dtype)
    return (
        like.new_empty((batch, num_samples), dtype=acc),
        like.new_empty((batch, num_samples), dtype=acc),
        like.new_empty((batch,), dtype=acc),
        like.new_empty((batch, num_samples), dtype=torch.int64),
    )


if _library.cpu_library_loaded():
    torch.library.register_fake("splade_fast::sample_scores", _fake_scores)
    torch.library.register_fake("splade_fast::sample_dense", _fake_dense)
    torch.library.register_fake("splade_fast::sample_sparse", _fake_sparse)
