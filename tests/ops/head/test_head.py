"""head against the decoder and the pooling formula in plain PyTorch."""

import multiprocessing

import pytest
import torch
from torch import Tensor

import splade_fast as sf
from splade_fast import reference
from splade_fast.ops.head.forward import is_tf32_permitted
from tests.ops.inputs import (
    ACTIVATIONS,
    ALL_POOLINGS,
    COMPILED_POOLINGS,
    DTYPES,
    MASKS,
    POOLINGS,
    attention_mask,
    lattice,
)
from tests.ops.instruction_sets import assert_pass_with, instruction_sets_here
from tests.selection import pairwise
from tests.tolerances import FACTOR, assert_accurate, assert_accurate_gradients, error

HALF = [torch.bfloat16, torch.float16]


def gradients(head, tensors: list[Tensor | None], *sequences, **options) -> list[Tensor]:
    """Return pooled vectors, and the gradients of hidden, weight and bias for fixed weights."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    pooled = head(*leaves, *sequences, **options)
    generator = torch.Generator().manual_seed(1)
    pooled.backward(torch.randn(pooled.shape, generator=generator).to(pooled))
    return [pooled.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def compare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *sequences,
    algorithm: str = "auto",
    **options,
) -> None:
    """Assert that values and gradients are as accurate as those of plain PyTorch in the dtype."""
    tensors = [hidden, weight, bias]
    ours = gradients(sf.splade_head, tensors, *sequences, algorithm=algorithm, **options)
    plain = gradients(reference.splade_head, tensors, *sequences, **options)
    wide = [None if t is None else t.double() for t in tensors]
    truth = gradients(reference.splade_head, wide, *sequences, **options)
    for actual, exact, baseline in zip(ours, truth, plain, strict=True):
        assert_accurate(actual, exact, baseline)


def decoder(vocabulary: int, dim: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    make = {"dtype": dtype, "device": torch.device(device)}
    return lattice(vocabulary, dim, **make), lattice(vocabulary, **make)


@pairwise(
    dtype=DTYPES,
    pooling=ALL_POOLINGS,
    activation=ACTIVATIONS,
    kind=MASKS,
    has_bias=[True, False],
)
def test_matches_reference(device, dtype, pooling, activation, kind, has_bias):
    hidden = lattice(4, 17, 21, dtype=dtype, device=device)
    weight, bias = decoder(101, 21, dtype, device)
    mask = attention_mask(kind, 4, 17)
    mask = None if mask is None else mask.to(device)
    compare(
        hidden, weight, bias if has_bias else None, mask, pooling=pooling, activation=activation
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", ALL_POOLINGS)
@pytest.mark.parametrize("lengths", [[5, 0, 1, 17], [3], [0, 0], []])
def test_packed(device, dtype, pooling, lengths):
    hidden = lattice(sum(lengths), 21, dtype=dtype, device=device)
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device
    )
    compare(hidden, *decoder(101, 21, dtype, device), cu_seqlens=cu_seqlens, pooling=pooling)


def test_packed_equals_padded(device):
    """On the CPU packed and padded tokens give the same bits.

    On a GPU torch may choose another product for another number of rows.
    """
    hidden = torch.randn(4, 17, 40, device=device)
    weight, bias = torch.randn(200, 40, device=device), torch.randn(200, device=device)
    mask = attention_mask("right", 4, 17).to(device)
    lengths = mask.sum(1).cumsum(0).int()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths])
    padded = gradients(sf.splade_head, [hidden, weight, bias], mask)
    packed = gradients(sf.splade_head, [hidden[mask], weight, bias], cu_seqlens=cu_seqlens)
    padded[1] = padded[1][mask]
    tolerance = {"rtol": 0, "atol": 0} if device.type == "cpu" else {}
    torch.testing.assert_close(packed, padded, **tolerance)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_nothing_to_pool(device, pooling, size):
    batch, length, dim, vocabulary = size
    hidden = torch.randn(batch, length, dim, device=device)
    weight = torch.randn(vocabulary, dim, device=device)
    for mask in (None, torch.zeros(batch, length, device=device)):
        compare(hidden, weight, torch.randn(vocabulary, device=device), mask, pooling=pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    ("batch", "length", "dim", "vocabulary"),
    [
        (0, 3, 4, 5),
        (2, 0, 4, 5),
        (2, 3, 0, 5),
        (2, 3, 4, 0),
        (1, 1, 1, 1),
        (1, 300, 4, 33),  # positions in int16
        (1, 33000, 2, 5),  # positions in int32
        (600, 2, 3, 40),  # more sequences than one block of the CPU forward holds
        (2, 4500, 1024, 70),  # sequences longer than one block of the CPU forward
        (3, 7, 600, 90),  # several slices of the depth in the CPU backward
    ],
)
def test_sizes(device, pooling, batch, length, dim, vocabulary):
    hidden = torch.randn(batch, length, dim, device=device)
    weight = torch.randn(vocabulary, dim, device=device) / max(dim, 1) ** 0.5
    bias = torch.randn(vocabulary, device=device)
    mask = attention_mask("right", batch, length).to(device)
    compare(hidden, weight, bias, mask, pooling=pooling)


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_long_sequences(device, seed):
    """Rounding errors of sum pooling do not grow with the length."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((1, 8192, 16), (64, 16), 64)
    )
    compare(hidden, weight / 4, bias, None, pooling="sum")


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
def test_strides(device, pooling):
    hidden = torch.randn(20, 9, 6, device=device).permute(2, 1, 0)
    weight = torch.randn(20, 50, device=device).t()
    bias = torch.randn(100, device=device)[::2]
    mask = attention_mask("holes", 9, 6).to(device).t()
    compare(hidden, weight, bias, mask, pooling=pooling)
    compare(hidden[:, ::2], torch.randn(50, 40, device=device)[:, ::2], bias, pooling=pooling)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_mask_dtypes(device, mask_dtype):
    hidden = lattice(3, 8, 5, dtype=torch.float32, device=device)
    weight, bias = decoder(50, 5, device=device)
    mask = attention_mask("holes", 3, 8).to(device)
    expected = reference.splade_head(hidden, weight, bias, mask)
    actual = sf.splade_head(hidden, weight, bias, mask.to(mask_dtype))
    torch.testing.assert_close(actual, expected)


