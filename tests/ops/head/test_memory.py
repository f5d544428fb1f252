"""Peak memory of a training step of the head."""

import sys

import pytest
import torch

import splade_fast as sf
from benchmarks.harness.memory import peak_growth
from tests.ops.instruction_sets import call_with, instruction_sets_here

BATCH, LENGTH, DIM, VOCABULARY = 8, 512, 128, 250_002
MEBIBYTE = 1 << 20
OWN = instruction_sets_here()[-1]


def extra_mebibytes_of_a_step() -> float:
    """Return the peak beyond output and gradients of a first step."""
    hidden = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    weight = torch.randn(VOCABULARY, DIM).div_(DIM**0.5).requires_grad_()
    bias = torch.full((VOCABULARY,), -3.0, requires_grad=True)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, *[70] * (BATCH - 1)])[:, None]
    upstream = torch.randn(BATCH, VOCABULARY)
    leaves = (hidden, weight, bias)
    sf.splade_head(hidden[:1, :8], weight[:50], bias[:50]).sum().backward()  # starts the libraries
    outputs = []

    def step() -> None:
        outputs.append(sf.splade_head(hidden, weight, bias, mask))
        outputs[0].backward(upstream)

    for leaf in leaves:
        leaf.grad = None
    growth = peak_growth(step)
    kept = [outputs[0], *(leaf.grad for leaf in leaves)]
    return (growth - sum(tensor.nbytes for tensor in kept)) / MEBIBYTE


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("isa", sorted({"avx2", OWN} & set(instruction_sets_here())))
def test_training_with_a_large_vocabulary(isa):
    assert call_with(isa, extra_mebibytes_of_a_step) <= 64
