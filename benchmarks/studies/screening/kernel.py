"""The screened product without the choice in front of it, and what it reports."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs.trained import TrainedInputs


@dataclass(frozen=True)
class Report:
    pooled: Tensor  # (B, V)
    compared: int  # pairs of token and entry whose bounds were looked at one by one
    pairs: int  # multiplied in full precision


def prepared(inputs: TrainedInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of the tokens, and what head_prepare makes of the weight with it."""
    mean = inputs.tokens.float().mean(0)
    packed, rows = torch.ops.splade_fast.head_prepare(inputs.weight, mean)
    return mean, packed, rows


def screened(inputs: TrainedInputs) -> Report:
    """Max pooling and log1p_relu, as the head's defaults."""
    pooled, _, _, report = torch.ops.splade_fast.head_forward_screened(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.mask.bool(),
        None,
        0,
        1,
        False,
        False,
        *prepared(inputs),
        None,
        None,
        False,
    )
    _, compared, pairs, _ = report.tolist()
    return Report(pooled, compared, pairs)