def test_positions_that_do_not_count_are_not_read(device):
    hidden = torch.randn(2, 6, 8, device=device)
    weight = torch.randn(40, 8, device=device)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], device=device)
    expected = sf.splade_head(hidden, weight, None, mask)
    hidden[mask == 0] = torch.nan
    for pooling in ALL_POOLINGS:
        assert not sf.splade_head(hidden, weight, None, mask, pooling=pooling).isnan().any()
    assert torch.equal(sf.splade_head(hidden, weight, None, mask), expected)
    assert (expected[1] == 0).all()


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(device, pooling, dtype):
    hidden = torch.zeros(3, 4, 2, dtype=dtype, device=device)
    hidden[0, 1, 0] = torch.nan
    hidden[1, 2, 0] = torch.inf
    hidden[2, :, 0] = 1
    weight = torch.ones(5, 2, dtype=dtype, device=device)
    weight[4] = -1
    bias = torch.tensor([0, 0, torch.nan, torch.inf, 0], dtype=dtype, device=device)
    options = {"pooling": pooling, "activation": "relu"}
    expected = reference.splade_head(hidden, weight, bias, **options)
    actual = sf.splade_head(hidden, weight, bias, **options)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    mask = torch.zeros(3, 4, device=device)
    assert (sf.splade_head(hidden, weight, bias, mask, **options) == 0).all()


def test_tie_goes_to_the_lowest_position(device):
    hidden = torch.ones(1, 40, 3, device=device, requires_grad=True)
    weight = torch.ones(70, 3, device=device)
    mask = torch.ones(1, 40, device=device)
    mask[:, :2] = 0
    sf.splade_head(hidden, weight, None, mask, activation="relu").sum().backward()
    expected = torch.zeros(1, 40, 3)
    expected[:, 2] = 70
    assert torch.equal(hidden.grad.cpu(), expected)


