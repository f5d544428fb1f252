"""What the bound leaves over, with and without what makes it tight.

Hidden rows and weight rows are rounded in plain PyTorch (`emulation`), so that the remedies can be
taken away one by one; what the kernel itself reports stands beside it.
"""

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.inputs.trained import TrainedInputs, largest_logits
from benchmarks.studies.screening.emulation import REMEDIES, rounded_inputs
from benchmarks.studies.screening.facts import Finding
from benchmarks.studies.screening.kernel import screened


def study(inputs: TrainedInputs) -> list[Finding]:
    pooled = largest_logits(inputs.hidden, inputs.mask, inputs.weight) + inputs.bias
    active = (pooled > 0).float().mean().item()
    documents = len(inputs.mask)

    def finding(variant: str, quantity: str, value: float, unit: str) -> Finding:
        return Finding(
            study="survivors",
            model=inputs.model,
            dim=inputs.dim,
            dtype="float32",
            variant=variant,
            quantity=quantity,
            value=value,
            unit=unit,
            active=active,
        )

    found = [
        finding("", "median pooled logit", pooled.median().item(), ""),
        finding("", "active entries per document", active * pooled.shape[1], "entries"),
        finding("", "pairs per document", len(inputs.tokens) * pooled.shape[1] / documents, ""),
    ]
    for remedy in REMEDIES:
        bound, entries, pairs = survivors(inputs, remedy)
        found += [
            finding(remedy, "mean bound", bound, "of a logit"),
            finding(remedy, "candidate entries per document", entries / documents, "entries"),
            finding(remedy, "surviving pairs per document", pairs / documents, "pairs"),
        ]
    report = screened(inputs)
    return [
        *found,
        finding("kernel", "compared pairs per document", report.compared / documents, "pairs"),
        finding("kernel", "surviving pairs per document", report.pairs / documents, "pairs"),
    ]


def survivors(inputs: TrainedInputs, remedy: str) -> tuple[float, int, int]:
    """The mean bound, and how many entries and pairs of token and entry it leaves over.

    An entry is left where the largest product and the largest bound of its document together are
    positive; a pair where its own upper bound is positive and reaches every lower bound.
    """
    tokens, weight, shift = rounded_inputs(inputs, remedy)
    lengths = inputs.mask.sum(1).tolist()
    bounds: list[Tensor] = []
    entries = pairs = 0
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, end in pairwise(starts):
        residual = tokens.residual[start:end, None]
        norm = tokens.norm_of_rounded[start:end, None]
        products = tokens.rounded[start:end] @ weight.rounded.T + shift
        bound = residual * weight.norm + norm * weight.residual
        largest_bound = residual.max() * weight.norm + norm.max() * weight.residual
        entries += int((products.amax(0) + largest_bound > 0).sum())
        upper, lower = products + bound, products - bound
        pairs += int(((upper > 0) & (upper >= lower.amax(0))).sum())
        bounds.append(bound.mean(1))
    return torch.cat(bounds).mean().item(), entries, pairs
