"""Rule for the screened product on the CPU, and the prepared weights that the product needs.

The screened product (docs/screening.md) needs the decoder's weight in int8. The weight is prepared
once per tensor and version, kept as long as its storage lives, and prepared again after a change.
The algorithm changes the time of a call, never its result.
"""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from splade_fast import _library
from splade_fast._distributed import is_distributed
from splade_fast.ops.head.screening_basis import MAX_BASIS_DIM, Basis, Moments, balanced_basis

ALGORITHMS = {"auto": 0, "dense": 1, "screened": 2}
DENSE, SCREENED = ALGORITHMS["dense"], ALGORITHMS["screened"]

MAX_DIM = 2**16  # with more dimensions a sum of int8 products could overflow int32
# Preparing the weight takes as long as the dense product of 80 (float32) to 200 (bfloat16) tokens.
# In training, where the weight changes after each step, batches below this size are not screened.
_MIN_TRAINING_TOKENS = 512
# The mean of the hidden states comes from the first batch. The next batch with _MEAN_GROWTH times
# as many tokens replaces it, until the mean is over MEAN_TOKENS tokens.
_MEAN_GROWTH, MEAN_TOKENS = 4, 4096
# A basis costs as much as the int8 product of 8 to 18 D tokens, and saves up to half of each later
# product.
_BASIS_TOKENS_PER_DIM = 32
_MAX_PERCENT_OF_PRODUCT = 90  # a basis that leaves more of the product is dropped
# After n declined trials in a row, min(2**n - 1, _MAX_SKIPS) calls run dense without a trial.
_MAX_SKIPS = 63
_SAMPLED_ENTRIES = 4096


@dataclass
class PreparedWeight:
    """Weight in int8, and its products with a mean of hidden states.

    `ScreeningState.prepare` returns it for a block `with`, in which nobody writes its tensors.
    """

    mean: Tensor
    packed: Tensor
    rows: Tensor
    basis: Basis | None
    tokens: int  # number of tokens that the mean is over
    version: object
    num_users: int = 0

    def __enter__(self) -> PreparedWeight:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end_use()

    def end_use(self) -> None:
        """End the use of one user."""
        with _lock:
            self.num_users -= 1

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """Arguments of head_forward_screened."""
        if self.basis is None:
            return self.mean, self.packed, self.rows, None, None
        return self.mean, self.packed, self.rows, self.basis.matrices, self.basis.order


class ScreeningState:
    """Prepared weight of one decoder, and the outcome of earlier trials with it."""

    def __init__(self) -> None:
        self.prepared: PreparedWeight | None = None
        self._declines = 0
        self._skips_left = 0
        self._moments: Moments | None = None  # over the calls since the weight changed
        self._basis_version: object = None  # version of the weight for which a basis was computed
        self.lock = Lock()  # held while the weight is prepared

    def should_try(self) -> bool:
        """Return whether algorithm="auto" should try the screened product in this call."""
        return self._skips_left <= 0

    def record_skip(
        self,
        source: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None,
        is_training: bool,
    ) -> None:
        """Record that a call ran dense without a trial, and its tokens for a basis.

        With a basis a later trial may succeed. The trials alone, one in 64 calls, would take very
        long to gather the tokens of a basis from short texts.

        Args:
            source, hidden, attention_mask, is_training: see `prepare`.
        """
        self._skips_left -= 1
        if is_training or self._moments is None:
            return
        with self.lock:
            prepared, moments = self.prepared, self._moments
            if prepared is None or moments is None or prepared.version != _find_version(source):
                return
            moments.add(_select_tokens(hidden, attention_mask))

    def record_trial(self, is_declined: bool) -> None:
        """Record a trial, and whether the screened product declined because it would be slower."""
        self._declines = self._declines + 1 if is_declined else 0
        self._skips_left = min(2**self._declines - 1, _MAX_SKIPS)

    def record_product(self, percent: int) -> None:
        """Record how much of the int8 product was computed; drop a basis that saves too little."""
        prepared = self.prepared
        if (
            prepared is not None
            and prepared.basis is not None
            and percent > _MAX_PERCENT_OF_PRODUCT
        ):
            self.prepared = None

    def prepare(
        self,
        weight: Tensor,
        source: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        attention_mask: Tensor | None,
        is_training: bool = False,
    ) -> PreparedWeight:
        """Return the prepared weight in its present version, for one block `with`.

        Outside of training, the weight is prepared along a basis after enough tokens. Of several
        threads one prepares it, and the others wait. The memory of an earlier version is used again
        once no thread uses it.

        Args:
            weight: (V, D), the weight to multiply with.
            source: the tensor that weight was cast from, or weight; its version is observed.
            bias: (V,) or None.
            hidden: (B, L, D) or (T, D).
            attention_mask: (B, L) bool or None.
            is_training: whether the weight is expected to change soon.
        """
        with self.lock:
            return self._find_or_prepare(weight, source, bias, hidden, attention_mask, is_training)

    def _find_or_prepare(
        self,
        weight: Tensor,
        source: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        attention_mask: Tensor | None,
        is_training: bool,
    ) -> PreparedWeight:
        version = _find_version(source)
        present = self._lend(version)
        if present is not None and present.basis is not None:
            return present
        tokens = count_tokens(hidden, attention_mask)
        basis: Basis | None = None
        can_be_kept = not is_training and not source.is_inference()
        if can_be_kept and _should_use_basis(weight) and self._basis_version != version:
            if self._moments is None or present is None:
                self._moments = Moments(weight.shape[1])
            self._moments.add(_select_tokens(hidden, attention_mask))
            if self._moments.tokens >= _BASIS_TOKENS_PER_DIM * weight.shape[1]:
                self._basis_version = version
                moments, self._moments = self._moments, None
                basis = balanced_basis(moments, weight, bias)
                mean = moments.mean.float()
        if basis is None:
            if present is not None and not is_better_mean(tokens, present.tokens):
                return present
            mean = replace_unusable(_select_tokens(hidden, attention_mask).mean(0))
        if present is not None:
            present.end_use()
            present = None
        return self._replace(weight, mean, basis, tokens, version)

    def _lend(self, version: object) -> PreparedWeight | None:
        """Return the prepared weight to one more user, or None if there is none of that version."""
        with _lock:
            prepared = self.prepared
            if prepared is None or prepared.version != version:
                return None
            prepared.num_users += 1
            return prepared

    def _replace(
        self, weight: Tensor, mean: Tensor, basis: Basis | None, tokens: int, version: object
    ) -> PreparedWeight:
        """Prepare the weight in the memory of the last prepared weight, unless a thread uses that.

        If it were freed, small tensors would take some of it, and the next one would not fit there.
        """
        with _lock:
            last, self.prepared = self.prepared, None
            is_free = last is not None and last.num_users == 0
        options = (None, None, 0.0) if basis is None else (basis.matrices, basis.order, basis.error)
        if is_free and last is not None and (last.basis is None) == (basis is None):
            buffers = last.packed, last.rows
            torch.ops.splade_fast.head_prepare_into(weight, mean, *options, *buffers)
        else:
            last = None  # freed before others are allocated
            buffers = torch.ops.splade_fast.head_prepare(weight, mean, *options)
        prepared = PreparedWeight(mean, *buffers, basis, tokens, version, num_users=1)
        self.prepared = prepared
        return prepared


