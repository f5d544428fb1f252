"""Which algorithm the CPU head takes, and the prepared weights that the screened one needs.

The screened product (docs/screening.md) wants the decoder's weight in int8. That is prepared once
per weight tensor and version, kept as long as the tensor's storage lives, and made anew when the
weight changes. Which algorithm runs never changes a result, only its time.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from splade_fast import _library
from splade_fast.ops.head.screening_basis import MAX_BASIS_DIM, Basis, Moments, balanced_basis

ALGORITHMS = {"auto": 0, "dense": 1, "screened": 2}
DENSE, SCREENED = ALGORITHMS["dense"], ALGORITHMS["screened"]

MAX_DIM = 2**16  # products of int8 over more could leave int32
# Preparing the weight costs as much as the dense product of 80 (float32) to 200 (bfloat16) tokens:
# for fewer than this it is not worth it where training is about to change the weight again.
_MIN_TRAINING_TOKENS = 512
# The mean that is taken from the hidden states comes from the first batch; the first one of four
# times as many tokens gives a better one, up to so many.
_MEAN_GROWTH, MEAN_TOKENS = 4, 4096
# A basis costs as much as the int8 product of 8 to 18 D tokens, of which it saves up to half.
_TOKENS_BEHIND_BASIS = 32  # per dimension
_MAX_PERCENT_OF_PRODUCT = 90  # with a basis; else it goes
# After n declines in a row the next 2**n - 1 calls go dense without asking, but at most so many.
_MAX_WAIT = 63
_SAMPLED_ENTRIES = 4096


@dataclass(frozen=True)
class PreparedWeight:
    """The weight in int8, and its products with a mean of hidden states."""

    mean: Tensor
    packed: Tensor
    rows: Tensor
    basis: Basis | None
    tokens: int  # behind the mean
    version: object

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What head_forward_screened takes."""
        basis = self.basis
        matrices_and_order = (None, None) if basis is None else (basis.matrices, basis.order)
        return self.mean, self.packed, self.rows, *matrices_and_order


class Decoder:
    """What is remembered of one decoder weight."""

    def __init__(self) -> None:
        self.prepared: PreparedWeight | None = None
        self._declines = 0
        self._wait = 0
        self._moments: Moments | None = None  # of the calls since the weight changed
        self._tried_basis: object = None  # the version of the weight for which there was enough

    def asks(self) -> bool:
        """Whether an automatic choice should try the screened product again."""
        self._wait -= 1
        return self._wait < 0

    def record(self, declined: bool) -> None:
        """How trying it went."""
        self._declines = self._declines + 1 if declined else 0
        self._wait = min(2**self._declines - 1, _MAX_WAIT)

    def record_product(self, percent: int) -> None:
        """How much of the int8 product was made: a basis that spares too little goes."""
        ready = self.prepared
        if ready is not None and ready.basis is not None and percent > _MAX_PERCENT_OF_PRODUCT:
            self.prepared = None

    def prepare(
        self,
        weight: Tensor,
        source: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        counts: Tensor | None,
        training: bool = False,
    ) -> PreparedWeight:
        """The weight as it is now, prepared; along a basis after enough tokens without training."""
        version = _version(source)
        tokens = count_tokens(hidden, counts)
        old = self.prepared
        if old is not None and old.version != version:
            old = None
        if old is not None and old.basis is not None:
            return old
        may_stay = not training and not source.is_inference()
        if may_stay and _takes_basis(weight) and self._tried_basis != version:
            if self._moments is None or old is None:
                self._moments = Moments(weight.shape[1])
            self._moments.add(_tokens(hidden, counts))
            if self._moments.tokens >= _TOKENS_BEHIND_BASIS * weight.shape[1]:
                self._tried_basis = version
                moments, self._moments = self._moments, None
                basis = balanced_basis(moments, weight, bias)
                if basis is not None:
                    return self._prepare(weight, moments.mean.float(), basis, tokens, version)
        if old is not None and not gives_better_mean(tokens, old.tokens):
            return old
        return self._prepare(weight, _mean(hidden, counts), None, tokens, version)

    def _prepare(
        self, weight: Tensor, mean: Tensor, basis: Basis | None, tokens: int, version: object
    ) -> PreparedWeight:
        options = () if basis is None else (basis.matrices, basis.order, basis.error)
        packed, rows = torch.ops.splade_fast.head_prepare(weight, mean, *options)
        self.prepared = PreparedWeight(mean, packed, rows, basis, tokens, version)
        return self.prepared


_decoders: dict[tuple[object, ...], Decoder] = {}
_lock = threading.Lock()


def decoder_of(weight: Tensor, dtype: torch.dtype) -> Decoder:
    """What is remembered of the weight, used in that dtype, as long as its storage lives."""
    storage = weight.untyped_storage()
    place = (storage._cdata, weight.storage_offset(), tuple(weight.shape), weight.stride())
    key = (*place, weight.dtype, dtype)
    with _lock:
        decoder = _decoders.get(key)
        if decoder is None:
            decoder = _decoders[key] = Decoder()
            weakref.finalize(storage, _decoders.pop, key, None)
    return decoder


def is_candidate(hidden: Tensor, counts: Tensor | None, training: bool) -> bool:
    """Whether the screened product could pay for such a call."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float64 or hidden.shape[-1] > MAX_DIM:
        return False
    # Without an instruction for products of int8 they are slower than those of floats.
    if _library.cpu_instruction_set() == "portable":
        return False
    return not training or count_tokens(hidden, counts) >= _MIN_TRAINING_TOKENS


def _takes_basis(weight: Tensor) -> bool:
    """AMX multiplies all dimensions in one go: looking at some costs more than the rest."""
    return weight.shape[1] <= MAX_BASIS_DIM and _library.cpu_instruction_set() != "amx"


def gives_better_mean(tokens: int, old_tokens: int) -> bool:
    """Whether the mean of so many tokens is worth preparing the weight again."""
    return old_tokens < MEAN_TOKENS and tokens >= min(_MEAN_GROWTH * old_tokens, MEAN_TOKENS)


def count_tokens(hidden: Tensor, counts: Tensor | None) -> int:
    """How many tokens count."""
    if counts is not None:
        return int(counts.count_nonzero())
    return hidden.numel() // max(1, hidden.shape[-1])


def _mean(hidden: Tensor, counts: Tensor | None) -> Tensor:
    """About the mean of the tokens that count; any vector is right, this one makes bounds tight."""
    return usable_mean(_tokens(hidden, counts).mean(0))


def usable_mean(mean: Tensor) -> Tensor:
    """Itself, or zeros where it is not finite or so large that it would spoil every bound."""
    return torch.where((mean.abs() < 2.0**40).all(), mean, 0.0)


def _tokens(hidden: Tensor, counts: Tensor | None) -> Tensor:
    """(N, D) float32, those that count."""
    return (hidden.flatten(0, -2) if counts is None else hidden[counts]).float()


def _version(weight: Tensor) -> object:
    """Equal only while the weight has not changed.

    Torch counts the changes made in place, except those through `.data`: a sample of the entries
    shows these where they are more than a few.
    """
    if weight.is_inference():
        return object()  # nothing is counted
    flat = weight.detach().reshape(-1)
    step = flat.numel() // _SAMPLED_ENTRIES | 1  # odd: not always the same dimensions
    # clone: what is contiguous for being a single entry may have any stride, which view refuses.
    sample = flat[::step].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return weight._version, sample.numpy().tobytes()
