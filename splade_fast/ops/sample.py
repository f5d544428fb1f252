"""sample: Gumbel-Max draws from given scores, or from a cache whose (B, C) scores never exist."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splade_fast import _library, reference
from splade_fast._checks import (
    check_choice,
    check_count,
    check_device,
    check_floating,
    check_integer,
    check_tensor,
)
from splade_fast.ops.autograd import accumulation_dtype
from splade_fast.ops.rng import Philox
from splade_fast.ops.score import ScoreOperands, check_same_space, plain_scores
from splade_fast.ops.sparse_rows import SparseRows

TOP_K_METHODS = {"grouped": 0, "exact": 1}

# Limits of the counter of the noise.
_MAX_SLOTS = 2**34
_MAX_QUERIES = 2**32

_INFINITY = float("inf")


class NegativeSamples(NamedTuple):
    """Result of `sample_negatives`: m draws for each of B queries, without gradients.

    Args:
        indices: (B, m) int64, rows of the cache in the order of the draws; -1 where none was left.
        scores: (B, m), the scaled scores of the draws; -inf where no row was left.
        logsumexp: (B,), over the scaled scores of all rows that could be drawn; -inf without any.
        perturbed: (B, m), inv_temp * scores + noise, descending.

    Example::

        >>> drawn = sf.sample_negatives(torch.randn(2, 8), torch.randn(5, 8), num_samples=3)
        >>> drawn.indices.shape, drawn.logsumexp.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """

    indices: Tensor
    scores: Tensor
    logsumexp: Tensor
    perturbed: Tensor


@torch.no_grad()
def gumbel_max(
    scores: Tensor,
    num_samples: int = 1,
    *,
    inv_temp: float = 1.0,
    valid: Tensor | None = None,
    rng: Philox | None = None,
) -> Tensor:
    """Draw slots without replacement, slot c with probability softmax(inv_temp * scores[b])[c].

    indices[b] = first num_samples of argsort(inv_temp * scores[b] + G[b], descending)

    G is Gumbel noise (Kool, van Hoof, Welling, ICML 2019). Equal perturbed scores are ordered by
    ascending slot. Slots of score -inf are never drawn. Slots of score NaN are drawn first, then
    those of +inf.

    Args:
        scores: (B, C), float32, float64, bfloat16 or float16, with any strides.
        num_samples: number of draws for each row, m, at least 1.
        inv_temp: inverse temperature, at least 0; 0 draws uniformly.
        valid: (C,) or (B, C) bool; slots with False are never drawn. None: all may be drawn.
        rng: the generator, which advances by one step. None: a generator that is seeded from
            torch's default generator of the device.

    Returns:
        (B, m) int64, without gradient; -1 where fewer than m slots could be drawn.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or is out of
            range.

    Example::

        >>> scores = torch.tensor([[0.0, -torch.inf, 100.0]])
        >>> sf.gumbel_max(scores, num_samples=3, rng=sf.Philox(seed=0))
        tensor([[ 2,  0, -1]])
    """
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (queries, slots), got {tuple(scores.shape)}")
    batch, num_slots = scores.shape
    num_samples, inv_temp = _check_draw(num_samples, inv_temp)
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
    """Draw negatives for each query from a cache, slot c with probability softmax(inv_temp * s)[c].

    s[b, c] = scale * queries[b] · cache[c]

    Scores, their logsumexp and the draws are computed in one pass over the cache; the (B, C)
    scores never exist. The draws are without replacement (Kool, van Hoof, Welling, ICML 2019), for
    the streaming negatives of Lindgren et al. (NeurIPS 2021).

    The noise depends only on seed, step, and the numbers of query and slot. Shards of a cache
    therefore draw as the whole cache does: its draws are the draws of the shards with the largest
    `perturbed`, equal ones by ascending slot.

    Slots of score -inf are never drawn. Slots of score NaN are drawn first, then those of +inf, the
    lowest slot first. NaN makes the logsumexp NaN.

    Args:
        queries: (B, D) with a dense cache; (B, V) or SparseRows with a sparse cache.
        cache: (C, D), or SparseRows of C rows over V columns, on the device of the queries.
        num_samples: number of draws for each query, m, at least 1.
        scale: factor of the scores.
        inv_temp: inverse temperature of the draws, at least 0; 0 draws uniformly. It does not
            change the returned `scores` and `logsumexp`.
        top_k: number of slots that each query keeps, at least 1; all others are masked. None: all
            slots are kept.
        top_k_method: "grouped" splits the C slots into top_k contiguous groups, of which the first
            C % top_k have one slot more, and keeps the highest score of each group, as the paper's
            code does. "exact" keeps the top_k highest scores. Ties go to the lowest slot.
        valid: (C,) bool; slots with False are masked, whatever their row contains. None: all slots
            are valid.
        exclude: slots to mask for each query: (B, E) int64 slots, where those outside [0, C), such
            as -1, have no effect; or a (B, C) bool mask.
        rng: the generator, which advances by one step. None: a generator that is seeded from
            torch's default generator of the device.
        slot_offset: number of the first slot among the slots of all shards. Returned indices are
            those of this shard.
        query_offset: number of the first query among the queries of all shards.

    Returns:
        NegativeSamples in float32 (float64 if queries or cache are float64), without gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or is out of
            range.
        RuntimeError: a length or a used index of sparse rows is out of range (checked on the CPU).

    Example::

        >>> queries, cache = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0], [50.0, 0.0]])
        >>> drawn = sf.sample_negatives(queries, cache, rng=sf.Philox(seed=0))
        >>> drawn.indices, drawn.scores, drawn.logsumexp
        (tensor([[1]]), tensor([[50.]]), tensor([50.]))
    """
    _check_operands(queries, cache)
    batch, num_slots = len(queries), len(cache)
    like = cache if isinstance(cache, Tensor) else cache.values
    num_samples, inv_temp = _check_draw(num_samples, inv_temp)
    if not isinstance(scale, Real) or not -_INFINITY < scale < _INFINITY:
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if top_k is not None:
        top_k = check_count("top_k", top_k, 1)
    exact = check_choice("top_k_method", top_k_method, TOP_K_METHODS) == TOP_K_METHODS["exact"]
    if valid is not None:
        _check_bool("valid", valid, (num_slots,), like)
    if exclude is not None:
        _check_exclude(exclude, batch, num_slots, like)
    slot_offset, query_offset = _check_offsets(batch, num_slots, slot_offset, query_offset)
    draw = _Draw(
        num_samples, float(scale), inv_temp, top_k, exact, valid, exclude, slot_offset, query_offset
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
    """Draw as `sample_negatives` does, from scores that already exist.

    Args:
        scores: (B, N) float32 or float64; -inf masks a slot.
        slots: (B, N) int64, ascending, the slots of the scores. None: slots from slot_offset on.
        rng: the generator, which does not advance.
        num_samples, inv_temp, slot_offset, query_offset: as in `sample_negatives`.
    """
    if slots is not None:
        # Without a kernel: the kept slots are few.
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
    """Arguments of the ops besides operands and state, in the order of the schemas."""

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
        return _sample_without_kernels(queries, cache, state, draw)
    if isinstance(cache, SparseRows):
        found = torch.ops.splade_fast.sample_sparse(
            *ScoreOperands.build(queries, cache), state, *draw
        )
    else:
        found = torch.ops.splade_fast.sample_dense(queries, cache, state, *draw)
    scores, perturbed, logsumexp, indices = found
    return NegativeSamples(indices, scores, logsumexp, perturbed)


def _sample_without_kernels(
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
    """Return seed and step (2,) int64 of a generator, or random ones."""
    if rng is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
    if not isinstance(rng, Philox):
        raise TypeError(f"rng must be a Philox or None, got {type(rng).__name__}")
    if rng.device != device:
        raise ValueError(f"rng must be on the device of the scores, {device}, got {rng.device}")
    return rng.state


def _plain_products(queries: SparseRows | Tensor, cache: SparseRows | Tensor) -> Tensor:
    """Return inner products (B, C) in the accumulation dtype, computed by PyTorch."""
    if isinstance(cache, SparseRows):
        return plain_scores(queries, cache)
    assert isinstance(queries, Tensor)
    acc = accumulation_dtype(torch.promote_types(queries.dtype, cache.dtype))
    with torch.autocast(cache.device.type, enabled=False):
        return queries.to(acc) @ cache.to(acc).t()


def _check_operands(queries: Any, cache: Any) -> None:
    """Raise if queries and cache do not go together."""
    if isinstance(cache, SparseRows):
        check_same_space(queries, cache, docs_name="cache")
        return
    if not isinstance(cache, Tensor):
        raise TypeError(f"cache must be a tensor or SparseRows, got {type(cache).__name__}")
    check_floating("cache", cache)
    if cache.ndim != 2:
        raise ValueError(f"cache must be (slots, depth), got {tuple(cache.shape)}")
    if isinstance(queries, SparseRows):
        raise TypeError("queries must be a tensor with a dense cache, got SparseRows")
    check_floating("queries", queries)
    if queries.ndim != 2 or queries.shape[1] != cache.shape[1]:
        raise ValueError(
            f"queries must be (queries, {cache.shape[1]}) as the cache is {tuple(cache.shape)}, "
            f"got {tuple(queries.shape)}"
        )
    check_device("queries", queries, "cache", cache)


def _check_draw(num_samples: int, inv_temp: object) -> tuple[int, float]:
    """Return both as int and float. Raise if one is out of range."""
    num_samples = check_count("num_samples", num_samples, 1)
    if not isinstance(inv_temp, Real) or not 0 <= float(inv_temp) < _INFINITY:
        raise ValueError(f"inv_temp must be a finite number of at least 0, got {inv_temp!r}")
    return num_samples, float(inv_temp)


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


def _check_offsets(
    batch: int, num_slots: int, slot_offset: int, query_offset: int
) -> tuple[int, int]:
    """Return both as ints. Raise if one is out of range."""
    slot_offset = check_integer("slot_offset", slot_offset)
    query_offset = check_integer("query_offset", query_offset)
    for name, offset, count, limit in (
        ("slot_offset", slot_offset, num_slots, _MAX_SLOTS),
        ("query_offset", query_offset, batch, _MAX_QUERIES),
    ):
        if offset < 0 or offset + count > limit:
            raise ValueError(f"{name} must be at least 0 and at most {limit - count}, got {offset}")
    return slot_offset, query_offset


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
    num_operands = len(ScoreOperands._fields)
    operands = ScoreOperands(*arguments[:num_operands])
    draw = _Draw(*arguments[num_operands + 1 :])  # the state comes between them
    batch = operands.query_values.shape[0]
    return _empty_samples(operands.doc_values, operands.dtype, batch, draw.num_samples)


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


if _library.is_cpu_library_loaded():
    torch.library.register_fake("splade_fast::sample_scores", _fake_scores)
    torch.library.register_fake("splade_fast::sample_dense", _fake_dense)
    torch.library.register_fake("splade_fast::sample_sparse", _fake_sparse)
