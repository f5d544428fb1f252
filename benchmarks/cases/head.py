"""splade_head: hidden states to pooled vocabulary weights, forward and forward+backward."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

import splade_fast
from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.inputs.batches import ragged_lengths, right_padding, seeded, shift_for_active_share
from benchmarks.inputs.peer import PeerHead
from splade_fast import reference

FLOOR_CHUNKS = (512, 2048, 4096, 8192)
FLOOR_WHOLE_BYTES = 8 << 30  # on CUDA one product of the whole vocabulary may be the fastest
EXACT_BLOCK_BYTES = 256 << 20
TRAINED = 0.05  # share of positive (b, v) early in training with regularisation
EARLIER = 1 / 3  # before that


@dataclass(frozen=True, kw_only=True)
class HeadCase(Case):
    op: ClassVar[str] = "head"
    ours: ClassVar[Implementation] = staticmethod(splade_fast.splade_head)
    eager: ClassVar[Implementation] = staticmethod(reference.splade_head)

    batch: int
    length: int
    dim: int
    vocab: int
    mean_fill: float = 0.65
    kind: Literal["padded", "packed"] = "padded"
    active: float | None = TRAINED  # None: a fresh decoder, where nearly every pair is positive

    @property
    def title(self) -> str:
        return f"{super().title} active {1 if self.active is None else self.active:.2f}"

    @property
    def shape(self) -> str:
        return f"B{self.batch} L{self.length} D{self.dim} V{self.vocab}"

    @property
    def layout(self) -> str:
        return self.kind

    @property
    def fill(self) -> float:
        return self.lengths().sum().item() / (self.batch * self.length)

    @property
    def targets(self) -> tuple[Target, ...]:
        memory = Target("MiB peak extra memory", 64)
        if self.direction == "forward":
            return (Target("times the floor", 1.10), memory)
        trained = 12.0 if self.dtype == torch.float32 else 8.0
        least = {None: 5.0, EARLIER: 7.0}.get(self.active, trained)
        return (Target("times faster than eager", least), memory)

    def tiny(self) -> "HeadCase":
        return dataclasses.replace(self, batch=3, length=16, dim=32, vocab=500)

    def peer(self) -> Implementation:
        return PeerHead(self.direction)

    def lengths(self) -> Tensor:
        return ragged_lengths(self.batch, self.length, self.mean_fill)

    def build(self, *, floors: bool = True) -> Workload:
        generator = seeded(self.device)
        hidden, weight, bias, mask = self._inputs(generator)
        tokens = hidden[mask.bool()]
        cu_seqlens = None
        attention_mask: Tensor | None = mask
        if self.kind == "packed":
            hidden, attention_mask = tokens.clone(), None
            cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        upstream = self._normal(generator, self.batch, self.vocab)
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        if self.direction == "forward+backward":
            for leaf in leaves.values():
                leaf.requires_grad_()
        return Workload(
            arguments=(hidden, weight, bias, attention_mask),
            options={"cu_seqlens": cu_seqlens},
            leaves=leaves,
            upstream=upstream,
            exact=lambda: self._exact(hidden, weight, bias, attention_mask, cu_seqlens, upstream),
            floors=_bare_products(tokens, weight.detach()) if floors else {},
        )

    def _inputs(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden (B, L, D), weight, bias and attention_mask (B, L)."""
        mask = right_padding(self.lengths(), self.length, self.device)
        hidden = self._normal(generator, self.batch, self.length, self.dim)
        weight = self._normal(generator, self.vocab, self.dim).div_(self.dim**0.5)
        shift = self._bias_shift(hidden, weight, mask)
        bias = self._normal(generator, self.vocab).mul_(0.02).add_(shift)
        return hidden, weight, bias, mask

    def _normal(self, generator: torch.Generator, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype, device=self.device, generator=generator)

    def _bias_shift(self, hidden: Tensor, weight: Tensor, mask: Tensor) -> float:
        sample = hidden @ weight[:: max(1, self.vocab // 2048)].T
        pooled = sample.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)
        return shift_for_active_share(pooled, self.active)

    def _exact(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        upstream: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the reference in fp64 by blocks of the vocabulary, which share only `hidden`."""
        backward = self.direction == "forward+backward"
        hidden64 = hidden.detach().double().requires_grad_(backward)
        outputs, weight_gradients, bias_gradients = [], [], []
        block = max(1, EXACT_BLOCK_BYTES // (hidden.numel() // self.dim * 8))
        for start in range(0, self.vocab, block):
            entries = slice(start, start + block)
            weight64 = weight[entries].detach().double().requires_grad_(backward)
            bias64 = bias[entries].detach().double().requires_grad_(backward)
            output = reference.splade_head(
                hidden64, weight64, bias64, attention_mask, cu_seqlens=cu_seqlens
            )
            outputs.append(output.detach())
            if backward:
                output.backward(upstream[:, entries].double())
                assert weight64.grad is not None
                assert bias64.grad is not None
                weight_gradients.append(weight64.grad)
                bias_gradients.append(bias64.grad)
        exact = {"output": torch.cat(outputs, dim=1)}
        if backward:
            assert hidden64.grad is not None
            exact["hidden"] = hidden64.grad
            exact["weight"] = torch.cat(weight_gradients)
            exact["bias"] = torch.cat(bias_gradients)
        return exact


def _bare_products(tokens: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return torch.mm of the real tokens by vocabulary chunks, with either operand first."""
    chunks = {min(chunk, len(weight)) for chunk in FLOOR_CHUNKS}
    whole_bytes = len(tokens) * len(weight) * weight.element_size()
    if weight.is_cuda and whole_bytes <= FLOOR_WHOLE_BYTES:
        chunks.add(len(weight))
    floors: dict[str, Callable[[], object]] = {}
    for chunk in sorted(chunks):
        # Every candidate has its own buffer of the chunk: a shared one would be strided.
        floors[f"mm tokens x {chunk}"] = _Product(tokens, weight, chunk, vocabulary_first=False)
        floors[f"mm {chunk} x tokens"] = _Product(tokens, weight, chunk, vocabulary_first=True)
    return floors


class _Product:
    def __init__(self, tokens: Tensor, weight: Tensor, chunk: int, *, vocabulary_first: bool):
        self._parts = [
            (part, tokens.T) if vocabulary_first else (tokens, part.T)
            for part in weight.split(chunk)
        ]
        self._buffer = weight.new_empty(chunk * len(tokens))

    def __call__(self) -> None:
        for left, right in self._parts:
            rows, columns = left.shape[0], right.shape[1]
            torch.mm(left, right, out=self._buffer[: rows * columns].view(rows, columns))


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[HeadCase]:
    if quick:
        dtype = dtypes[0]
        base = HeadCase(
            direction="forward", dtype=dtype, device=device, batch=3, length=16, dim=32, vocab=500
        )
        packed = dataclasses.replace(base, kind="packed")
        return [base, packed, dataclasses.replace(base, direction="forward+backward")]
    return [case for dtype in dtypes for case in _measured(device, dtype, main=dtype == dtypes[0])]


def _measured(device: str, dtype: torch.dtype, *, main: bool) -> list[HeadCase]:
    """Return all shapes for the main dtype, and a few for the others."""

    def shape(batch: int, length: int, dim: int, vocab: int) -> HeadCase:
        return HeadCase(
            direction="forward",
            dtype=dtype,
            device=device,
            batch=batch,
            length=length,
            dim=dim,
            vocab=vocab,
        )

    if device == "cpu":
        shapes = [shape(16, 128, 128, 30522), shape(8, 128, 768, 30522)]
        found = [case for base in shapes for case in _both_directions(base)]
        if main:
            found.append(
                dataclasses.replace(shapes[1], direction="forward+backward", active=EARLIER)
            )
        found += _both_directions(shape(8, 128, 384, 30522))[: 3 if main else 1]
        if main:  # the largest vocabulary in use, for its peak memory
            found += _both_directions(shape(2, 512, 768, 250_002))[:2]
        return found
    bert = shape(32, 128, 768, 30522)
    if not main:
        return _both_directions(bert)
    long = shape(128, 256, 768, 30522)
    multilingual = shape(32, 512, 1024, 250_002)
    found = [case for base in (bert, long, multilingual) for case in _both_directions(base)]
    for base in (bert, long):
        sparse_fill = dataclasses.replace(base, mean_fill=0.44)
        found += [dataclasses.replace(sparse_fill, kind=kind) for kind in ("padded", "packed")]
    found += _both_directions(dataclasses.replace(bert, kind="packed"))[:2]
    others = (
        shape(1024, 24, 768, 30522),  # queries
        shape(256, 128, 384, 30522),
        shape(64, 512, 768, 50_368),
        shape(16, 512, 4096, 128_256),
    )
    found += [dataclasses.replace(base, kind="packed") for base in others]
    return found


def _both_directions(base: HeadCase) -> list[HeadCase]:
    """Return forward, and forward+backward with few and with all pairs active."""
    training = dataclasses.replace(base, direction="forward+backward")
    return [base, training, dataclasses.replace(training, active=None)]
