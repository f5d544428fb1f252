"""Functions that choose the negatives: (B, N) scores -> (B, m) indices."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from splade_fast.ops.rng import Philox
from splade_fast.ops.sample import gumbel_max


class AbstractRetrievalFn(nn.Module, metaclass=abc.ABCMeta):
    """Chooses columns of scores (B, N), of which -inf must not be chosen."""

    @abc.abstractmethod
    def forward(self, scores: Tensor) -> Tensor:
        """(B, m) int64."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """The highest score; of equal scores the first."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=1, keepdim=True)


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """argmax(inv_temp * scores + G) with Gumbel noise G: a draw from softmax(inv_temp * scores).

    With this one the losses draw while they score, without the (B, N) scores.

    Args:
        inv_temp: inverse temperature; 0 draws uniformly.
        seed: of the noise; None: from torch's default generator, so `torch.manual_seed` decides.
            The generator is a buffer: it moves and is saved with the module.
    """

    def __init__(self, inv_temp: float = 1.0, *, seed: int | None = None) -> None:
        super().__init__()
        self.inv_temp = inv_temp
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        self.rng = Philox(seed)

    def forward(self, scores: Tensor) -> Tensor:
        return gumbel_max(scores, inv_temp=self.inv_temp, rng=self.rng_on(scores.device))

    def rng_on(self, device: torch.device) -> Philox:
        """The generator, moved to a device for good."""
        if self.rng.device != device:
            self.rng.to(device)
        return self.rng
