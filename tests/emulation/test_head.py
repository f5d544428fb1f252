"""head on the emulated GPU: the kernels for every GPU, and the one of sm_90a."""

import pytest
import torch

from splade_fast import reference
from tests.emulation.inputs import NAN, assert_same, small_integers, starts_of, with_strides
from tests.ops.head.test_head import HALF, compare
from tests.ops.inputs import ACTIVATIONS, DTYPES, POOLINGS, lattice
from tests.tolerances import assert_accurate

CPU = torch.device("cpu")


def drawn_sequences(draw, batch, length, dim, make):
    """Return hidden, mask and cu_seqlens of padded or packed hidden states."""
    if draw.random() < 0.5:
        share = draw.choice([None, 0.0, 0.5, 0.9])
        mask = None if share is None else torch.rand(batch, length) < share
        return make(batch, length, dim), mask, None
    lengths = [draw.choice([0, 1, 5, length, length]) for _ in range(batch)]
    return make(sum(lengths), dim), None, starts_of(lengths)


def test_matches_reference(monkeypatch, emulator, draw):
    # The functions see CPU tensors, which may be screened.
    monkeypatch.setattr("splade_fast.ops.head.forward.should_consider_screening", lambda *_: False)
    dtype = draw.choice(DTYPES)
    dim, vocabulary = draw.choice([1, 3, 8, 16, 40, 130]), draw.choice([1, 2, 7, 64, 101, 260])

    def make(*shape):
        return lattice(*shape, dtype=dtype, device=CPU)

    batch, length = draw.choice([1, 2, 5]), draw.choice([0, 1, 3, 17, 70])
    hidden, mask, cu_seqlens = drawn_sequences(draw, batch, length, dim, make)
    bias = draw.choice([None, make(vocabulary)])
    for pooling in POOLINGS:
        with emulator.in_place():
            compare(
                *(
                    with_strides(draw, hidden),
                    with_strides(draw, make(vocabulary, dim)),
                    bias,
                    mask,
                ),
                cu_seqlens=cu_seqlens,
                pooling=pooling,
                activation=draw.choice(ACTIVATIONS),
            )


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setenv("SPLADE_FAST_HOPPER", "1")


def test_fused_is_that_of_the_cpu(fused, emulator, draw):
    """Draw sizes with whole and partial tiles, and sequences in one tile and in several."""
    dtype = draw.choice([*HALF, torch.float32])
    dim, vocabulary = (
        draw.choice([8, 40, 64, 136, 320]),
        draw.choice([1, 100, 128, 130, 257, 300]),
    )

    def make(*shape):
        return small_integers(*shape, dtype=dtype)

    batch, length = draw.choice([(1, 600), (2, 300), (5, 70), (5, 17), (40, 3), (2, 1)])
    hidden, mask, cu_seqlens = drawn_sequences(draw, batch, length, dim, make)
    if mask is not None:
        hidden[~mask] = NAN
    weight = make(vocabulary, dim)
    if draw.random() < 0.3:
        weight[draw.randrange(vocabulary), 0] = draw.choice([NAN, torch.inf])
    bias = draw.choice([None, make(vocabulary)])
    hidden, weight = with_strides(draw, hidden), with_strides(draw, weight)
    for save in (True, False):
        arguments = hidden, weight, bias, mask, cu_seqlens, 0, 0, save, draw.random() < 0.5, True
        pooled, maximum, argmax = emulator.ops.head_forward_dense(*arguments)
        expected = torch.ops.splade_fast.head_forward_dense(*arguments)
        assert_same(pooled, expected[0])
        assert_same(maximum, expected[1])
        counted = expected[1] != -torch.inf
        assert_same(argmax.where(counted, 0), expected[2].where(counted, 0))


def as_tf32(x):
    """Clear the bits that TF32 does not have."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_tf32_only_where_it_is_allowed(fused, emulator, draw):
    dim, vocabulary = draw.choice([4, 36, 128]), draw.choice([3, 200])
    hidden, mask, cu_seqlens = drawn_sequences(draw, 3, 90, dim, torch.randn)
    weight, bias = torch.randn(vocabulary, dim), torch.randn(vocabulary)
    sequences = {"attention_mask": mask, "cu_seqlens": cu_seqlens}
    for allowed in (True, False):
        operands = (as_tf32(hidden), as_tf32(weight)) if allowed else (hidden, weight)
        tensors = (*operands, bias)
        truth = reference.splade_head(*(x.double() for x in tensors), **sequences)
        baseline = reference.splade_head(*tensors, **sequences)
        pooled, *_ = emulator.ops.head_forward_dense(
            hidden, weight, bias, mask, cu_seqlens, 0, 1, False, False, allowed
        )
        assert_accurate(pooled, truth, baseline)


@pytest.mark.usefixtures("overlapping_outputs")  # sequences that overlap
@pytest.mark.parametrize("hopper", ["0", "1"])
def test_disorder_comes_to_an_end(monkeypatch, emulator, draw, hopper):
    """Check that no thread diverges, waits for ever or crashes with any cu_seqlens and argmax."""
    monkeypatch.setenv("SPLADE_FAST_HOPPER", hopper)
    batch, vocabulary, dim = draw.choice([1, 2, 6]), draw.choice([1, 64, 200]), draw.choice([8, 24])
    rows, dtype = draw.choice([1, 20, 300, 700]), draw.choice(DTYPES)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocabulary, dim).to(dtype)
    starts = torch.randint(-5, rows + 9, (batch + 1,)).int()
    for pooling in (0, 1):
        pooled, *_ = emulator.ops.head_forward_dense(
            hidden, weight, None, None, starts, pooling, 1, True, False, True
        )
        assert pooled.shape == (batch, vocabulary)
    grad, maximum = torch.randn(batch, vocabulary).to(dtype), torch.randn(batch, vocabulary).to(acc)
    argmax = torch.randint(-9, rows + 9, (batch, vocabulary)).int()
    needs = True, True, True
    for gradients in (
        emulator.ops.head_backward_max(grad, maximum, argmax, hidden, weight, starts, 1, *needs),
        emulator.ops.head_backward_sum(grad, hidden, weight, None, None, starts, 1, *needs),
    ):
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape, (vocabulary,)]


def test_fused_reads_no_memory_that_nothing_wrote(fused, emulator, draw):
    dtype, dim = draw.choice([*HALF, torch.float32]), draw.choice([64, 136])
    batch, length = draw.choice([(1, 600), (3, 70)])
    mask = torch.rand(batch, length) < draw.choice([0.1, 0.6])
    hidden, weight = torch.randn(batch, length, dim).to(dtype), torch.randn(130, dim).to(dtype)
    with emulator.written_memory():
        emulator.ops.head_forward_dense(hidden, weight, None, mask, None, 0, 0, True, False, True)


def test_too_many_rows_of_blocks(emulator):
    """Refuse a grid that a GPU refuses."""
    dim = 65535 * 256 + 1
    hidden, weight = torch.empty(1, 1, dim).half(), torch.empty(1, dim).half()
    one = torch.ones(1, 1).half()
    with pytest.raises(RuntimeError, match="too many rows of blocks for one launch: 65536"):
        emulator.ops.head_backward_max(
            *(one, one.float(), torch.zeros(1, 1).byte(), hidden, weight, None, 0),
            *(False, True, False),
        )
