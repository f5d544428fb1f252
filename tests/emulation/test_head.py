"""head on the emulated GPU: the kernels for every GPU, and the fused one of sm_90a."""

import pytest
import torch

from splade_fast import reference
from splade_fast.ops.head import fp8
from splade_fast.ops.head.forward import HeadCall, forward_fp8
from tests.emulation.inputs import NAN, assert_same, small_integers, starts_of
from tests.ops.head.test_head import HALF, compare
from tests.ops.inputs import ACTIVATIONS, DTYPES, POOLINGS, lattice
from tests.tolerances import assert_accurate

CPU = torch.device("cpu")


def drawn_sequences(draw, batch, length, dim, make):
    """Padded hidden states with or without a mask, or packed ones: hidden, mask, cu_seqlens."""
    if draw.random() < 0.5:
        share = draw.choice([None, 0.0, 0.5, 0.9])
        mask = None if share is None else torch.rand(batch, length) < share
        return make(batch, length, dim), mask, None
    lengths = [draw.choice([0, 1, 5, length, length]) for _ in range(batch)]
    return make(sum(lengths), dim), None, starts_of(lengths)


def test_matches_reference(monkeypatch, emulator, draw):
    # The functions see CPU tensors, which may be screened.
    monkeypatch.setattr("splade_fast.ops.head.forward.is_candidate", lambda *_: False)
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
                *(hidden, make(vocabulary, dim), bias, mask),
                cu_seqlens=cu_seqlens,
                pooling=pooling,
                activation=draw.choice(ACTIVATIONS),
            )


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setenv("SPLADE_FAST_HOPPER", "1")


def test_fused_is_that_of_the_cpu(fused, emulator, draw):
    """Whole and partial tiles on either side, sequences in one tile and in several."""
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
    for save in (True, False):
        arguments = hidden, weight, bias, mask, cu_seqlens, 0, 0, save, draw.random() < 0.5, True
        pooled, maximum, argmax = emulator.ops.head_forward_dense(*arguments)
        expected = torch.ops.splade_fast.head_forward_dense(*arguments)
        assert_same(pooled, expected[0])
        assert_same(maximum, expected[1])
        counted = expected[1] != -torch.inf
        assert_same(argmax.where(counted, 0), expected[2].where(counted, 0))


def as_tf32(x):
    """Without the bits that TF32 does not have."""
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


def e4m3_lattice(*shape):
    """Numbers that e4m3 has, whose products and their sums are exact in every order."""
    return torch.randint(-7, 8, shape) * 2.0 ** torch.randint(-3, 1, shape)


def test_scaled_is_the_maximum_times_its_scales(fused, emulator, draw):
    dim, vocabulary = draw.choice([16, 48, 128, 160]), draw.choice([1, 100, 130, 300])
    batch, length = draw.choice([(1, 600), (5, 70), (40, 3)])
    hidden, mask, cu_seqlens = drawn_sequences(draw, batch, length, dim, e4m3_lattice)
    weight = e4m3_lattice(vocabulary, dim)
    if draw.random() < 0.3:
        weight[draw.randrange(vocabulary), 0] = NAN
    if mask is not None:
        hidden[~mask] = NAN
    bias = draw.choice([None, torch.randn(vocabulary)])
    hidden_scale = 2.0 ** torch.randint(-9, 9, (batch,))
    weight_scale = 2.0 ** torch.randint(-9, 9, (vocabulary,))
    for save in (True, False):
        operands = hidden.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        pooled, maximum, argmax = emulator.ops.head_forward_scaled(
            *operands, hidden_scale, weight_scale, bias, mask, cu_seqlens, 1, save
        )
        if not hidden.numel():
            assert not pooled.numel()  # nothing to multiply: not for this kernel
            continue
        # Powers of two commute with rounding.
        expected = torch.ops.splade_fast.head_forward_dense(
            restored_sequences(hidden, hidden_scale, cu_seqlens),
            *(weight * weight_scale[:, None], bias, mask, cu_seqlens, 0, 1, save, False),
        )
        torch.testing.assert_close(pooled, expected[0], equal_nan=True)
        torch.testing.assert_close(maximum, expected[1], rtol=0, atol=0, equal_nan=True)
        counted = expected[1] != -torch.inf
        assert_same(argmax.where(counted, 0), expected[2].where(counted, 0))


