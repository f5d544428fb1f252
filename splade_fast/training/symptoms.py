"""Symptoms of a training that has failed, found in the averages that the log shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from splade_fast.training.objective_arguments import ObjectiveArguments

_NEARLY_ALL = 0.99
# Metric that is 0 without negatives, by loss.
_COMPARISON = {
    "in_batch": "relevance_loss",
    "pairwise": "relevance_loss",
    "negative_cache": "cache/interpretable_prediction_loss",
}
_SIDES = {"query": "queries", "document": "documents"}


class Symptoms:
    """Describe each kind of failure the first time that it occurs.

    Vectors without active dims, or with nearly all dims active once the regulariser has its final
    weight; losses that are not finite; and a relevance loss of 0, as without negatives.

    Args:
        arguments: arguments of the objective.
        vocab_size: size V of the vocabulary.
    """

    def __init__(self, arguments: ObjectiveArguments, vocab_size: int) -> None:
        self._arguments = arguments
        self._vocab_size = vocab_size
        self._seen: set[str] = set()

    def new_ones(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Return a sentence for each kind of failure that no earlier call returned.

        Args:
            metrics: averages of the metrics of `Objective` over some steps.
            step: the last of these steps.
        """
        found = [pair for pair in self._find(metrics, step) if pair[0] not in self._seen]
        self._seen.update(kind for kind, _ in found)
        return [text for _, text in found]

    def _find(self, metrics: Mapping[str, float], step: int) -> Iterator[tuple[str, str]]:
        infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
        if infinite:
            yield (
                "infinite",
                f"{infinite[0]} is {metrics[infinite[0]]}: the weights may be damaged; lower "
                "learning_rate or max_grad_norm, and prefer bf16 to fp16",
            )
            return
        for side, vectors in _SIDES.items():
            active = metrics.get(f"{side}_active_dims")
            if active is not None:
                yield from self._find_collapse(side, vectors, active, step)
        terms = self._arguments.loss_terms()
        loss = next(iter(terms)) if len(terms) == 1 else ""
        name = _COMPARISON.get(loss, "")
        # An empty cache has no negatives in the first step.
        if metrics.get(name) == 0 and (loss != "negative_cache" or step > 1):
            yield (
                "no negatives",
                f"{name} is 0: the batches have no negatives, or the scores tell all "
                "documents apart; raise per_device_train_batch_size or add hard negatives",
            )

    def _find_collapse(
        self, side: str, vectors: str, active: float, step: int
    ) -> Iterator[tuple[str, str]]:
        weight = f"lambda_{side}"
        given = f"{weight} (now {getattr(self._arguments, weight):g})"
        if active < 1:
            share = "no" if active == 0 else f"on average {active:.2g}"
            yield (
                f"{side} empty",
                f"the vectors of {vectors} have {share} active dims: lower {given}, or add "
                f"anti_zero to {side}_regularizer",
            )
        if active > _NEARLY_ALL * self._vocab_size and not self._is_rising(step):
            yield (
                f"{side} full",
                f"the vectors of {vectors} have {active:.0f} of {self._vocab_size} dims active: "
                f"raise {given}"
                + (
                    f" and set {side}_regularizer"
                    if getattr(self._arguments, f"{side}_regularizer") == "none"
                    else ""
                ),
            )

    def _is_rising(self, step: int) -> bool:
        """Return whether the regularisers have not reached their final weight."""
        arguments = self._arguments
        is_constant = arguments.regularizer_schedule == "constant"
        return not is_constant and step < arguments.regularizer_steps
