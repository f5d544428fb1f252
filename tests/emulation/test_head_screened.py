"""The screened head of sm_90a on the emulated GPU, compared with the dense head of the CPU."""

import pytest
import torch

from splade_fast.ops.head import screening_hopper
from splade_fast.ops.head.screening import ScreeningState
from tests.emulation.inputs import INF, NAN, assert_same, small_integers, starts_of
from tests.emulation.test_head import CPU, drawn_sequences
from tests.ops.head.test_head import HALF, compare
from tests.ops.inputs import ACTIVATIONS, lattice
from tests.tolerances import assert_accurate

SEQUENCES = [(1, 600), (2, 300), (5, 70), (5, 17), (40, 3), (2, 1)]
VOCABULARIES = [1, 100, 128, 130, 257, 300]


def drawn_mean(draw, hidden):
    """Return a mean: zeros, the real mean or random values, since any vector is valid."""
    dim = hidden.shape[-1]
    tokens = hidden.reshape(-1, dim).float().nan_to_num()
    means = [torch.zeros(dim), tokens.sum(0) / max(1, len(tokens)), 10 * torch.randn(dim)]
    return draw.choice([*means, *means, torch.full((dim,), INF)])


def screened(emulator, mean, hidden, weight, *arguments):
    """Return pooled, max_logits, argmax and the report."""
    prepared = emulator.ops.head_prepare(weight, mean)
    return emulator.ops.head_forward_screened(
        hidden, weight, *arguments, mean, *prepared, None, None, False
    )


def assert_dense(found, arguments):
    """Assert values, and maxima and positions where positive, of the dense head of the CPU."""
    pooled, maximum, argmax = torch.ops.splade_fast.head_forward_dense(*arguments)
    assert_same(found[0], pooled)
    active = ~(maximum <= 0)
    assert_same(found[1].where(active, 0), maximum.where(active, 0))
    assert_same(found[2].where(active, 0), argmax.where(active, 0))
    assert (found[1].where(~active, 0) <= 0).all()


def few_active(hidden, weight, share):
    """Return an integer bias that leaves about this share of the entries of a token active."""
    logits = hidden.reshape(-1, hidden.shape[-1]).nan_to_num().float() @ weight.float().T
    if logits.numel() == 0:
        return torch.zeros(len(weight), dtype=weight.dtype)
    level = logits.flatten().sort().values[int((1 - share) * (logits.numel() - 1))]
    return (torch.randint(-3, 4, (len(weight),)) - level).round().to(weight.dtype)


def test_is_that_of_the_cpu(emulator, draw):
    """Draw whole and partial tiles, and each size of a rotated block."""
    dtype, vocabulary = draw.choice(HALF), draw.choice(VOCABULARIES)
    dim = draw.choice([8, 40, 64, 128, 136, 256, 320, 512])

    def make(*shape):
        return small_integers(*shape, dtype=dtype)

    batch, length = draw.choice(SEQUENCES)
    hidden, mask, cu_seqlens = drawn_sequences(draw, batch, length, dim, make)
    weight = make(vocabulary, dim)
    bias = draw.choice([None, *2 * [few_active(hidden, weight, draw.choice([0.001, 0.02, 0.5]))]])
    if mask is not None:
        hidden[~mask] = NAN
    if draw.random() < 0.2:
        weight[draw.randrange(vocabulary), 0] = draw.choice([NAN, INF])
    if draw.random() < 0.2 and hidden.numel():
        hidden.view(-1)[draw.randrange(hidden.numel())] = draw.choice([NAN, INF, -INF])
    if bias is not None and draw.random() < 0.3:
        bias[draw.randrange(vocabulary)] = draw.choice([NAN, INF, -INF])
    mean, activation = drawn_mean(draw, hidden), draw.randrange(3)
    if hidden.numel() == 0:
        return
    for save in (True, False):
        arguments = hidden, weight, bias, mask, cu_seqlens, 0, activation, save, draw.random() < 0.5
        found = screened(emulator, mean, *arguments)
        if activation == 0:
            assert_dense(found, arguments)
        else:
            expected = torch.ops.splade_fast.head_forward_dense(*arguments)
            torch.testing.assert_close(found[0], expected[0], equal_nan=True)