def restored_sequences(hidden, scale, cu_seqlens):
    if cu_seqlens is None:
        return hidden * scale[:, None, None]
    return hidden * scale.repeat_interleave(cu_seqlens.diff())[:, None]


def test_fp8_is_that_of_the_cpu(fused, emulator, draw):
    """The operands and scales of precision="fp8", by the fused kernel and by the ordinary one."""

    def integers(*shape):
        return torch.randint(-40, 41, shape) * 2.0 ** draw.randint(-9, 9)

    dim, vocabulary = draw.choice([16, 80]), draw.choice([7, 140])
    hidden, mask, cu_seqlens = drawn_sequences(draw, 5, 70, dim, integers)
    weight, bias = integers(vocabulary, dim), draw.choice([None, integers(vocabulary)])
    if draw.random() < 0.3:
        weight[draw.randrange(vocabulary), 0] = draw.choice([NAN, torch.inf])
    expected = forward_fp8(HeadCall(hidden, weight, bias, mask, cu_seqlens, 0, 1, True, False))
    sequence_scale, token_scale = fp8.hidden_scales(hidden, mask, cu_seqlens)
    entry_scale = fp8.weight_scales(weight)
    operands = fp8.rounded(hidden, token_scale), fp8.rounded(weight, entry_scale)
    pooled, maximum, argmax = emulator.ops.head_forward_scaled(
        *operands, sequence_scale, entry_scale, bias, mask, cu_seqlens, 1, True
    )
    if hidden.numel():
        torch.testing.assert_close(pooled, expected[0], equal_nan=True)
        assert_same(maximum, expected[1])
        counted = expected[1] != -torch.inf
        assert_same(argmax.where(counted, 0), expected[2].where(counted, 0))


def test_scaled_computes_nothing_where_it_cannot_run(monkeypatch, emulator):
    def outputs(dim):
        operands = torch.ones(2, 3, dim), torch.ones(5, dim)
        scales = torch.ones(2), torch.ones(5)
        return emulator.ops.head_forward_scaled(
            *(x.to(torch.float8_e4m3fn) for x in operands), *scales, None, None, None, 1, True
        )

    monkeypatch.setenv("SPLADE_FAST_HOPPER", "0")
    assert all(x.numel() == 0 for x in outputs(16))
    monkeypatch.setenv("SPLADE_FAST_HOPPER", "1")
    assert all(x.numel() == 0 for x in outputs(24))
    assert all(x.shape == (2, 5) for x in outputs(32))


@pytest.mark.parametrize("hopper", ["0", "1"])
def test_disorder_comes_to_an_end(monkeypatch, emulator, draw, hopper):
    """Whatever stands in cu_seqlens and argmax, no thread diverges, waits for ever or crashes."""
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
    operands = (torch.randn(n, 16).to(torch.float8_e4m3fn) for n in (rows, vocabulary))
    ones = torch.ones(batch), torch.ones(vocabulary)
    emulator.ops.head_forward_scaled(*operands, *ones, None, None, starts, 1, True)
    grad, maximum = torch.randn(batch, vocabulary).to(dtype), torch.randn(batch, vocabulary).to(acc)
    argmax = torch.randint(-9, rows + 9, (batch, vocabulary)).int()
    needs = True, True, True
    for gradients in (
        emulator.ops.head_backward_max(grad, maximum, argmax, hidden, weight, starts, 1, *needs),
        emulator.ops.head_backward_sum(grad, hidden, weight, None, None, starts, 1, *needs),
    ):
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape, (vocabulary,)]
