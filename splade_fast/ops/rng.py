"""Philox: the state of counter-based random numbers, as a tensor on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splade_fast.reference.sample import FORK, block_of_state


class Philox(nn.Module):
    """Seed and step of a Philox4x32-10 generator (Salmon, Moraes, Dror, Shaw, SC 2011).

    A module whose one buffer is the state: as an attribute of another module it moves with `.to()`
    and is saved and resumed with its `state_dict()`, bit for bit. What draws with it advances the
    step by one, in place and on the device, so nothing waits for a GPU and a replayed CUDA graph
    draws anew each time. Equal states draw the same on every device.
    """

    state: Tensor  # (2,) int64: seed, step

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        """
        Args:
            seed: any integer of 64 bits, signed or unsigned.
            device: where the draws will be.

        Raises:
            TypeError, ValueError: seed is no integer of 64 bits.
        """
        super().__init__()
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
        signed = seed - 2**64 if seed >= 2**63 else seed
        self.register_buffer("state", torch.tensor([signed, 0], device=device))

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self.state.device

    def advance(self) -> None:
        """One step on, on the device."""
        self.state[1:].add_(1)

    def clone(self) -> Philox:
        """A generator of its own that goes on from the same state."""
        return self._with_state(self.state.clone())

    def fork(self, stream: int) -> Philox:
        """A generator with a seed of its own, made of this one's seed and the number of a stream.

        Args:
            stream: at least 0 and below 2^64; equal streams of equal seeds are equal.

        Raises:
            ValueError: stream is out of range.
        """
        if not 0 <= stream < 2**64:
            raise ValueError(f"stream must be at least 0 and below 2^64, got {stream}")
        seed = self.state * torch.tensor([1, 0], device=self.device)
        low, high, _, _ = block_of_state(seed, stream & 0xFFFFFFFF, stream >> 32, FORK)
        return self._with_state(torch.stack([high << 32 | low, torch.zeros_like(low)]))

    @staticmethod
    def _with_state(state: Tensor) -> Philox:
        other = Philox(0, state.device)
        other.state = state
        return other
