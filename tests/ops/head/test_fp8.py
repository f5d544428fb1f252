"""head with precision="fp8" against the same rounding and formula in plain PyTorch."""

import pytest
import torch

import splade_fast as sf
from splade_fast import reference
from splade_fast.ops.head import fp8
from tests.ops.head.test_head import HALF, compare, gradients
from tests.ops.inputs import ACTIVATIONS, MASKS, POOLINGS, attention_mask
from tests.tolerances import assert_accurate

DTYPES = [torch.float32, *HALF]
FP8 = {"precision": "fp8"}
E4M3_UNIT = 2.0**-4  # relative, of what is normal
E4M3_UNDERFLOW = 2.0**-10  # absolute, of what is not


def integers(*shape, dtype=torch.float32, device="cpu"):
    """Too many bits for e4m3, and products whose sums are exact in every order."""
    return torch.randint(-40, 41, shape).to(device, dtype)


def decoder(vocabulary, dim, dtype=torch.float32, device="cpu"):
    make = {"dtype": dtype, "device": device}
    return integers(vocabulary, dim, **make) / 64, integers(vocabulary, **make) / 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", MASKS)
def test_padded(device, dtype, pooling, activation, kind):
    hidden = integers(4, 9, 24, dtype=dtype, device=device) / 16
    weight, bias = decoder(70, 24, dtype, device)
    if pooling == "sum" and dtype in HALF:
        bias = (
            None  # its backward rounds products before it adds the bias, which may bring them to 0
        )
    mask = attention_mask(kind, 4, 9)
    mask = None if mask is None else mask.to(device)
    compare(hidden, weight, bias, mask, pooling=pooling, activation=activation, **FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("lengths", [[5, 0, 1, 17], [3], [0], [300, 2]])
def test_packed(device, dtype, pooling, lengths):
    hidden = integers(sum(lengths), 16, dtype=dtype, device=device) / 16
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    weight, _ = decoder(70, 16, dtype, device)
    compare(hidden, weight, None, cu_seqlens=cu_seqlens, pooling=pooling, **FP8)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_sequence_and_row_has_its_own_scale(device, pooling):
    hidden, (weight, bias) = integers(5, 9, 24, device=device), decoder(70, 24, device=device)
    options = {"pooling": pooling, "activation": "relu", **FP8}
    expected = sf.splade_head(hidden, weight, **options)
    sequence_scale = 2.0 ** torch.arange(-20, 30, 10, device=device)[:, None]
    row_scale = 2.0 ** torch.randint(-20, 20, (70,), device=device)
    scaled = sf.splade_head(
        hidden * sequence_scale[..., None], weight * row_scale[:, None], **options
    )
    assert torch.equal(scaled, expected * sequence_scale * row_scale)
    alone = [sf.splade_head(x[None], weight, bias, **options) for x in hidden]
    assert torch.equal(torch.cat(alone), sf.splade_head(hidden, weight, bias, **options))


def test_packed_is_padded(device):
    hidden, (weight, bias) = integers(4, 9, 24, device=device), decoder(70, 24, device=device)
    mask = attention_mask("right", 4, 9).to(device)
    starts = torch.cat([mask.new_zeros(1), mask.sum(1)]).cumsum(0).int()
    padded = sf.splade_head(hidden, weight, bias, mask, **FP8)
    assert torch.equal(sf.splade_head(hidden[mask], weight, bias, cu_seqlens=starts, **FP8), padded)


def test_positions_that_do_not_count_are_not_read(device):
    hidden, (weight, bias) = integers(4, 9, 24, device=device), decoder(70, 24, device=device)
    mask = attention_mask("holes", 4, 9).to(device)
    expected = sf.splade_head(hidden, weight, bias, mask, **FP8)
    for value in (torch.nan, torch.inf, 1e30):
        hidden[~mask] = value
        assert torch.equal(sf.splade_head(hidden, weight, bias, mask, **FP8), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_not_finite_shows(device, dtype, value, pooling):
    hidden = integers(3, 9, 16, dtype=dtype, device=device)
    weight, bias = decoder(70, 16, dtype, device)
    expected = sf.splade_head(hidden, weight, bias, pooling=pooling, **FP8)
    hidden[1, 4, 3] = weight[7, 2] = value
    actual = sf.splade_head(hidden, weight, bias, pooling=pooling, **FP8)
    assert actual[1].isnan().all()
    assert actual[:, 7].isnan().all()
    actual[1] = actual[:, 7] = expected[1] = expected[:, 7] = 0
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(0, 3, 8, 5), (2, 0, 8, 5), (2, 3, 0, 5), (2, 3, 8, 0)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_empty(device, shape, pooling):
    batch, length, dim, vocabulary = shape
    hidden = torch.randn(batch, length, dim, device=device)
    weight = torch.randn(vocabulary, dim, device=device)
    pooled = sf.splade_head(hidden, weight, pooling=pooling, **FP8)
    assert torch.equal(pooled, torch.zeros(batch, vocabulary, device=device))
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    none = sf.splade_head(hidden[0:0].flatten(0, 1), weight, cu_seqlens=cu_seqlens, **FP8)
    assert none.shape == (0, vocabulary)


def test_scales():
    """The least power of two that brings the largest value to 448 at most."""
    powers = 2.0 ** torch.arange(-110, 119)
    largest = torch.cat([448 * powers, torch.tensor([1.0, 447.0, 449.0, 3.4e38, 1e-30])])
    largest = torch.cat([largest, largest.nextafter(torch.tensor(torch.inf))])
    scale = fp8.scales(largest).double()
    assert (scale.frexp().mantissa == 0.5).all()
    assert (largest.double() <= 448 * scale).all()
    assert (largest.double() > 224 * scale).all()
    assert (fp8.scales(torch.tensor([0.0, 1e-45])) == 2.0**-126).all()
    assert fp8.scales(torch.tensor([torch.inf, torch.nan])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_keeps_what_the_bound_says(dtype):
    x = (torch.randn(200, 300) * torch.logspace(-6, 3, 300)).to(dtype)
    scale = fp8.weight_scales(x)
    actual = fp8.restored(fp8.rounded(x, scale), scale, torch.float32)
    bound = (E4M3_UNIT * x.double().abs()).clamp(min=E4M3_UNDERFLOW * scale.double()[:, None])
    error = (actual.double() - x.double()).abs()
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_within_the_bound(device, dtype):
    hidden = torch.randn(6, 10, 384, device=device).to(dtype)
    weight = torch.randn(500, 384, device=device).to(dtype)
    actual = sf.splade_head(hidden[:, :1], weight, activation="relu", **FP8)
    h, w = hidden[:, 0].double(), weight.double()
    exact = h @ w.t()
    tiny = E4M3_UNDERFLOW * h.abs().amax(1, keepdim=True) / 224
    h_error = (E4M3_UNIT * h.abs()).clamp(min=tiny)
    w_error = (E4M3_UNIT * w.abs()).clamp(min=E4M3_UNDERFLOW * w.abs().amax(1, keepdim=True) / 224)
    bound = h_error @ w.abs().t() + h.abs() @ w_error.t() + h_error @ w_error.t()
    bound = bound + torch.finfo(dtype).eps * exact.abs()
    assert ((actual.double() - exact.relu()).abs() <= bound).all()


def test_it_is_not_screened(monkeypatch):
    """Which would be exact for the rounded product, but is decided for the one that is not."""
    monkeypatch.setattr("splade_fast.ops.head.forward.is_candidate", None)
    sf.splade_head(integers(4, 9, 24), decoder(70, 24)[0], **FP8)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_kernels(monkeypatch, pooling):
    tensors = [integers(4, 9, 24), *decoder(70, 24)]
    expected = gradients(reference.splade_head, tensors, pooling=pooling, **FP8)
    monkeypatch.setattr("splade_fast._library.has_kernels", lambda _: False)
    actual = gradients(sf.splade_head, tensors, pooling=pooling, **FP8)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, packed, pooling, dtype):
    make = {"device": device, "dtype": dtype, "requires_grad": True}
    hidden = torch.randn((10, 16) if packed else (2, 5, 16), **make)
    weight, bias = torch.randn(7, 16, **make), torch.randn(7, **make)
    mask = None if packed else attention_mask("holes", 2, 5).to(device)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device=device) if packed else None
    args = (hidden, weight, bias, mask, cu_seqlens, pooling, 1, True, False, 0, None, True)
    torch.library.opcheck(torch.ops.splade_fast.head_forward.default, args)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_autocast(device, dtype, pooling):
    """First to the autocast dtype, which these inputs fit, then to e4m3; the result in float32."""
    tensors = [integers(2, 5, 16, device=device), *decoder(70, 16, device=device)]
    with torch.autocast(device.type, dtype):
        ours = gradients(sf.splade_head, tensors, pooling=pooling, **FP8)
    half = [t.to(dtype) for t in tensors]
    plain = gradients(reference.splade_head, half, pooling=pooling, **FP8)
    wide = [t.double() for t in tensors]
    truth = gradients(reference.splade_head, wide, pooling=pooling, **FP8)
    assert all(t.dtype == torch.float32 for t in ours)
    for actual, exact, baseline in zip(ours, truth, plain, strict=True):
        assert_accurate(actual, exact, baseline.float())


def test_topk(device):
    hidden, (weight, bias) = integers(4, 9, 24, device=device), decoder(70, 24, device=device)
    mask = attention_mask("right", 4, 9).to(device)
    expected = sf.SparseRows.from_dense(sf.splade_head(hidden, weight, bias, mask, **FP8), 8)
    assert sf.splade_head_topk(hidden, weight, bias, mask, k=8, **FP8).equal(expected)


def test_bad_arguments(device):
    hidden, weight = torch.randn(2, 5, 3, device=device), torch.randn(7, 3, device=device)
    with pytest.raises(ValueError, match="precision must be None or 'fp8', got 'fp4'"):
        sf.splade_head(hidden, weight, precision="fp4")
    with pytest.raises(TypeError, match="hidden must be float32.* precision='fp8'.*float64"):
        sf.splade_head(hidden.double(), weight.double(), **FP8)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="algorithm must be 'auto' or 'dense' with precision"):
            sf.splade_head(hidden, weight, algorithm="screened", **FP8)


def test_the_reference_in_words():
    """Of [500, 3, 0.3] in steps of 2: 2 * [256, 1.5, 0.15625 for 0.15], by hand."""
    rounded = reference.head.round_to_e4m3(torch.tensor([[500.0, 3.0, 0.3]]), 1)
    assert rounded.tolist() == [[512.0, 3.0, 0.3125]]
