"""sample in plain PyTorch: Gumbel-Max draws from counter-based noise, with all (B, C) scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Domains of the counter: words of the noise, words that refine its tail, seeds of other streams.
NOISE, REFINEMENT, FORK = 0, 1, 2

_LOW = 0xFFFFFFFF
_SQRT_HALF_BITS = 0x3F3504F3


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> list[Tensor]:
    """Return one block of Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011).

    Args:
        counter: four words in [0, 2^32), int64 tensors of shapes that broadcast, or integers.
        key: two words, likewise. At least one of the six words is a tensor.

    Returns:
        Four words in [0, 2^32), int64 tensors of the common shape.
    """
    device = next(word.device for word in (*counter, *key) if isinstance(word, Tensor))
    x0, x1, x2, x3 = (torch.as_tensor(word, device=device) for word in counter)
    k0, k1 = (torch.as_tensor(word, device=device) for word in key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            (product1 >> 32 & _LOW) ^ x1 ^ k0,
            product1 & _LOW,
            (product0 >> 32 & _LOW) ^ x3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return [x0, x1, x2, x3]


def philox_block(
    state: Tensor, blocks: Tensor | int, queries: Tensor | int, domain: int
) -> list[Tensor]:
    """Return the words of slots 4 * blocks to 4 * blocks + 3 for seed and step in state (2,)."""
    seed, step = state.unbind()
    counter = (blocks, queries, step & _LOW, (step >> 32 & 0x3FFFFFFF) | domain << 30)
    return philox4x32(counter, (seed & _LOW, seed >> 32 & _LOW))


def gumbel_noise(
    state: Tensor, num_queries: int, num_slots: int, *, query_offset: int = 0, slot_offset: int = 0
) -> Tensor:
    """Return G[q, c] = -log(-log1p(-e)) for uniform e, a function of seed, step, q and c alone.

    e = (w + ½) / 2^32 for a word w. Where w < 2^16, in the tail of large G, a second word w'
    refines it: e = (w 2^32 + w' + ½) / 2^64.

    Args:
        state: (2,) int64, seed and step.

    Returns:
        (num_queries, num_slots) float32, with the same bits on every device. The error is at most
        2.3 ulp where |G| >= 1, and at most 3.6 * 2^-24 elsewhere.
    """
    device = state.device
    queries = torch.arange(query_offset, query_offset + num_queries, device=device).unsqueeze(1)
    first = slot_offset >> 2
    blocks = torch.arange(first, (slot_offset + num_slots + 3 >> 2), device=device)
    skipped = slot_offset - 4 * first
    words, refinements = (
        torch.stack(philox_block(state, blocks, queries, domain), -1).flatten(-2)[
            :, skipped : skipped + num_slots
        ]
        for domain in (NOISE, REFINEMENT)
    )
    return noise_from_words(words, refinements)


def noise_from_words(words: Tensor, refinements: Tensor) -> Tensor:
    """Return the noise for words, int64 in [0, 2^32). Each float32 operation rounds separately."""
    odd = 2 * words + 1
    refined = (2 * (words << 32 | refinements) + 1).float() * 2.0**-65
    e = torch.where(words < 1 << 16, refined, odd.float() * 2.0**-33)
    small = words < 1 << 30
    # -log1p(-e), computed from 1 - e where that is not close to 1.
    f, k = _split(((1 << 33) - odd).float() * 2.0**-33)
    exponential = -_log(torch.where(small, -e, f), torch.where(small, 0, k))
    return -_log(*_split(exponential))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and k with x = 2^k (1 + f) and 1 + f between sqrt(1/2) and sqrt(2)."""
    shifted = x.view(torch.int32) + (0x3F800000 - _SQRT_HALF_BITS)
    k = (shifted >> 23) - 127
    return ((shifted & 0x007FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1, k.float()


def _log(f: Tensor, k: Tensor) -> Tensor:
    """Return log(2^k (1 + f)), with log(1 + f) = 2 atanh(f / (2 + f)) as a series to 9th order."""
    s = f / (2 + f)
    z = s * s
    series = z * (_F32[3] + z * (_F32[5] + z * (_F32[7] + z * _F32[9])))
    rest = 2 * s * series + k * _LN2_LOW
    return k * _LN2_HIGH + (f - (s * f - rest))


# 1 / n rounded to float32, and log(2) in two parts, such that k * high is exact.
_F32 = {n: torch.tensor(1 / n, dtype=torch.float32).item() for n in (3, 5, 7, 9)}
_LN2_HIGH = float.fromhex("0x1.62e4p-1")
_LN2_LOW = float.fromhex("0x1.7f7d1cp-20")


def gumbel_max(
    scores: Tensor,
    state: Tensor,
    num_samples: int = 1,
    *,
    inv_temp: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Compute `splade_fast.gumbel_max` from the state (2,) int64 of a generator."""
    masked = _mask(scores.to(_accumulation_dtype(scores.dtype)), valid, None)
    noise = gumbel_noise(state, *masked.shape)
    return _draw(masked, _all_slots(masked), noise, num_samples, inv_temp)[0]


def sample_negatives(
    scores: Tensor,
    state: Tensor,
    num_samples: int = 1,
    *,
    inv_temp: float = 1.0,
    top_k: int | None = None,
    top_k_method: str = "grouped",
    valid: Tensor | None = None,
    exclude: Tensor | None = None,
    slot_offset: int = 0,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `splade_fast.sample_negatives` from scaled scores (B, C) and a state (2,) int64.

    Returns:
        indices (B, m), scores (B, m), logsumexp (B,), perturbed (B, m).
    """
    scores = _mask(scores, valid, exclude)
    kept = _kept_slots(scores, top_k, top_k_method)
    kept_scores = scores.gather(1, kept)
    noise = gumbel_noise(
        state, *scores.shape, query_offset=query_offset, slot_offset=slot_offset
    ).gather(1, kept)
    indices, drawn_scores, perturbed = _draw(kept_scores, kept, noise, num_samples, inv_temp)
    return indices, drawn_scores, kept_scores.logsumexp(1), perturbed


def sample_kept(
    scores: Tensor,
    slots: Tensor,
    state: Tensor,
    num_samples: int = 1,
    *,
    inv_temp: float = 1.0,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `sample_negatives` from the scores (B, k) of ascending slots (B, k) int64 alone."""
    queries = torch.arange(query_offset, query_offset + len(scores), device=scores.device)
    words, refinements = (
        torch.stack(philox_block(state, slots >> 2, queries.unsqueeze(1), domain), -1)
        .gather(-1, (slots & 3).unsqueeze(-1))
        .squeeze(-1)
        for domain in (NOISE, REFINEMENT)
    )
    noise = noise_from_words(words, refinements)
    indices, drawn_scores, perturbed = _draw(scores, slots, noise, num_samples, inv_temp)
    return indices, drawn_scores, scores.logsumexp(1), perturbed


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _all_slots(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)


def _mask(scores: Tensor, valid: Tensor | None, exclude: Tensor | None) -> Tensor:
    """Set the scores of slots that are not valid or are excluded to -inf."""
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    if exclude is None:
        return scores
    if exclude.dtype == torch.bool:
        return scores.masked_fill(exclude, -torch.inf)
    # Slots outside the cache are marked in an extra column.
    num_slots = scores.shape[1]
    places = torch.where((exclude >= 0) & (exclude < num_slots), exclude, num_slots)
    hit = torch.zeros(len(scores), num_slots + 1, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(hit.scatter(1, places, True)[:, :-1], -torch.inf)


def _descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row: NaN first, equal scores in their order."""
    return scores.sort(dim=1, descending=True, stable=True)


def _kept_slots(scores: Tensor, top_k: int | None, method: str) -> Tensor:
    """Return the slots (B, k) that top_k keeps, ascending."""
    if top_k is None or top_k >= scores.shape[1]:
        return _all_slots(scores)
    if method == "exact":
        return _descending(scores)[1][:, :top_k].sort(1)[0]
    groups = zip(
        scores.tensor_split(top_k, 1), _all_slots(scores).tensor_split(top_k, 1), strict=True
    )
    return torch.cat([slots.gather(1, _descending(part)[1][:, :1]) for part, slots in groups], 1)


def _draw(
    scores: Tensor, slots: Tensor, noise: Tensor, num_samples: int, inv_temp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots, scores and perturbed scores (B, m) of the m largest perturbed scores."""
    # inv_temp = 0 draws uniformly, also where scores are infinite.
    tempered = inv_temp * scores if inv_temp != 0 else torch.where(scores.isnan(), scores, 0)
    perturbed = (tempered + noise).masked_fill(scores == -torch.inf, -torch.inf)
    ranked, order = _descending(perturbed)
    ranked, order = ranked[:, :num_samples], order[:, :num_samples]
    drawn = ranked != -torch.inf
    indices = torch.where(drawn, slots.gather(1, order), -1)
    drawn_scores = torch.where(drawn, scores.gather(1, order), -torch.inf)
    missing = (0, num_samples - ranked.shape[1])
    return (
        torch.nn.functional.pad(indices, missing, value=-1),
        torch.nn.functional.pad(drawn_scores, missing, value=-torch.inf),
        torch.nn.functional.pad(ranked, missing, value=-torch.inf),
    )
