"""pool equals the formula in plain PyTorch."""

import pytest
import torch
from torch import Tensor

import splade_fast as sf
from splade_fast import reference
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
from tests.selection import pairwise
from tests.tolerances import assert_accurate


def gradients(pool, logits: Tensor, mask, grad: Tensor, **options):
    logits = logits.detach().requires_grad_()
    pooled = pool(logits, mask, **options)
    pooled.backward(grad.to(pooled.dtype))
    return pooled.detach(), logits.grad


def compare(logits: Tensor, mask: Tensor | None, **options) -> None:
    """Assert that values and gradients are as accurate as those of plain PyTorch in the dtype."""
    grad = torch.randn(logits.shape[0], logits.shape[2]).to(logits)
    ours = gradients(sf.splade_pool, logits, mask, grad, **options)
    plain = gradients(reference.splade_pool, logits, mask, grad, **options)
    truth = gradients(reference.splade_pool, logits.double(), mask, grad.double(), **options)
    for actual, exact, baseline in zip(ours, truth, plain, strict=True):
        assert_accurate(actual, exact, baseline)


@pairwise(dtype=DTYPES, pooling=ALL_POOLINGS, activation=ACTIVATIONS, kind=MASKS)
def test_matches_reference(device, dtype, pooling, activation, kind):
    logits = lattice(4, 17, 101, dtype=dtype, device=device)
    mask = attention_mask(kind, 4, 17)
    mask = None if mask is None else mask.to(device)
    compare(logits, mask, pooling=pooling, activation=activation)


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
@pytest.mark.parametrize(
    ("batch", "length", "vocabulary"),
    [(0, 3, 5), (2, 0, 5), (2, 3, 0), (1, 1, 1), (1, 300, 33), (3, 5, 4099), (2, 33000, 3)],
)
def test_sizes(device, pooling, batch, length, vocabulary):
    """Empty and single dimensions, several strips of the vocabulary, every dtype of positions."""
    logits = torch.randn(batch, length, vocabulary, device=device)
    compare(logits, None, pooling=pooling)


@pytest.mark.parametrize("pooling", ALL_POOLINGS)
def test_strides(device, pooling):
    base = torch.randn(6, 9, 80, device=device)
    mask = attention_mask("holes", 6, 9).to(device)
    for logits in (base[:, :, 3:70], base[::2], base[:, ::3], base[:, :, ::2]):
        rows = mask[: logits.shape[0], : logits.shape[1]]
        compare(logits, rows, pooling=pooling)
    permuted = base.permute(2, 1, 0)
    compare(permuted, None, pooling=pooling)
    compare(base, mask.t().contiguous().t(), pooling=pooling)


@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32]
)
def test_mask_dtypes(device, mask_dtype):
    logits = torch.randn(3, 8, 50, device=device)
    mask = attention_mask("holes", 3, 8).to(device)
    expected = reference.splade_pool(logits, mask)
    torch.testing.assert_close(sf.splade_pool(logits, mask.to(mask_dtype)), expected)


def test_tie_goes_to_the_lowest_position(device):
    logits = torch.ones(1, 5, 70, device=device, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1]], device=device)
    sf.splade_pool(logits, mask, activation="relu").sum().backward()
    expected = torch.zeros(1, 5, 70)
    expected[:, 1] = 1
    assert torch.equal(logits.grad.cpu(), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(device, pooling, dtype):
    logits = torch.zeros(1, 4, 6, dtype=dtype, device=device)
    logits[0, :, 0] = torch.tensor([1, torch.nan, 3, 2])
    logits[0, :, 1] = torch.tensor([1, torch.inf, 3, 2])
    logits[0, :, 2] = -torch.inf
    logits[0, :, 3] = torch.tensor([1.0, 2.0, -torch.inf, -3.0])
    logits[0, 3, 4] = torch.nan
    mask = torch.tensor([[1, 1, 1, 0]], device=device)
    pooled = sf.splade_pool(logits, mask, pooling=pooling, activation="relu")[0].cpu()
    assert pooled[0].isnan()
    assert pooled[1] == torch.inf
    assert pooled[2] == 0
    assert pooled[3] == (2 if pooling == "max" else 3)
    assert pooled[4] == 0  # NaN at a masked position is not read


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_of_large_logits_has_the_range_of_the_dtype(device, dtype):
    logits = torch.full((1, 40, 3), 60000.0, dtype=dtype, device=device)
    pooled = sf.splade_pool(logits, pooling="mean", activation="relu")
    assert torch.equal(pooled, logits[:, 0])


def test_the_last_position_alone_counts(device):
    logits = torch.randn(3, 4, 6, device=device, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], device=device)
    with torch.no_grad():
        logits[mask == 0] = torch.nan
    pooled = sf.splade_pool(logits, mask, pooling="last", activation="relu")
    expected = torch.stack([logits[0, 2], torch.zeros(6).to(device), logits[2, 3]]).relu()
    assert torch.equal(pooled, expected)
    (gradient,) = torch.autograd.grad(pooled.sum(), logits)
    assert gradient.abs().sum((0, 2)).tolist()[:2] == [0, 0]


