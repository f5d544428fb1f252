"""Gumbel-Max draws from counter-based noise: the formula in plain PyTorch, (B, C) and all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Domains of the counter: the noise's words, the words that refine its tail, seeds of other streams.
NOISE, REFINEMENT, FORK = 0, 1, 2

_LOW = 0xFFFFFFFF
_SQRT_HALF_BITS = 0x3F3504F3


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> list[Tensor]:
    """One block of Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011).

    Args:
        counter: four words, as int64 in [0, 2^32), of shapes that broadcast.
        key: two words, likewise; at least one of all six is a tensor.

    Returns:
        Four words of the common shape, likewise.
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


def block_of_state(
    state: Tensor, blocks: Tensor | int, queries: Tensor | int, domain: int
) -> list[Tensor]:
    """The words of slots 4 * blocks … 4 * blocks + 3 in the present step of a state (2,)."""
    seed, step = state.unbind()
    counter = (blocks, queries, step & _LOW, (step >> 32 & 0x3FFFFFFF) | domain << 30)
    return philox4x32(counter, (seed & _LOW, seed >> 32 & _LOW))


def gumbel_noise(
    state: Tensor, num_queries: int, num_slots: int, *, query_offset: int = 0, slot_offset: int = 0
) -> Tensor:
    """G[q, c] = -log(-log1p(-e)) for uniform e that depend on the seed, the step, q and c alone.

    e = (w + ½) / 2^32 for a word w; where w < 2^16, which makes the tail of large G, a second word
    refines e to (w 2^32 + w' + ½) / 2^64.

    Args:
        state: (2,) int64, seed and step.

    Returns:
        (num_queries, num_slots) float32, the same bits on every device: within 2.3 ulp of the
        exact value where |G| >= 1, within 3.6 * 2^-24 elsewhere.
    """
    device = state.device
    queries = torch.arange(query_offset, query_offset + num_queries, device=device).unsqueeze(1)
    first = slot_offset >> 2
    blocks = torch.arange(first, (slot_offset + num_slots + 3 >> 2), device=device)
    of_slots = slice(slot_offset - 4 * first, slot_offset - 4 * first + num_slots)
    words, refinements = (
        torch.stack(block_of_state(state, blocks, queries, domain), -1).flatten(-2)[:, of_slots]
        for domain in (NOISE, REFINEMENT)
    )
    return noise_of_words(words, refinements)


def noise_of_words(words: Tensor, refinements: Tensor) -> Tensor:
    """The same from the words, int64 in [0, 2^32), in float32 steps that round each on its own."""
    odd = 2 * words + 1
    refined = (2 * (words << 32 | refinements) + 1).float() * 2.0**-65
    e = torch.where(words < 1 << 16, refined, odd.float() * 2.0**-33)
    small = words < 1 << 30
    # -log1p(-e): from 1 - e itself where that is not close to 1.
    f, k = _split(((1 << 33) - odd).float() * 2.0**-33)
    exponential = -_log(torch.where(small, -e, f), torch.where(small, 0, k))
    return -_log(*_split(exponential))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """f and k with x = 2^k (1 + f) and 1 + f between sqrt(1/2) and sqrt(2)."""
    shifted = x.view(torch.int32) + (0x3F800000 - _SQRT_HALF_BITS)
    k = (shifted >> 23) - 127
    return ((shifted & 0x007FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1, k.float()


def _log(f: Tensor, k: Tensor) -> Tensor:
    """log(2^k (1 + f)): log(1 + f) = 2 atanh(s) for s = f / (2 + f), by its series to s^9."""
    s = f / (2 + f)
    z = s * s
    series = z * (_F32[3] + z * (_F32[5] + z * (_F32[7] + z * _F32[9])))
    rest = 2 * s * series + k * _LN2_LOW
    return k * _LN2_HIGH + (f - (s * f - rest))


# Rounded to float32 here, once: 1 / n, and log(2) in two parts of which k * high is exact.
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
    """`splade_fast.gumbel_max` from the state (2,) int64 of a generator."""
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
    """`splade_fast.sample_negatives` from scaled scores (B, C) and the state (2,) of a generator.

    Returns:
        indices (B, m), scores (B, m), logsumexp (B,), perturbed (B, m).
    """
    scores = _mask(scores, valid, exclude)
    kept = _kept_slots(scores, top_k, top_k_method)
    of_kept = scores.gather(1, kept)
    noise = gumbel_noise(
        state, *scores.shape, query_offset=query_offset, slot_offset=slot_offset
    ).gather(1, kept)
    indices, drawn_scores, perturbed = _draw(of_kept, kept, noise, num_samples, inv_temp)
    return indices, drawn_scores, of_kept.logsumexp(1), perturbed


def sample_kept(
    scores: Tensor,
    slots: Tensor,
    state: Tensor,
    num_samples: int = 1,
    *,
    inv_temp: float = 1.0,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample_negatives` from the scores (B, k) that count, of ascending slots (B, k) int64."""
    queries = torch.arange(query_offset, query_offset + len(scores), device=scores.device)
    words, refinements = (
        torch.stack(block_of_state(state, slots >> 2, queries.unsqueeze(1), domain), -1)
        .gather(-1, (slots & 3).unsqueeze(-1))
        .squeeze(-1)
        for domain in (NOISE, REFINEMENT)
    )
    noise = noise_of_words(words, refinements)
    indices, drawn_scores, perturbed = _draw(scores, slots, noise, num_samples, inv_temp)
    return indices, drawn_scores, scores.logsumexp(1), perturbed


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _all_slots(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)


def _mask(scores: Tensor, valid: Tensor | None, exclude: Tensor | None) -> Tensor:
    """-inf for what must be neither counted nor drawn."""
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    if exclude is None:
        return scores
    if exclude.dtype == torch.bool:
        return scores.masked_fill(exclude, -torch.inf)
    # Entries outside go to one more column.
    num_slots = scores.shape[1]
    places = torch.where((exclude >= 0) & (exclude < num_slots), exclude, num_slots)
    hit = torch.zeros(len(scores), num_slots + 1, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(hit.scatter(1, places, True)[:, :-1], -torch.inf)


def _descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    """NaN first; of equal scores the first."""
    return scores.sort(dim=1, descending=True, stable=True)


def _kept_slots(scores: Tensor, top_k: int | None, method: str) -> Tensor:
    """(B, k), ascending."""
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
    """Slots, scores and perturbed scores (B, m) of the first in perturbed order."""
    # inv_temp = 0 draws uniformly, also from infinite scores.
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
