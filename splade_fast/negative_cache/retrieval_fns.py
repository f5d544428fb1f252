"""Functions that map scores (B, N) to the indices (B, m) of negatives."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from splade_fast.ops.rng import Philox
from splade_fast.ops.sample import gumbel_max


class AbstractRetrievalFn(nn.Module, metaclass=abc.ABCMeta):
    """Base of functions that choose columns of scores (B, N), never one whose score is -inf."""

    @abc.abstractmethod
    def forward(self, scores: Tensor) -> Tensor:
        """Return the chosen columns, (B, m) int64."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """Chooses the highest score, and the first of equal scores.

    Example::

        >>> sf.negative_cache.MaxScoreRetrievalFn()(torch.tensor([[1.0, 3.0, 3.0]]))
        tensor([[1]])
    """

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=1, keepdim=True)


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """Draws from softmax(inv_temp * scores) as argmax(inv_temp * scores + G), G Gumbel noise.

    With this function the losses draw while they compute scores, and never store all (B, N) scores.

    Example::

        >>> draw = sf.negative_cache.GumbelMaxRetrievalFn(seed=0)
        >>> draw(torch.tensor([[0.0, 100.0, -torch.inf]]))
        tensor([[1]])

    Args:
        inv_temp: inverse temperature; 0 draws uniformly.
        seed: seed of the noise; None: a seed from torch's default generator, which
            `torch.manual_seed` sets. The state of the generator is a buffer of the module.
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
        """Move the generator to a device and return it."""
        if self.rng.device != device:
            self.rng.to(device)
        return self.rng
