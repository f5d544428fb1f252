"""GradCache: vectors of a large batch in the memory of a small one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from splade_fast._checks import check_count
from splade_fast._distributed import Ranks
from splade_fast.encoders.batching import cut_columns
from splade_fast.encoders.sharding import is_sharded

Inputs = dict[str, Tensor]


def cached_encode(
    encoder: nn.Module,
    inputs: Mapping[str, Tensor],
    mini_batch_size: int | None = None,
    *,
    mini_batch_tokens: int | None = None,
) -> Tensor:
    """Return encoder(**inputs), computed by mini-batches whose activations are not kept.

    The backward pass encodes each mini-batch again, with the same random numbers, and accumulates
    its gradients. Vectors and gradients equal those of encoder(**inputs) up to rounding and the
    random numbers of dropout. Memory holds the vectors, the activations of one mini-batch and one
    gradient for each parameter. Mini-batches have texts of similar length.

    Gao, Zhang, Han and Callan: Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup (GradCache), RepL4NLP 2021.

    Args:
        encoder: module from tokenized texts, as keyword arguments, to vectors (N, V).
        inputs: (N, ...) tensors by name. With `attention_mask` (N, L), each mini-batch leaves out
            the columns of the (N, L, ...) tensors that are padding at the end of all its texts.
            Reading the lengths synchronises with a GPU.
        mini_batch_size: number of texts that the encoder sees at a time. None: any.
        mini_batch_tokens: number of tokens, with padding, that the encoder sees at a time: a
            mini-batch of N texts whose longest has L tokens has N · L. A longer text is encoded
            alone. None: any.

    Returns:
        (N, V), once differentiable in the parameters of the encoder that require a gradient.

    Raises:
        TypeError, ValueError: a size is not an integer of at least 1, or inputs have different
            numbers of rows, or are no tokens for mini_batch_tokens.
        RuntimeError: in the backward pass: create_graph is True, gradient checkpointing is
            reentrant, or a parameter has changed since the forward pass.

    Example::

        >>> from splade_fast.training import cached_encode
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> inputs = encoder.tokenize(["quick fox", "lazy dog", "an old tree"])
        >>> vectors = cached_encode(encoder, inputs, mini_batch_size=2)
        >>> torch.allclose(vectors, encoder(**inputs), atol=1e-5)
        True
    """
    if mini_batch_size is not None:
        mini_batch_size = check_count("mini_batch_size", mini_batch_size, 1)
    if mini_batch_tokens is not None:
        mini_batch_tokens = check_count("mini_batch_tokens", mini_batch_tokens, 1)
    counts = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"inputs must have as many rows each, got {counts}")
    count = next(iter(counts.values()))
    is_whole = mini_batch_tokens is None and count <= (mini_batch_size or count)
    parts = [] if is_whole else _mini_batches(inputs, mini_batch_size, mini_batch_tokens)
    if is_sharded(encoder):
        parts = _as_many_on_all_ranks(parts, inputs)
    if len(parts) < 2:
        vectors: Tensor = encoder(**inputs)
        return vectors
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and trainable:
        if is_sharded(encoder):
            # Has the backward run.
            anchor = torch.zeros((), device=parts[0].rows.device, requires_grad=True)
            vectors = _CachedEncodeOfShards.apply(encoder, parts, anchor)
        else:
            vectors = _CachedEncode.apply(encoder, parts, *trainable)
    else:
        vectors = _join_vectors(parts, [part.encode(encoder) for part in parts])
    return vectors


class _MiniBatch(NamedTuple):
    rows: Tensor  # indices of its texts in the whole batch
    inputs: Inputs  # of these texts, or of one more where there are none

    def encode(self, encoder: nn.Module) -> Tensor:
        """Return the vectors of the texts."""
        vectors: Tensor = encoder(**self.inputs)
        return vectors[: len(self.rows)]


class _CachedEncode(torch.autograd.Function):
    """Encode by mini-batches.

    The parameters are inputs of the function, so autograd accumulates the whole gradient of each at
    once, and its hooks run once, as DistributedDataParallel requires.
    """

    @staticmethod
    def forward(
        ctx: Any, encoder: nn.Module, parts: Sequence[_MiniBatch], *parameters: Tensor
    ) -> Tensor:
        ctx.encoder, ctx.parts = encoder, parts
        ctx.states, vectors = [], []
        ctx.save_for_backward(*parameters)  # autograd raises if a parameter changes before backward
        for part in parts:
            state = _ForwardState(part.rows.device)
            ctx.states.append(state)
            with state.autocast():
                vectors.append(encoder(**part.inputs))
        return _join_vectors(parts, vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("cached_encode is differentiable once, got create_graph=True")
        parameters = ctx.saved_tensors
        total: list[Tensor | None] = [None] * len(parameters)
        for part, state in zip(ctx.parts, ctx.states, strict=True):
            with torch.enable_grad(), state.random_numbers(), state.autocast():
                vectors = ctx.encoder(**part.inputs)
            if vectors.requires_grad:
                upstream = grad[part.rows]
                grads = torch.autograd.grad(vectors, parameters, upstream, allow_unused=True)
                total = [_accumulate(*pair) for pair in zip(total, grads, strict=True)]
        return None, None, *total


class _CachedEncodeOfShards(torch.autograd.Function):
    """Encode by mini-batches with an encoder that FSDP2 shards.

    Each mini-batch has a backward pass of its own after the one that gave the gradient of the
    vectors: FSDP2 gathers weights and reduces gradients once in a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, encoder: nn.Module, parts: Sequence[_MiniBatch], anchor: Tensor
    ) -> Tensor:
        ctx.encoder, ctx.parts, ctx.states = encoder, parts, []
        vectors = []
        for part in parts:
            state = _ForwardState(part.rows.device)
            ctx.states.append(state)
            with state.autocast():
                vectors.append(part.encode(encoder))
        return _join_vectors(parts, vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("cached_encode is differentiable once, got create_graph=True")

        def encode_again() -> None:
            for part, state in zip(ctx.parts, ctx.states, strict=True):
                with (
                    torch.enable_grad(),
                    state.random_numbers(),
                    state.autocast(),
                    _freed_after_forward(ctx.encoder),
                ):
                    vectors = part.encode(ctx.encoder)
                if vectors.requires_grad:
                    vectors.backward(grad[part.rows])

        # FSDP2 ends the present backward pass in a callback, which must run before.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(encode_again))
        return None, None, None


@contextmanager
def _freed_after_forward(encoder: nn.Module) -> Iterator[None]:
    """Free the gathered weights of each layer after its forward, as in a usual forward pass.

    In a backward pass FSDP2 takes a forward for a recomputation, and leaves them gathered.
    """
    from torch.distributed.fsdp import FSDPModule

    def free(layer: nn.Module, args: Any, output: Tensor) -> None:
        layer.reshard()  # type: ignore[operator]

    handles = [
        part.register_forward_hook(free)
        for part in encoder.modules()
        if isinstance(part, FSDPModule) and part is not encoder
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ForwardState:
    """Random numbers and autocast modes at the start of a forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._autocast = {
            name: (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
            for name in {"cpu", device.type}
        }
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Set the generators to this state, and back to their present one after the block."""
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Set the autocast modes of this state, without autocast's cache of cast weights.

        The cache would return weights that were cast without a gradient, or whose graph the
        backward pass of another mini-batch has freed.
        """
        with ExitStack() as stack:
            for name, (enabled, dtype) in self._autocast.items():
                mode = torch.autocast(name, dtype, enabled=enabled, cache_enabled=False)
                stack.enter_context(mode)
            yield


def _mini_batches(
    inputs: Mapping[str, Tensor], size: int | None, tokens: int | None
) -> list[_MiniBatch]:
    """Return mini-batches, the longest texts first, so that memory runs out at once or never."""
    some = next(iter(inputs.values()))
    size = len(some) if size is None else size
    attention_mask = inputs.get("attention_mask")
    if attention_mask is None:
        if tokens is not None:
            if some.ndim < 2:
                raise ValueError(
                    f"inputs must be (N, L, ...) for mini_batch_tokens, got {tuple(some.shape)}"
                )
            size = min(size, max(1, tokens // max(1, some.shape[1])))
        every = torch.arange(len(some), device=some.device).split(max(1, size))
        return [_MiniBatch(rows, {name: x[rows] for name, x in inputs.items()}) for rows in every]
    lengths, order = _text_lengths(attention_mask).sort(descending=True, stable=True)
    parts, first = [], 0
    sorted_lengths = lengths.tolist()
    while first < len(sorted_lengths):
        longest = max(1, sorted_lengths[first])
        count = size if tokens is None else min(size, max(1, tokens // longest))
        rows = order[first : first + count]
        columns = cut_columns(inputs, slice(longest))
        parts.append(_MiniBatch(rows, {name: x[rows] for name, x in columns.items()}))
        first += count
    return parts


def _as_many_on_all_ranks(
    parts: list[_MiniBatch], inputs: Mapping[str, Tensor]
) -> list[_MiniBatch]:
    """Return the mini-batches, and as many without a text as another rank has more.

    All ranks gather the weights for each mini-batch of any.
    """
    some = next(iter(inputs.values()))
    if not parts:
        parts = [_MiniBatch(torch.arange(len(some), device=some.device), dict(inputs))]
    (counts,) = Ranks().all_gather(torch.tensor(len(parts)))
    last = {name: tensor[-1:] for name, tensor in parts[-1].inputs.items()}
    idle = _MiniBatch(parts[-1].rows[:0], last)
    return parts + [idle] * (int(counts.max()) - len(parts))


def _join_vectors(parts: Sequence[_MiniBatch], vectors: Sequence[Tensor]) -> Tensor:
    """Return the vectors (N, V) of all mini-batches in the order of the texts."""
    return torch.cat(list(vectors))[torch.cat([part.rows for part in parts]).argsort()]


def _text_lengths(attention_mask: Tensor) -> Tensor:
    """Return the number (N,) of columns up to the last token of each text."""
    positions = torch.arange(attention_mask.shape[1] + 1, device=attention_mask.device)
    return (nn.functional.pad(attention_mask != 0, (1, 0)) * positions).amax(1)


def _accumulate(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Add a gradient to the total in place.

    The first total is a copy, because torch may return one tensor as the gradient of two
    parameters.
    """
    if total is None or grad is None:
        return grad.clone() if grad is not None else total
    return total.add_(grad)
