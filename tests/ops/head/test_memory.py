"""Peak memory of training steps of the head."""

import ctypes
import sys
import threading

import pytest
import torch

import splade_fast as sf
from benchmarks.harness.memory import peak_growth
from splade_fast.ops.head.screening import find_screening_state
from tests.ops.instruction_sets import call_with, instruction_sets_here

BATCH, LENGTH, DIM, VOCABULARY = 8, 512, 128, 250_002
STEPS = 3
MEBIBYTE = 1 << 20
OWN = instruction_sets_here()[-1]
MMAP_THRESHOLD = -3  # parameter of mallopt


def extra_mebibytes_of_steps() -> float:
    """Return the peak beyond output and gradients of steps that each change the weight."""
    # Freed blocks go back to the system: what glibc keeps for later is no need of the head.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, MEBIBYTE)
    hidden = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    weight = torch.randn(VOCABULARY, DIM).div_(DIM**0.5).requires_grad_()
    bias = torch.full((VOCABULARY,), -3.0, requires_grad=True)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, *[70] * (BATCH - 1)])[:, None]
    upstream = torch.randn(BATCH, VOCABULARY)
    leaves = (hidden, weight, bias)
    warm_up = sf.splade_head(hidden[:1, :8], weight[:50], bias[:50])
    warm_up.backward(torch.ones_like(warm_up))  # starts the libraries
    outputs = []

    def run() -> None:
        for _ in range(STEPS):
            outputs.clear()
            for leaf in leaves:
                leaf.grad = None
            outputs.append(sf.splade_head(hidden, weight, bias, mask))
            outputs[0].backward(upstream)
            with torch.no_grad():
                weight[0] += 1

    for leaf in leaves:
        leaf.grad = None
    growth = peak_growth(run)
    kept = [outputs[0], *(leaf.grad for leaf in leaves)]
    return (growth - sum(tensor.nbytes for tensor in kept)) / MEBIBYTE


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("isa", sorted({"avx2", OWN} & set(instruction_sets_here())))
def test_training_with_a_large_vocabulary(isa):
    assert call_with(isa, extra_mebibytes_of_steps) <= 64


def make_call(count=16):
    hidden = torch.randn(count, 40, 64)
    weight = torch.randn(300, 64)
    return hidden, weight, torch.full((300,), -20.0)


def addresses(weight):
    prepared = find_screening_state(weight, weight.dtype).prepared
    return prepared.packed.data_ptr(), prepared.rows.data_ptr()


def assert_is_exact(hidden, weight, bias):
    screened = sf.splade_head(hidden, weight, bias, algorithm="screened")
    assert torch.equal(screened, sf.splade_head(hidden, weight, bias, algorithm="dense"))


@pytest.mark.parametrize("is_inference", [False, True])
def test_a_changed_weight_is_prepared_in_the_same_memory(is_inference):
    hidden, weight, bias = make_call()
    with torch.inference_mode(is_inference):
        sf.splade_head(hidden, weight, bias, algorithm="screened")
    before = addresses(weight)
    for _ in range(3):
        weight.neg_()
        assert_is_exact(hidden, weight, bias)
        assert addresses(weight) == before


def test_memory_that_a_thread_uses_is_not_written(monkeypatch):
    """A better mean is prepared while another thread computes with the first one."""
    hidden, weight, bias = make_call()
    forward = torch.ops.splade_fast.head_forward_screened
    is_in_product, may_go_on = threading.Event(), threading.Event()
    results = []

    def waiting(*arguments):
        if threading.current_thread() is not threading.main_thread():
            is_in_product.set()
            assert may_go_on.wait(60)
        return forward(*arguments)

    monkeypatch.setattr(torch.ops.splade_fast, "head_forward_screened", waiting)
    thread = threading.Thread(
        target=lambda: results.append(
            sf.splade_head(hidden[:1], weight, bias, algorithm="screened")
        )
    )
    thread.start()
    assert is_in_product.wait(60)
    first = find_screening_state(weight, weight.dtype).prepared
    kept = first.packed.clone(), first.rows.clone()
    assert_is_exact(hidden, weight, bias)
    assert addresses(weight) != (first.packed.data_ptr(), first.rows.data_ptr())
    assert torch.equal(first.packed, kept[0])
    assert torch.equal(first.rows, kept[1])
    may_go_on.set()
    thread.join()
    assert torch.equal(results[0], sf.splade_head(hidden[:1], weight, bias, algorithm="dense"))
    assert first.num_users == 0