def test_gradients_are_bitwise_deterministic(device):
    tensors = [torch.randn(5, 60, 300), torch.randn(3000, 300), torch.randn(3000)]
    tensors = [t.to(device) for t in tensors]
    mask = attention_mask("holes", 5, 60).to(device)
    first = gradients(sf.splade_head, tensors, mask)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        again = gradients(sf.splade_head, tensors, mask)
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_gradients_that_are_needed(device, pooling, needs):
    tensors = [lattice(2, 5, 4, dtype=torch.float32, device=device), *decoder(30, 4, device=device)]
    expected = gradients(reference.splade_head, tensors, pooling=pooling)[1:]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    pooled = sf.splade_head(*tensors, pooling=pooling)
    pooled.backward(
        torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled)
    )
    for tensor, need, gradient in zip(tensors, needs, expected, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_a_gradient_of_zero_is_inactive(device):
    """Pairs whose incoming gradient is zero contribute nothing to other gradients."""
    hidden = torch.full((1, 2, 3), 1e38, device=device, requires_grad=True)
    weight = torch.full((4, 3), 1e-38, device=device, requires_grad=True)
    pooled = sf.splade_head(hidden, weight)
    pooled.backward(torch.zeros_like(pooled))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(device, packed):
    make = {"dtype": torch.float64, "device": device, "requires_grad": True}
    hidden = torch.randn((10, 3) if packed else (2, 5, 3), **make)
    weight, bias = torch.randn(7, 3, **make), torch.randn(7, **make)
    sequences = {
        "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
        if packed
        else None,
        "attention_mask": None if packed else attention_mask("holes", 2, 5).to(device),
    }
    for pooling in ALL_POOLINGS:
        for activation in ACTIVATIONS:
            options = {"pooling": pooling, "activation": activation, **sequences}
            assert torch.autograd.gradcheck(
                lambda h, w, b, o=options: sf.splade_head(h, w, b, **o), (hidden, weight, bias)
            )


@pairwise(dtype=DTYPES, pooling=ALL_POOLINGS, has_bias=[True, False], kind=["padded", "packed"])
def test_logit_scale(device, dtype, pooling, has_bias, kind):
    """A scale that rounds hidden and bias, with the gradient of the scale."""
    scale = torch.tensor([0.3], dtype=dtype, device=device)
    hidden = torch.randn(4, 17, 21).to(device, dtype)
    weight, bias = decoder(101, 21, dtype, device)
    sequences = {"attention_mask": attention_mask("holes", 4, 17).to(device)}
    if kind == "packed":
        hidden = hidden.flatten(0, 1)
        bounds = torch.tensor([0, 5, 5, 68], dtype=torch.int32, device=device)
        sequences = {"cu_seqlens": bounds}
    options = {"pooling": pooling, **sequences}
    tensors = [hidden, weight, bias if has_bias else None, scale]

    def scaled(head):
        return lambda h, w, b, s, **others: head(h, w, b, logit_scale=s, **others)

    wide = [None if t is None else t.double() for t in tensors]
    runs = [
        gradients(scaled(sf.splade_head), tensors, **options),
        gradients(scaled(reference.splade_head), wide, **options),
        gradients(scaled(reference.splade_head), tensors, **options),
    ]
    assert_accurate(*(run[0] for run in runs))
    if dtype in HALF:  # together, as plain PyTorch may hit the one number of the scale by luck
        assert_accurate_gradients(*(dict(enumerate(run[1:])) for run in runs))
        return
    assert_accurate_gradients(*(dict(enumerate(run[1:-1])) for run in runs))
    # The terms of the scale's gradient cancel: any order of summation errs by units in the last
    # place of their absolute sum.
    actual, truth, baseline = (run[-1] for run in runs)
    summed = [wide[0] * runs[1][1], wide[2] * runs[1][3] if has_bias else wide[0].new_zeros(1)]
    terms = sum(product.abs().sum().item() for product in summed) / wide[3].item()
    tolerance = FACTOR * error(baseline, truth) + torch.finfo(dtype).eps * terms
    assert error(actual, truth) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_powers_of_two_round_nothing(device, dtype):
    hidden, (weight, bias) = torch.randn(4, 17, 21).to(device, dtype), decoder(101, 21, dtype)
    head = hidden, weight.to(device), bias.to(device)
    expected = sf.splade_head(*head, activation="relu") / 16
    for scale in (1 / 16, torch.tensor(1 / 16, device=device)):
        assert torch.equal(sf.splade_head(*head, activation="relu", logit_scale=scale), expected)
        rows = sf.splade_head_topk(*head, k=None, activation="relu", logit_scale=scale)
        assert torch.equal(rows.to_dense(), expected)


def test_a_scale_of_a_wider_dtype_is_not_rounded(device):
    """A model in bfloat16 may keep its scale in float32."""
    hidden = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
    weight = torch.full((1, 1), 16384.0, dtype=torch.bfloat16, device=device)
    scale = torch.tensor(0.300048828125, device=device)  # between two numbers of bfloat16
    expected = torch.tensor([[0.300048828125 * 16384]], device=device).bfloat16()
    options = {"activation": "relu", "logit_scale": scale}
    assert torch.equal(sf.splade_head(hidden, weight, **options), expected)
    with torch.autocast(device.type, torch.bfloat16):
        pooled = sf.splade_head(hidden.float(), weight.float(), **options)
    assert torch.equal(pooled.bfloat16(), expected)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (float("nan"), ValueError, "logit_scale must be finite, got nan"),
        (True, TypeError, "logit_scale must be a number or a tensor, got bool"),
        ("2", TypeError, "logit_scale must be a number or a tensor, got str"),
        (torch.ones(2), ValueError, r"logit_scale must be a tensor of one number, got \(2,\)"),
        (torch.ones((), dtype=torch.int64), TypeError, "logit_scale must be one of float32"),
        (torch.ones((), device="meta"), ValueError, "logit_scale must be on the device of hidden"),
    ],
    ids=["nan", "bool", "str", "two", "int64", "meta"],
)
def test_bad_scales(scale, error, message):
    with pytest.raises(error, match=message):
        sf.splade_head(torch.randn(2, 5, 3), torch.randn(7, 3), logit_scale=scale)


