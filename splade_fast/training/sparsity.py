"""The regularisers of an objective, with their schedule and what they estimate."""

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
    """λ(step) (flops + l1 + df_flops) + λ₀ anti_zero, as many of them as there are to be.

    Args:
        arguments: those of the objective.
        side: "query" or "document": whose.
        vocab_size: V.
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
        """A scalar, the same on all ranks; in training mode the estimate goes on.

        Args:
            vectors: (B, V).
            step: of the schedule.
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
    """In which share of the vectors seen each term is active; older batches count less.

    estimate = Σ_t momentum^t active_t / Σ_t momentum^t rows_t over the batches of all ranks, t
    steps ago. It has no bias towards 0 in the first steps.

    Args:
        vocab_size: V.
        momentum: from 0, the last batch alone, to below 1.
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
        """Take a batch (B, V) into account."""
        seen = document_frequencies(vectors) * len(vectors)
        counts = sum_over_ranks(torch.cat([seen, torch.full_like(seen[:1], len(vectors))]))
        self.active.mul_(self.momentum).add_(counts[:-1])
        self.rows.mul_(self.momentum).add_(counts[-1])

    def estimate(self) -> Tensor:
        """(V,) from 0 to 1; 0 before the first batch."""
        return self.active / self.rows.clamp(min=torch.finfo(self.rows.dtype).tiny)