_states: dict[tuple[object, ...], ScreeningState] = {}
_lock = Lock()


def _forget_other_threads() -> None:
    """Make new locks in a forked process, in which the threads that hold locks do not run."""
    global _lock
    _lock = Lock()
    for state in _states.values():
        state.lock = Lock()


if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_forget_other_threads)


def find_screening_state(weight: Tensor, dtype: torch.dtype) -> ScreeningState:
    """Return the state for a weight used in a dtype; it lives as long as the weight's storage."""
    storage = weight.untyped_storage()
    place = (storage._cdata, weight.storage_offset(), tuple(weight.shape), weight.stride())
    key = (*place, weight.dtype, dtype)
    with _lock:
        state = _states.get(key)
        if state is None:
            state = _states[key] = ScreeningState()
            weakref.finalize(storage, _states.pop, key, None)
    return state


def should_consider_screening(
    hidden: Tensor, attention_mask: Tensor | None, is_training: bool
) -> bool:
    """Return whether the screened product could be faster for such a call."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float64 or hidden.shape[-1] > MAX_DIM:
        return False
    # Without special instructions int8 products are slower than those of floats.
    if _library.cpu_instruction_set() == "portable":
        return False
    return not is_training or count_tokens(hidden, attention_mask) >= _MIN_TRAINING_TOKENS


def _should_use_basis(weight: Tensor) -> bool:
    """Return whether a basis could save time; with AMX partial products are not cheaper."""
    return weight.shape[1] <= MAX_BASIS_DIM and _library.cpu_instruction_set() != "amx"


def is_better_mean(tokens: int, old_tokens: int) -> bool:
    """Return whether a mean over more tokens is worth preparing the weight again."""
    return old_tokens < MEAN_TOKENS and tokens >= min(_MEAN_GROWTH * old_tokens, MEAN_TOKENS)


def count_tokens(hidden: Tensor, attention_mask: Tensor | None) -> int:
    """Return the number of attended tokens."""
    if attention_mask is not None:
        return int(attention_mask.count_nonzero())
    return hidden.numel() // max(1, hidden.shape[-1])


def replace_unusable(mean: Tensor) -> Tensor:
    """Return the mean, or zeros if it has entries that are not finite or very large.

    The screened product is exact with any mean; one near the mean of the tokens gives tight bounds.
    """
    return torch.where((mean.abs() < 2.0**40).all(), mean, 0.0)


def _select_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the hidden states of attended tokens, (N, D) float32."""
    return (hidden.flatten(0, -2) if attention_mask is None else hidden[attention_mask]).float()


def _find_version(weight: Tensor) -> object:
    """Return a value that is equal for two calls only if the weight did not change between them.

    torch counts changes in place, except those through `.data`. A sample of the entries detects
    such changes if they affect more than a few entries. FSDP2 gathers changed weights into the same
    tensor without counting, so where it may run the bits of all entries are added up.
    """
    if weight.is_inference():
        return object()  # torch does not count changes of inference tensors
    if is_distributed():
        return weight._version, _add_bits(weight)
    flat = weight.detach().reshape(-1)
    step = flat.numel() // _SAMPLED_ENTRIES | 1  # odd, so that it visits all dimensions
    # A tensor of one entry is contiguous with any stride, which view refuses: clone sets it to 1.
    sample = flat[::step].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return weight._version, sample.numpy().tobytes()


def _add_bits(weight: Tensor) -> bytes:
    """Return the sum of the bits of each row (V, D), as integers modulo 2^64."""
    rows = weight.detach().contiguous()
    size = math.gcd(rows.shape[1] * rows.element_size(), 8)
    integers = rows.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[size])
    sums: bytes = integers.sum(1, dtype=torch.int64).numpy().tobytes()
    return sums