def test_gradcheck(device):
    logits = torch.randn(2, 5, 7, dtype=torch.float64, device=device, requires_grad=True)
    mask = attention_mask("holes", 2, 5).to(device)
    for pooling in ALL_POOLINGS:
        for activation in ACTIVATIONS:
            assert torch.autograd.gradcheck(
                lambda x, p=pooling, a=activation: sf.splade_pool(x, mask, pooling=p, activation=a),
                logits,
            )


def test_double_backward_is_refused(device):
    logits = torch.randn(2, 5, 7, device=device, requires_grad=True)
    for pooling in ALL_POOLINGS:
        pooled = sf.splade_pool(logits, pooling=pooling)
        (grad,) = torch.autograd.grad(pooled.sum() * 2, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (grad**2).sum().backward()


def test_opcheck(device):
    logits = torch.randn(2, 5, 7, device=device, requires_grad=True)
    mask = attention_mask("holes", 2, 5).to(device)
    for pooling in (0, 1):
        torch.library.opcheck(
            torch.ops.splade_fast.pool_forward.default, (logits, mask, pooling, 1, True)
        )


@pytest.mark.parametrize(("pooling", "backend"), COMPILED_POOLINGS)
def test_compiles_in_one_graph(device, pooling, backend):
    """The first batch is compiled with static shapes, the second with a dynamic batch size."""

    def loss(logits, mask):
        return sf.splade_pool(logits * 2, mask, pooling=pooling).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for batch in (2, 3):
        logits = torch.randn(batch, 5, 70, device=device, requires_grad=True)
        mask = attention_mask("right", batch, 5).to(device)
        (expected,) = torch.autograd.grad(loss(logits, mask), logits)
        (actual,) = torch.autograd.grad(compiled(logits, mask), logits)
        torch.testing.assert_close(actual, expected)


def test_meta():
    pooled = sf.splade_pool(torch.empty(2, 3, 50, device="meta", dtype=torch.bfloat16))
    assert pooled.shape == (2, 50)
    assert pooled.device.type == "meta"
    assert pooled.dtype == torch.bfloat16


def test_bad_arguments(device):
    logits = torch.randn(2, 5, 7, device=device)
    mask = torch.ones(2, 5, device=device)
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        sf.splade_pool([[1.0]])
    with pytest.raises(TypeError, match="logits must be one of float32.*got torch.int64"):
        sf.splade_pool(torch.ones(2, 5, 7, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"logits must be \(batch, length, vocabulary\), got \(5, 7\)"
    ):
        sf.splade_pool(logits[0])
    with pytest.raises(ValueError, match=r"attention_mask must be .* = \(2, 5\), got \(2, 4\)"):
        sf.splade_pool(logits, mask[:, :4])
    with pytest.raises(ValueError, match=r"attention_mask must be .* got \(5,\)"):
        sf.splade_pool(logits, mask[0])
    with pytest.raises(TypeError, match="attention_mask must be bool, int or float"):
        sf.splade_pool(logits, mask.to(torch.complex64))
    with pytest.raises(ValueError, match="attention_mask must be on the device of logits"):
        sf.splade_pool(logits, mask.to("meta"))
    with pytest.raises(ValueError, match="pooling must be one of 'max', .* 'last', got 'min'"):
        sf.splade_pool(logits, pooling="min")
    with pytest.raises(ValueError, match="activation must be one of .* got 3"):
        sf.splade_pool(logits, activation=3)
    with pytest.raises(TypeError, match="logits must be a dense tensor"):
        sf.splade_pool(logits.to_sparse())
    grad, saved = torch.ones(2, 7, device=device), torch.ones(2, 7, device=device)
    argmax = torch.zeros(2, 7, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="length must not be negative, got -1"):
        torch.ops.splade_fast.pool_backward_max(grad, saved, argmax, -1, 1)
