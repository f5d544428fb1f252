"""Small calls: what choosing costs where the product itself is short.

A trained share of active entries and one of an untrained model, from a query of eight tokens to a
small batch; "auto" is asked on every call, as in the sweep.
"""

import dataclasses

import torch

from benchmarks.inputs.trained import ACTIVE, TrainedInputs
from benchmarks.studies.screening.facts import Finding
from benchmarks.studies.screening.sweep import base_finding, measured, with_shares

SIZES = ((1, 8), (1, 32), (1, 256), (4, 64), (8, 128))  # documents, tokens of each at most
SHARES = (ACTIVE, 0.5)


def study(inputs: TrainedInputs, dtype: torch.dtype, rounds: int, seconds: float) -> list[Finding]:
    found: list[Finding] = []
    for documents, length in SIZES:
        small = dataclasses.replace(
            inputs,
            hidden=inputs.hidden[:documents, :length].contiguous(),
            mask=inputs.mask[:documents, :length].contiguous(),
        )
        named = dataclasses.replace(small, model=f"{inputs.model}, {len(small.tokens)} tokens")
        base = base_finding("sizes", named, dtype)
        for shifted in with_shares(named, SHARES):
            found += measured(shifted.to(dtype), base, rounds, seconds)
    return found
