"""Vectors of a large batch in the memory of a small one.

Gao, Zhang, Han, Callan: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
(GradCache), RepL4NLP 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Inputs = dict[str, Tensor]


def cached_encode(encoder: nn.Module, inputs: Mapping[str, Tensor], mini_batch_size: int) -> Tensor:
    """encoder(**inputs), encoded by mini-batches of similar length, without keeping activations.

    The backward pass encodes each mini-batch once more, with the same random numbers, and adds its
    gradients up. Vectors and gradients are those of encoder(**inputs), but for rounding and for
    what dropout draws. What is held at any time is the vectors, the activations of one mini-batch
    and one gradient for each parameter.

    Args:
        encoder: tokenized texts as keyword arguments -> (N, V).
        inputs: (N, ...) tensors; with `attention_mask` (N, L), columns (N, L, ...) that are padding
            at the end of all texts of a mini-batch are left out (learning the lengths waits for a
            GPU).
        mini_batch_size: how many texts go through the encoder together.

    Returns:
        (N, V), differentiable once in the parameters of the encoder that require a gradient.

    Raises:
        ValueError: mini_batch_size is less than 1, or inputs have different numbers of rows.
        RuntimeError: in the backward pass, by torch, for reentrant gradient checkpointing.
    """
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    counts = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"inputs must have as many rows each, got {counts}")
    if next(iter(counts.values())) <= mini_batch_size:
        vectors: Tensor = encoder(**inputs)
        return vectors
    parts = _mini_batches(inputs, mini_batch_size)
    trainable = [p for p in encoder.parameters() if p.requires_grad]  # tied ones once
    if torch.is_grad_enabled() and trainable:
        vectors = _CachedEncode.apply(encoder, parts, *trainable)
    else:
        vectors = _joined(parts, [encoder(**part.inputs) for part in parts])
    return vectors


def without_padding(inputs: Mapping[str, Tensor]) -> Inputs:
    """Tokenized texts without the columns that are padding at the end of all of them.

    Args:
        inputs: `attention_mask` (N, L) and others, of which those with L columns are cut.
    """
    mask = inputs["attention_mask"]
    length = max(1, int(_lengths(mask).max())) if len(mask) else 1
    width = mask.shape[1]
    return {
        name: tensor[:, :length] if tensor.ndim > 1 and tensor.shape[1] == width else tensor
        for name, tensor in inputs.items()
    }


class _MiniBatch(NamedTuple):
    rows: Tensor  # which of all texts
    inputs: Inputs


class _CachedEncode(torch.autograd.Function):
    """The parameters are inputs, so that each gets its whole gradient at once: hooks on it, as
    DistributedDataParallel's, run once.
    """

    @staticmethod
    def forward(
        ctx: Any, encoder: nn.Module, parts: Sequence[_MiniBatch], *parameters: Tensor
    ) -> Tensor:
        ctx.encoder, ctx.parts = encoder, parts
        ctx.surroundings, vectors = [], []
        ctx.save_for_backward(*parameters)  # so that a change before the backward is an error
        for part in parts:
            surroundings = _Surroundings(part.rows.device)
            ctx.surroundings.append(surroundings)
            with surroundings.autocast():
                vectors.append(encoder(**part.inputs))
        return _joined(parts, vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        total: list[Tensor | None] = [None] * len(parameters)
        for part, surroundings in zip(ctx.parts, ctx.surroundings, strict=True):
            with torch.enable_grad(), surroundings.restored(), surroundings.autocast():
                vectors = ctx.encoder(**part.inputs)
            if vectors.requires_grad:
                upstream = grad[part.rows]
                found = torch.autograd.grad(vectors, parameters, upstream, allow_unused=True)
                total = [_sum(*pair) for pair in zip(total, found, strict=True)]
        return None, None, *total


class _Surroundings:
    """What a forward pass depends on besides its arguments: random numbers and autocast."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._autocast = {
            name: (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
            for name in {"cpu", device.type}
        }
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The random numbers as they were; what they are now comes back afterwards."""
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as it was, but without its memory of cast weights.

        Weights that were cast without a gradient would be used again where one is wanted, and those
        of one mini-batch in the next, where their graph is gone.
        """
        with ExitStack() as stack:
            for name, (enabled, dtype) in self._autocast.items():
                mode = torch.autocast(name, dtype, enabled=enabled, cache_enabled=False)
                stack.enter_context(mode)
            yield


def _mini_batches(inputs: Mapping[str, Tensor], size: int) -> list[_MiniBatch]:
    """The longest texts first, so that what does not fit into memory shows at once."""
    mask = inputs.get("attention_mask")
    if mask is None:
        some = next(iter(inputs.values()))
        order = torch.arange(len(some), device=some.device)
    else:
        order = _lengths(mask).argsort(descending=True, stable=True)
    parts = []
    for rows in order.split(size):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        parts.append(_MiniBatch(rows, part if mask is None else without_padding(part)))
    return parts


def _joined(parts: Sequence[_MiniBatch], vectors: Sequence[Tensor]) -> Tensor:
    """(N, V) in the order of the texts, from the vectors of each mini-batch."""
    return torch.cat(list(vectors))[torch.cat([part.rows for part in parts]).argsort()]


def _lengths(mask: Tensor) -> Tensor:
    """(N,) the last position that counts, from 1; 0 where none does."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return ((mask != 0) * positions).amax(1)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum in place of the total. The first is a copy: torch may give two parameters one tensor
    as their gradient.
    """
    if total is None or more is None:
        return more.clone() if more is not None else total
    return total.add_(more)