def test_double_backward_is_refused(device):
    hidden = torch.randn(2, 5, 3, device=device, requires_grad=True)
    weight = torch.randn(7, 3, device=device)
    for pooling in ALL_POOLINGS:
        pooled = sf.splade_head(hidden, weight, pooling=pooling)
        (grad,) = torch.autograd.grad(pooled.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling", [0, 1])
def test_opcheck(device, packed, pooling):
    hidden = torch.randn((10, 3) if packed else (2, 5, 3), device=device, requires_grad=True)
    weight = torch.randn(7, 3, device=device, requires_grad=True)
    bias = torch.randn(7, device=device, requires_grad=True)
    mask = None if packed else attention_mask("holes", 2, 5).to(device)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device=device) if packed else None
    args = (hidden, weight, bias, mask, cu_seqlens, pooling, 1, True, False, 0, None)
    torch.library.opcheck(torch.ops.splade_fast.head_forward.default, args)


@pytest.mark.parametrize(("pooling", "backend"), COMPILED_POOLINGS)
def test_compiles_in_one_graph(device, pooling, backend):
    """The first batch is compiled with static shapes, the second with a dynamic batch size."""
    torch.compiler.reset()  # the number of recompilations of a function is limited

    def loss(hidden, weight, bias, mask):
        return sf.splade_head(hidden * 2, weight, bias, mask, pooling=pooling).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    weight = torch.randn(70, 16, device=device, requires_grad=True)
    bias = torch.randn(70, device=device, requires_grad=True)
    for batch in (2, 3):
        hidden = torch.randn(batch, 5, 16, device=device, requires_grad=True)
        mask = attention_mask("right", batch, 5).to(device)
        inputs = (hidden, weight, bias)
        expected = torch.autograd.grad(loss(*inputs, mask), inputs)
        actual = torch.autograd.grad(compiled(*inputs, mask), inputs)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_scaled_heads_compile_in_one_graph(device, pooling):
    torch.compiler.reset()

    def loss(hidden, weight, mask, scale):
        options = {"pooling": pooling, "logit_scale": scale}
        return sf.splade_head(hidden, weight, None, mask, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(2, 5, 16), torch.randn(70, 16), torch.full((1,), 0.3)]
    hidden, weight, scale = (tensor.to(device).requires_grad_() for tensor in inputs)
    mask = attention_mask("right", 2, 5).to(device)
    for factor in (scale, 0.25):
        leaves = [hidden, weight, scale] if factor is scale else [hidden, weight]
        expected = torch.autograd.grad(loss(hidden, weight, mask, factor), leaves)
        actual = torch.autograd.grad(compiled(hidden, weight, mask, factor), leaves)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pooling", ALL_POOLINGS)
