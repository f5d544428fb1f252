"""Averages of metrics over steps and processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from splade_fast._distributed import world_size


class MetricAverages:
    """Weighted averages of metrics since the last call of `compute_and_reset`.

    Adding a metric does not wait for a GPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = defaultdict(int)

    def add(self, metrics: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add one scalar of each metric."""
        for name, value in metrics.items():
            term = value.detach().double() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._weights[name] += weight

    def compute_and_reset(self, device: torch.device) -> dict[str, float]:
        """Return the averages over all processes, which must have added the same names.

        Args:
            device: device of the collective.
        """
        names = sorted(self._sums)
        sums = [self._sums[name].to(device) for name in names]
        weights = [float(self._weights[name]) for name in names]
        self.reset()
        if not names:
            return {}
        totals = torch.stack([torch.stack(sums), torch.tensor(weights, device=device).double()])
        if world_size() > 1:
            dist.all_reduce(totals)
        return dict(zip(names, (totals[0] / totals[1]).tolist(), strict=True))

    def reset(self) -> None:
        """Forget all metrics."""
        self._sums.clear()
        self._weights.clear()
