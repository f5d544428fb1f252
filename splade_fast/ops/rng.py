"""Philox: the state of counter-based random numbers, as a tensor on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splade_fast._checks import check_integer
from splade_fast.reference.sample import FORK, philox_block


class Philox(nn.Module):
    """Counter-based random number generator Philox4x32-10, for draws on a device.

    Follows Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
    The generator is a module whose buffer `state` (2,) int64 holds seed and step. As an attribute
    of another module it moves with `.to()` and is saved in `state_dict()`. Each function that draws
    advances the step by one, in place and on the device: nothing waits for a GPU, and every replay
    of a CUDA graph draws new numbers. Equal states draw the same numbers on every device.

    Args:
        seed: a 64-bit integer, signed or unsigned.
        device: device of the draws.

    Raises:
        TypeError, ValueError: seed is not a 64-bit integer.

    Example::

        >>> rng = sf.Philox(seed=0)
        >>> first, second = (sf.gumbel_max(torch.zeros(1, 1000), rng=rng) for _ in range(2))
        >>> bool(first == second), rng.state.tolist()
        (False, [0, 2])
    """

    state: Tensor

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        seed = check_integer("seed", seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
        signed = seed - 2**64 if seed >= 2**63 else seed
        self.register_buffer("state", torch.tensor([signed, 0], device=device))

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.state.device

    def advance(self) -> None:
        """Advance the step by one, in place on the device.

        Example::

            >>> rng = sf.Philox(seed=3)
            >>> rng.advance()
            >>> rng.state
            tensor([3, 1])
        """
        self.state[1:].add_(1)

    def clone(self) -> Philox:
        """Return an independent generator that continues from the same state.

        Example::

            >>> rng = sf.Philox(seed=3)
            >>> copy = rng.clone()
            >>> scores = torch.zeros(4, 100)
            >>> torch.equal(sf.gumbel_max(scores, rng=rng), sf.gumbel_max(scores, rng=copy))
            True
        """
        return self._with_state(self.state.clone())

    def fork(self, stream: int) -> Philox:
        """Return a generator at step 0 whose seed is derived from this seed and a stream number.

        Args:
            stream: number of the stream, from 0 to 2^64 - 1. Equal numbers of equal seeds give
                equal generators.

        Raises:
            TypeError, ValueError: stream is not an integer, or out of range.

        Example::

            >>> rng = sf.Philox(seed=3)
            >>> torch.equal(rng.fork(0).state, rng.fork(1).state)
            False
        """
        stream = check_integer("stream", stream)
        if not 0 <= stream < 2**64:
            raise ValueError(f"stream must be at least 0 and below 2^64, got {stream}")
        seed = self.state * torch.tensor([1, 0], device=self.device)
        low, high, _, _ = philox_block(seed, stream & 0xFFFFFFFF, stream >> 32, FORK)
        return self._with_state(torch.stack([high << 32 | low, torch.zeros_like(low)]))

    @staticmethod
    def _with_state(state: Tensor) -> Philox:
        other = Philox(0, state.device)
        other.state = state
        return other