def test_reads_no_memory_that_nothing_wrote(emulator, draw):
    dtype, dim, (batch, length) = draw.choice(HALF), draw.choice([64, 136]), (3, 150)
    hidden, weight = torch.randn(batch, length, dim).to(dtype), torch.randn(130, dim).to(dtype)
    mask, cu_seqlens = torch.rand(batch, length) < draw.choice([0.1, 0.6]), None
    if draw.random() < 0.5:  # some rows behind the last sequence
        hidden, mask, cu_seqlens = hidden.flatten(0, 1), None, starts_of([9, 0, 291])
    arguments = hidden, weight, None, mask, cu_seqlens, 0, 0, True, False
    with emulator.written_memory():
        screened(emulator, torch.zeros(dim), *arguments)


def rotation(dim):
    """Compute the orthogonal matrix of the rotation from its definition, in float64."""
    padded = -(-dim // 64) * 64
    block = min(padded & -padded, 1024)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    bits = torch.arange(dim) * 0x9E3779B9 & 0xFFFFFFFF
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    signs = 1.0 - 2.0 * (bits >> 31)
    blocks = torch.block_diag(*[hadamard] * (padded // block)) / block**0.5
    return signs[:, None] * blocks[:dim]


@pytest.mark.parametrize("dim", [8, 64, 136, 256, 384, 1024, 2048])
def test_rounded_rows(emulator, dim):
    """Compare integers and bounds with the formulas in float64: bounds hold and are tight."""
    sizes = torch.tensor([0.0, 2.0**-60, 2.0**-39, 1.0, 1.0, 2.0**40, 2.0**52, INF, NAN])
    weight = (torch.randn(len(sizes), dim) * sizes[:, None]).bfloat16()
    weight[4, 3] = 100  # an outlier
    mean = torch.randn(dim)
    packed, (scale, residual, norm, mean_dot, _) = emulator.ops.head_prepare(weight, mean)
    rotated = weight.double() @ rotation(dim)
    largest = rotated.abs().amax(1)
    is_rounded = (largest >= 2.0**-40) & (largest <= 2.0**50)
    assert is_rounded.tolist() == [False, False, True, True, True, True, False, False, False]
    assert (packed[~is_rounded] == 0).all()
    assert (scale[~is_rounded] == 0).all()
    assert residual[6:].isinf().all()
    rows, integers = rotated[:6], packed[:6].double()
    torch.testing.assert_close(scale[2:6], (largest[2:6] / 127).float())
    assert (integers[2:6].abs().amax(1) == 127).all()
    lost = rows - scale[:6, None].double() * integers
    assert (lost.abs().amax(1)[2:] <= 0.501 * scale[2:6]).all()
    true = lost.norm(dim=1)
    assert (residual[:6] >= true).all()
    assert (residual[2:6] <= 1.01 * true[2:]).all()
    assert (norm[:6] >= rows.norm(dim=1)).all()
    assert (norm[2:6] <= 1.01 * rows.norm(dim=1)[2:] + residual[2:6]).all()
    exact = weight[:6].double() @ mean.double()
    slack = (weight[:6].double().abs() @ mean.double().abs()) * dim * 2.0**-24
    assert ((mean_dot[:6] - exact).abs() <= slack).all()


def test_logits_around_zero(emulator, draw):
    """Check logits just above and below zero of rows that int8 cannot represent."""
    dtype, dim = draw.choice(HALF), draw.choice([16, 64, 256])
    vocabulary, tokens = draw.choice(VOCABULARIES), draw.choice([1, 30, 257, 400])
    hidden = torch.randint(-255, 256, (1, tokens, dim)).to(dtype)
    weight = torch.randint(-255, 256, (vocabulary, dim)).to(dtype)
    if draw.random() < 0.5:  # outliers: all others are hardly seen beside them
        hidden[..., 3], weight[:, 5] = 255, 255
        hidden[..., 5], weight[:, 3] = hidden[..., 5].sign(), weight[:, 3].sign()
    scale = (
        2.0 ** draw.choice([0, 0, -6]) if dtype == torch.float16 else 2.0 ** draw.choice([0, -20])
    )
    logits = (hidden[0].float() @ weight.float().T).amax(0) if draw.random() < 0.7 else 0
    # In float16 the largest logits would be infinite.
    weight, bias = weight * 2.0**-9, -(logits + torch.randint(-2, 3, (vocabulary,))) * 2.0**-9
    arguments = hidden * scale, weight, (bias * scale).to(dtype), None, None, 0, 0, True, True
    assert_dense(screened(emulator, drawn_mean(draw, hidden * scale), *arguments), arguments)


def test_rows_of_every_size(emulator, draw):
    """Check scales so small that rows are not rounded, and so large that nothing is proved."""
    batch, length, dim, vocabulary = 2, draw.choice([20, 150]), 24, draw.choice([40, 140])
    sizes = torch.tensor([-60, -44, -40, -30, 0, 0, 0, 20, 49, 52]).double()
    hidden = small_integers(batch, length, dim, dtype=torch.bfloat16).double()
    weight = small_integers(vocabulary, dim, dtype=torch.bfloat16).double()
    top = draw.choice([7, 10])
    hidden *= torch.exp2(sizes[torch.randint(top, (batch, length, 1))])
    weight *= torch.exp2(sizes[torch.randint(top, (vocabulary, 1))])
    weight[draw.randrange(vocabulary)] = 0
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    bias = draw.choice([None, torch.full((vocabulary,), -30.0).bfloat16()])
    arguments = hidden, weight, bias, None, None, 0, 0, True, True
    assert_dense(screened(emulator, drawn_mean(draw, hidden), *arguments), arguments)


def test_trained_activity(emulator, draw):
    """Check states with a common mean and an outlier dimension: few candidates, accurate values."""
    dtype, dim, vocabulary = draw.choice(HALF), draw.choice([96, 256]), 400
    hidden = torch.randn(6, 40, dim) + torch.randn(dim)
    hidden[..., 7] *= 8
    weight = torch.randn(vocabulary, dim) / dim**0.5
    bias = -(hidden @ weight.T).amax(1).flatten().quantile(0.99).expand(vocabulary)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    mean = hidden.float().mean((0, 1))
    arguments = hidden, weight, bias, None, None, 0, 1, True, True
    pooled, maximum, argmax, report = screened(emulator, mean, *arguments)
    baseline = torch.ops.splade_fast.head_forward_dense(*arguments)[0]
    wide = hidden.double(), weight.double(), bias.double(), *arguments[3:]
    truth = torch.ops.splade_fast.head_forward_dense(*wide)[0]
    assert_accurate(pooled, truth, baseline.float())
    positive = maximum > 0
    at_argmax, plain = (
        (hidden.to(acc) @ weight.to(acc).T + bias.to(acc)).gather(1, argmax.long()[:, None])[:, 0]
        for acc in (torch.float64, torch.float32)
    )
    assert_accurate(maximum[positive], at_argmax[positive], plain[positive])
    assert report[0] == 0
    assert positive.sum() <= report[2] < 0.02 * 6 * 40 * vocabulary


def test_gradients(emulator, draw, monkeypatch):
    """Call the public function, which runs the emulated screened head."""
    dtype, activation = draw.choice(HALF), draw.choice(ACTIVATIONS)
    dim, vocabulary = draw.choice([8, 40, 128]), draw.choice([1, 101, 260])

    def make(*shape):
        return lattice(*shape, dtype=dtype, device=CPU)

    batch, length = draw.choice([(1, 300), (5, 17), (3, 70)])
    hidden, mask, cu_seqlens = drawn_sequences(draw, batch, length, dim, make)
    bias = draw.choice([None, make(vocabulary) - 3])
    if hidden.numel() == 0:
        return
    monkeypatch.setattr("splade_fast.ops.head.screening.MAX_BASIS_DIM", 0)
    options = {"cu_seqlens": cu_seqlens, "activation": activation, "algorithm": "screened"}
    with emulator.in_place():
        compare(hidden, make(vocabulary, dim), bias, mask, **options)


def test_too_many_candidates(emulator, draw):
    """Check that the dense kernel computes everything if the list of candidates overflows."""
    dtype, vocabulary = draw.choice(HALF), draw.choice([130, 300])
    hidden, weight = (
        small_integers(2, 300, 40, dtype=dtype),
        small_integers(vocabulary, 40, dtype=dtype),
    )
    bias = torch.full((vocabulary,), 200.0).to(dtype)
    for save in (True, False):
        arguments = hidden, weight, bias, None, None, 0, 0, save, True
        found = screened(emulator, torch.zeros(40), *arguments)
        assert found[3].tolist() == [1, 0, 0, 100]
        expected = torch.ops.splade_fast.head_forward_dense(*arguments)
        for one, other in zip(found, expected, strict=False):
            assert_same(one, other)
    few = hidden[:, :6], weight, bias, None, None, 0, 0, True, True
    found = screened(emulator, torch.zeros(40), *few)
    assert found[3].tolist() == [0, 0, 2 * 6 * vocabulary, 100]
    assert_dense(found, few)


def test_weight_that_has_changed(emulator, draw):
    """Check that a weight changed through .data is noticed, and its int8 rows are not used."""
    hidden, weight = (small_integers(*shape, dtype=draw.choice(HALF)) for shape in [(2, 9, 40)] * 2)
    weight = weight[0].to(hidden.dtype).repeat(20, 1)
    mean = torch.zeros(40)
    prepared = emulator.ops.head_prepare(weight, mean)
    weight += 1
    arguments = hidden, weight, torch.full((180,), -9.0).to(weight), None, None, 0, 0, True, True
    found = emulator.ops.head_forward_screened(*arguments, mean, *prepared, None, None, False)
    assert found[3][0] == 1
    assert_dense(found, arguments)


def test_prepared_weight(emulator, monkeypatch):
    """Check that the prepared weight is kept until it changes, and never in a CUDA graph."""
    monkeypatch.setattr(screening_hopper, "_find_version", lambda source: source._version)
    hidden, weight = torch.randn(2, 9, 16).bfloat16(), torch.randn(30, 16).bfloat16()
    mask = torch.rand(2, 9) < 0.5
    mask[0, 0] = True
    hidden[~mask] = NAN
    state = ScreeningState()

    def prepare(hidden=hidden, mask=mask):
        return screening_hopper.prepare(state, weight, weight, hidden, mask)

    with emulator.in_place():
        first = prepare()
        torch.testing.assert_close(first.mean, hidden[mask].float().mean(0))
        assert prepare() is first
        assert prepare(hidden[:1], None) is first
        weight.neg_()
        second = prepare()
        assert second is not first
        assert not torch.equal(second.packed, first.packed)
        third = prepare(torch.ones(8, 9, 16).bfloat16(), None)
        assert torch.equal(third.mean, torch.ones(16))
        monkeypatch.setattr(screening_hopper, "_find_version", lambda source: None)
        assert prepare() is not third
        assert state.prepared is third
        assert torch.equal(prepare(hidden, torch.zeros(2, 9) > 0).mean, torch.zeros(16))


def test_disorder_comes_to_an_end(emulator, draw):
    """Check that no thread diverges, waits for ever or crashes with any content of cu_seqlens."""
    batch, vocabulary, dim = draw.choice([1, 2, 6]), draw.choice([1, 64, 200]), draw.choice([8, 24])
    rows, dtype = draw.choice([1, 20, 300, 700]), draw.choice(HALF)
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocabulary, dim).to(dtype)
    starts = torch.randint(-5, rows + 9, (batch + 1,)).int()
    arguments = hidden, weight, None, None, starts, 0, 1, True, False
    assert screened(emulator, torch.zeros(dim), *arguments)[0].shape == (batch, vocabulary)


def test_what_it_does_not_take(emulator):
    """Check that bad arguments raise before anything is computed."""
    weight = torch.zeros(5, 16, dtype=torch.bfloat16)
    hidden, mean = weight[None], torch.zeros(16)
    packed, rows = emulator.ops.head_prepare(weight, mean)

    def call(hidden=hidden, weight=weight, pooling=0, mean=mean, packed=packed, rows=rows):
        options = None, None, None, pooling, 0, False, False, mean, packed, rows, None, None, False
        return emulator.ops.head_forward_screened(hidden, weight, *options)

    assert (call()[0] == 0).all()
    with pytest.raises(RuntimeError, match="pools by max on a GPU"):
        call(pooling=1)
    with pytest.raises(RuntimeError, match="bfloat16 or float16 on a GPU, got Float"):
        call(hidden.float(), weight.float())
    with pytest.raises(RuntimeError, match="a multiple of 8 and at most 65536 dimensions"):
        call(hidden[..., :12], weight[:, :12], mean=mean[:12])
    with pytest.raises(RuntimeError, match="mean must be float32"):
        call(mean=mean.double())
    with pytest.raises(RuntimeError, match="what head_prepare made of weight"):
        call(packed=packed[:4])


def test_starts_of_memory(emulator):
    """Check that rows at an address that is no multiple of 16 are copied."""
    rows = small_integers(1 + 20 * 16, dtype=torch.bfloat16)[1:].view(20, 16)
    arguments = rows, rows, None, None, starts_of([20]), 0, 0, True, True
    assert_dense(screened(emulator, torch.zeros(16), *arguments), arguments)