def test_autocast(device, dtype, pooling):
    """Autocast runs the product in its dtype and returns float32, as for a Linear and log1p."""
    tensors = [lattice(2, 5, 4, dtype=torch.float32, device=device), *decoder(70, 4, device=device)]
    with torch.autocast(device.type, dtype):
        ours = gradients(sf.splade_head, tensors, pooling=pooling)
    rounded = gradients(sf.splade_head, [t.to(dtype) for t in tensors], pooling=pooling)
    truth = gradients(reference.splade_head, [t.double() for t in tensors], pooling=pooling)
    assert all(t.dtype == torch.float32 for t in ours)
    for actual, exact, baseline in zip(ours, truth, rounded, strict=True):
        assert_accurate(actual, exact, baseline.float())


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_inside_autocast(device, pooling, dtype):
    """The dtypes of gradients do not depend on autocast in the backward."""
    tensors = [lattice(2, 5, 4, dtype=dtype, device=device), *decoder(70, 4, dtype, device)]
    expected = gradients(sf.splade_head, tensors, pooling=pooling)
    leaves = [t.requires_grad_() for t in tensors]
    pooled = sf.splade_head(*leaves, pooling=pooling)
    grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled)
    with torch.autocast(device.type, torch.bfloat16):
        actual = torch.autograd.grad(pooled, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected[1:], strict=True))


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
def test_autocast_compiles(device, pooling):
    compiled = torch.compile(sf.splade_head, fullgraph=True, backend="aot_eager")
    hidden = lattice(2, 5, 4, dtype=torch.float32, device=device)
    weight, bias = decoder(70, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        actual = compiled(hidden, weight, bias, pooling=pooling)
        expected = sf.splade_head(hidden, weight, bias, pooling=pooling)
    torch.testing.assert_close(actual, expected)


def test_meta():
    hidden = torch.empty(2, 3, 8, device="meta", dtype=torch.float16)
    pooled = sf.splade_head(hidden, torch.empty(50, 8, device="meta", dtype=torch.float16))
    assert (pooled.shape, pooled.device.type, pooled.dtype) == ((2, 50), "meta", torch.float16)


def test_inference_mode_and_no_grad(device):
    hidden = lattice(2, 5, 4, dtype=torch.float32, device=device)
    weight, bias = decoder(30, 4, device=device)
    expected = sf.splade_head(hidden, weight, bias)
    weight.requires_grad_()
    with torch.inference_mode():
        assert torch.equal(sf.splade_head(hidden, weight, bias), expected)
    with torch.no_grad():
        assert not sf.splade_head(hidden, weight, bias).requires_grad


@pytest.mark.parametrize(
    "isa",
    [
        isa
        for isa in ("portable", "avx2", "avx512", "avx512bf16")
        if isa in instruction_sets_here()[:-1]
    ],
)
def test_other_instruction_sets(isa):
    assert_pass_with(isa, __file__, "(test_packed or test_strides or test_nan_and_inf) and cpu")


def test_bad_arguments(device):
    hidden = torch.randn(2, 5, 3, device=device)
    weight, bias = torch.randn(7, 3, device=device), torch.randn(7, device=device)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    mask = torch.ones(2, 5, device=device)
    with pytest.raises(TypeError, match="weight must be a tensor, got NoneType"):
        sf.splade_head(hidden, None)
    with pytest.raises(TypeError, match="hidden must be one of float32.*got torch.int32"):
        sf.splade_head(hidden.int(), weight)
    with pytest.raises(TypeError, match="weight must have the dtype of hidden.*got torch.float64"):
        sf.splade_head(hidden, weight.double())
    with pytest.raises(
        ValueError, match=r"weight must be \(vocabulary, dim\) with dim = 3.*\(7, 2\)"
    ):
        sf.splade_head(hidden, weight[:, :2])
    with pytest.raises(ValueError, match="weight must be on the device of hidden"):
        sf.splade_head(hidden, weight.to("meta"))
    with pytest.raises(ValueError, match=r"bias must be \(vocabulary,\) = \(7,\), got \(6,\)"):
        sf.splade_head(hidden, weight, bias[:6])
    with pytest.raises(ValueError, match=r"hidden must be \(batch, length, dim\).*got \(10, 3\)"):
        sf.splade_head(hidden.reshape(10, 3), weight)
    with pytest.raises(ValueError, match=r"hidden must be packed .*got \(2, 5, 3\)"):
        sf.splade_head(hidden, weight, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"attention_mask must be .*got \(2, 4\)"):
        sf.splade_head(hidden, weight, bias, mask[:, :4])
    with pytest.raises(ValueError, match="attention_mask must be None with cu_seqlens"):
        sf.splade_head(hidden.reshape(10, 3), weight, None, mask, cu_seqlens=cu_seqlens)
    with pytest.raises(TypeError, match="cu_seqlens must be int32, got torch.int64"):
        sf.splade_head(hidden.reshape(10, 3), weight, cu_seqlens=cu_seqlens.long())
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(batch \+ 1,\), got \(0,\)"):
        sf.splade_head(hidden.reshape(10, 3), weight, cu_seqlens=cu_seqlens[:0])
    with pytest.raises(
        ValueError, match="algorithm must be one of 'auto', 'dense', 'screened', got 'exact'"
    ):
        sf.splade_head(hidden, weight, algorithm="exact")


def test_the_ops_check_gradients_for_callers_in_cpp(device):
    """Gradients of another dtype are refused, as their memory would be misread."""
    ops = torch.ops.splade_fast
    hidden, weight = torch.randn(2, 5, 3, device=device), torch.randn(7, 3, device=device)
    saved = ops.head_forward_dense(hidden, weight, None, None, None, 0, 1, True, False)[1:]
    needs = (True, True, True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        grad = torch.ones(2, 7, dtype=dtype, device=device)
        with pytest.raises(RuntimeError, match="grad must have the dtype of hidden"):
            ops.head_backward_max(grad, *saved, hidden, weight, None, 1, *needs)
        with pytest.raises(RuntimeError, match="grad must have the dtype of hidden"):
            ops.head_backward_sum(grad, hidden, weight, None, None, None, 1, *needs)
    with pytest.raises(RuntimeError, match="grad must have size 7 in dimension 1, got 6"):
        ops.head_backward_sum(
            torch.ones(2, 6, device=device), hidden, weight, None, None, None, 1, *needs
        )


@pytest.mark.parametrize(
    "permit",
    [
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_tf32_is_torchs_own_setting(permit):
    """Each way to set it is observed, in a process of its own: not every one can be reverted."""

    def check() -> None:
        assert not is_tf32_permitted()
        exec(permit)
        assert is_tf32_permitted()

    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_cpu_has_no_tf32():
    hidden, weight = torch.randn(2, 9, 40), torch.randn(70, 40)
    dense = torch.ops.splade_fast.head_forward_dense
    arguments = (hidden, weight, None, None, None, 0, 1, False, False)
    assert torch.equal(dense(*arguments, True)[0], dense(*arguments, False)[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pooling", ALL_POOLINGS)
def test_packed_tokens_of_no_sequence_have_a_gradient_of_zero(pooling):
    """The CPU refuses such cu_seqlens; on a GPU the check would have to wait."""
    hidden = torch.randn(40, 16, device="cuda")
    weight = torch.randn(300, 16, device="cuda")
    cu_seqlens = torch.tensor([0, 9, 25], dtype=torch.int32, device="cuda")
    whole, cut = hidden.clone().requires_grad_(), hidden[:25].clone().requires_grad_()
    torch.full_like(hidden, torch.nan)  # NaN that the memory of the gradient may contain
    for leaf in (whole, cut):
        sf.splade_head(leaf, weight, cu_seqlens=cu_seqlens, pooling=pooling).sum().backward()
    assert torch.equal(whole.grad[25:], torch.zeros_like(whole[25:]))
    torch.testing.assert_close(whole.grad[:25], cut.grad)


@pytest.mark.parametrize("bounds", [[1, 4, 10], [0, 4, 9], [0, 11, 10], [0, 6, 5, 10], [-1, 10]])
def test_bad_cu_seqlens_values(bounds):
    """On the CPU, Python and the op refuse them: C++ callers bypass the check in Python."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    hidden, weight = torch.randn(10, 3), torch.randn(7, 3)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 10 tokens of hidden"):
        sf.splade_head(hidden, weight, cu_seqlens=cu_seqlens)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 10 tokens"):
        torch.ops.splade_fast.head_forward(
            hidden, weight, None, None, cu_seqlens, 0, 1, False, False, 0, None
        )
