"""splade_pool on given logits, forward and forward+backward."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import splade_fast
from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.harness.floors import one_read
from benchmarks.inputs.batches import ragged_lengths, right_padding, seeded, shift_for_active_share
from benchmarks.inputs.peer import PeerPool
from splade_fast import reference


@dataclass(frozen=True, kw_only=True)
class PoolCase(Case):
    op: ClassVar[str] = "pool"
    ours: ClassVar[Implementation] = staticmethod(splade_fast.splade_pool)
    eager: ClassVar[Implementation] = staticmethod(reference.splade_pool)

    batch: int
    length: int
    vocab: int
    mean_fill: float = 0.65
    active: float | None = 0.05  # None: about every pooled entry is positive

    @property
    def shape(self) -> str:
        return f"B{self.batch} L{self.length} V{self.vocab}"

    @property
    def layout(self) -> str:
        return "padded"

    @property
    def fill(self) -> float:
        return self.lengths().sum().item() / (self.batch * self.length)

    @property
    def targets(self) -> tuple[Target, ...]:
        if self.direction == "forward":
            return (Target("times the floor", 1.3),)
        return (Target("times faster than eager", 4),)

    def tiny(self) -> "PoolCase":
        return dataclasses.replace(self, batch=3, length=16, vocab=500)

    def peer(self) -> Implementation:
        return PeerPool(self.direction)

    def lengths(self) -> Tensor:
        return ragged_lengths(self.batch, self.length, self.mean_fill)

    def build(self, *, floors: bool = True) -> Workload:
        generator = seeded(self.device)
        size = (self.batch, self.length, self.vocab)
        logits = torch.randn(size, dtype=self.dtype, device=self.device, generator=generator)
        lengths = self.lengths()
        mask = right_padding(lengths, self.length, self.device)
        sample = logits[:, :, :: max(1, self.vocab // 2048)]
        pooled = sample.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)
        logits += shift_for_active_share(pooled, self.active)
        upstream = torch.randn(
            self.batch, self.vocab, dtype=self.dtype, device=self.device, generator=generator
        )
        logits.requires_grad_(self.direction == "forward+backward")
        return Workload(
            arguments=(logits, mask),
            options={},
            leaves={"logits": logits},
            upstream=upstream,
            exact=lambda: self._exact(logits, mask, upstream),
            floors=self._floors(logits.detach(), int(lengths.sum())) if floors else {},
        )

    def _exact(self, logits: Tensor, mask: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        """Compute the reference in fp64, one document at a time."""
        outputs, gradients = [], []
        for document in range(self.batch):
            row = slice(document, document + 1)
            logits64 = logits[row].detach().double()
            logits64.requires_grad_(self.direction == "forward+backward")
            output = reference.splade_pool(logits64, mask[row])
            outputs.append(output.detach())
            if self.direction == "forward+backward":
                output.backward(upstream[row].double())
                assert logits64.grad is not None
                gradients.append(logits64.grad)
        exact = {"output": torch.cat(outputs)}
        return {**exact, "logits": torch.cat(gradients)} if gradients else exact

    def _floors(self, logits: Tensor, real_tokens: int) -> dict[str, Callable[[], object]]:
        """Move the fewest bytes: read the logits of real tokens once, write the result once.

        The gradient of the logits is dense, so forward+backward writes all of (B, L, V).
        """
        backward = self.direction == "forward+backward"
        written = logits if backward else logits[:, 0]
        if logits.is_cuda:
            read_bytes = real_tokens * self.vocab * logits.element_size()
            written_bytes = written.numel() * logits.element_size()
            return {"copy of as many bytes": _copy_moving(read_bytes + written_bytes)}
        reads = one_read(logits.flatten()[: real_tokens * self.vocab])
        if not backward:
            return reads
        gradient = torch.zeros_like(logits)
        return {f"{name}, write": _in_order(read, gradient.zero_) for name, read in reads.items()}


def _copy_moving(moved_bytes: int) -> Callable[[], object]:
    """Return a device copy that reads and writes this many bytes together."""
    source = torch.randint(256, (moved_bytes // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _in_order(*steps: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for step in steps:
            step()

    return run


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[PoolCase]:
    if quick:
        base = PoolCase(
            direction="forward", dtype=dtypes[0], device=device, batch=3, length=16, vocab=500
        )
        return [base, dataclasses.replace(base, direction="forward+backward")]
    sizes = [(8, 128, 30522), (16, 128, 30522)]
    if device == "cuda":
        sizes = [(8, 512, 250_002), (32, 128, 30522), (128, 256, 30522)]
    found = []
    for dtype in dtypes:
        # The whole table for the main dtype, one size for the others.
        for batch, length, vocab in sizes if dtype == dtypes[0] else sizes[-1:]:
            base = PoolCase(
                direction="forward",
                dtype=dtype,
                device=device,
                batch=batch,
                length=length,
                vocab=vocab,
            )
            training = dataclasses.replace(base, direction="forward+backward")
            found += [base, training, dataclasses.replace(training, active=None)]
        # Nothing is padded here: the floor is one read of all logits.
        found.append(dataclasses.replace(base, mean_fill=1.0))
    return found
