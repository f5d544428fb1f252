"""Regularisers of an objective, with their schedules and running document frequencies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splade_fast._distributed import sum_over_ranks
from splade_fast.regularizers import (
    LinearSchedule,
    QuadraticSchedule,
    anti_zero_loss,
    df_flops_loss,
    document_frequencies,
    flops_loss,
    l1_loss,
)
from splade_fast.training.objective_arguments import ObjectiveArguments, regularizer_terms


class Sparsity(nn.Module):
    """Compute λ(step) · (flops + l1 + df_flops) + λ₀ · anti_zero, with the terms of the arguments.

    Args:
        arguments: arguments of the objective.
        side: side of the vectors, "query" or "document".
        vocab_size: size V of the vocabulary.
    """

    def __init__(self, arguments: ObjectiveArguments, side: str, vocab_size: int) -> None:
        super().__init__()
        name = f"{side}_regularizer"
        self.terms = regularizer_terms(name, getattr(arguments, name))
        weight = getattr(arguments, f"lambda_{side}")
        rising = arguments.regularizer_schedule != "constant"
        steps = arguments.regularizer_steps if rising else 0
        quadratic = arguments.regularizer_schedule == "quadratic"
        self.weight = (QuadraticSchedule if quadratic else LinearSchedule)(weight, steps)
        self.anti_zero_weight = arguments.lambda_anti_zero
        self.threshold = getattr(arguments, f"flops_threshold_{side}")
        self.alpha, self.beta = arguments.df_alpha, arguments.df_beta
        self.frequencies: RunningFrequencies | None = None
        if "df_flops" in self.terms:
            self.frequencies = RunningFrequencies(vocab_size, arguments.df_momentum)

    def forward(self, vectors: Tensor, step: int) -> Tensor:
        """Return the weighted sum, the same on all ranks; in training, update the frequencies.

        Args:
            vectors: (B, V).
            step: step of the schedule.
        """
        values = []
        if "flops" in self.terms:
            values.append(flops_loss(vectors, threshold=self.threshold))
        if "l1" in self.terms:
            values.append(l1_loss(vectors))
        if self.frequencies is not None:
            if self.training:
                self.frequencies.update(vectors)
            frequencies = self.frequencies.estimate()
            values.append(df_flops_loss(vectors, frequencies, alpha=self.alpha, beta=self.beta))
        total = vectors.new_zeros(())
        for value in values:
            total = total + self.weight(step) * value
        if "anti_zero" in self.terms:
            total = total + self.anti_zero_weight * anti_zero_loss(vectors)
        return total


class RunningFrequencies(nn.Module):
    """Estimate the share of vectors in which each term is active.

    The estimate is Σ_t momentum^t active_t / Σ_t momentum^t rows_t, where t counts the steps since
    a batch of all ranks; older batches have less weight. It is not biased towards 0 in the first
    steps.

    Args:
        vocab_size: size V of the vocabulary.
        momentum: weight of the past from 0, for the last batch alone, to below 1.
    """

    active: Tensor  # (V,) float32
    rows: Tensor  # () float32

    def __init__(self, vocab_size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("active", torch.zeros(vocab_size))
        self.register_buffer("rows", torch.zeros(()))

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Add a batch (B, V)."""
        seen = document_frequencies(vectors) * len(vectors)
        counts = sum_over_ranks(torch.cat([seen, torch.full_like(seen[:1], len(vectors))]))
        self.active.mul_(self.momentum).add_(counts[:-1])
        self.rows.mul_(self.momentum).add_(counts[-1])

    def estimate(self) -> Tensor:
        """Return the frequencies (V,) from 0 to 1; they are 0 before the first batch."""
        return self.active / self.rows.clamp(min=torch.finfo(self.rows.dtype).tiny)
