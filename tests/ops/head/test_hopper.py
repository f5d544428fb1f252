"""The fused head of sm_90a equals the head for every GPU.

The layouts, tiles and reduction are tested without a GPU in tests/cpp/test_head_sm90.cpp.
"""

import pytest
import torch
from torch import Tensor

import splade_fast as sf
from splade_fast import reference
from tests.ops.head.test_head import HALF, compare, decoder, gradients
from tests.ops.inputs import ACTIVATIONS, MASKS, attention_mask, lattice

FUSED_KERNEL = "head_sm90_kernel"
DTYPES = [*HALF, torch.float32]
CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(params=["chunks", "fused"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "fused":
        use_fused(monkeypatch)
    return str(request.param)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fused(monkeypatch)


@pytest.fixture(autouse=True)
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permit TF32, which the fused kernel needs for float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")


def use_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused kernel is for sm_90a")
    if "head_sm90a" not in sf.build_info()["built"]["cuda_kernels"]:
        pytest.skip("built without sm_90a")
    monkeypatch.setenv("SPLADE_FAST_HOPPER", "1")


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=CUDA)


def launched_kernels(*args, **options) -> list[str]:
    """Return the names of the kernels that a call of the head launches."""
    sf.splade_head(*args, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sf.splade_head(*args, **options)
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "dim", "vocabulary"),
    [
        ([1], 8, 1),
        ([256], 64, 128),
        ([257], 72, 129),
        ([5, 0, 1, 17], 64, 101),
        ([0, 0, 255, 1, 1, 255, 0], 128, 300),
        ([24] * 50, 384, 1000),
        ([700, 3, 0, 1024], 768, 257),
        ([2000], 40, 30522),
        ([1] * 600, 16, 400),
    ],
)
def test_packed(kernel, dtype, lengths, dim, vocabulary):
    hidden = lattice(sum(lengths), dim, dtype=dtype, device=CUDA)
    compare(hidden, *decoder(vocabulary, dim, dtype, CUDA), cu_seqlens=starts(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(4, 17), (7, 300), (2, 33000)])
def test_padded(kernel, dtype, kind, activation, with_bias, batch, length):
    """Positions have each integer dtype."""
    hidden = lattice(batch, length, 40, dtype=dtype, device=CUDA)
    weight, bias = decoder(201, 40, dtype, CUDA)
    mask = attention_mask(kind, batch, length)
    mask = None if mask is None else mask.to(CUDA)
    compare(hidden, weight, bias if with_bias else None, mask, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_for_every_block(fused, dtype):
    """There are more tiles than run at once, and the last tile of each side is not full."""
    lengths = torch.randint(0, 400, (60,)).tolist()
    hidden = lattice(sum(lengths), 768, dtype=dtype, device=CUDA)
    weight, bias = decoder(5001, 768, dtype, CUDA)
    actual = sf.splade_head(hidden, weight, bias, cu_seqlens=starts(lengths), activation="relu")
    logits = hidden.float() @ weight.float().t()  # exact, as values are small multiples of 1/4
    expected = torch.stack([part.amax(0) for part in logits.split(lengths) if len(part)])
    rows = torch.tensor(lengths, device=CUDA) > 0
    assert torch.equal(actual[rows], (expected + bias.float()).relu().to(dtype))
    assert (actual[~rows] == 0).all()


def test_without_positions_too(fused):
    """Keys have 32 bits in inference, and also contain the position in training."""
    lengths = [300, 0, 24, 24, 700, 5]
    hidden = torch.randn(sum(lengths), 64, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(500, 64, device=CUDA, dtype=torch.bfloat16)
    inference = sf.splade_head(hidden, weight, cu_seqlens=starts(lengths))
    training = sf.splade_head(hidden, weight.requires_grad_(), cu_seqlens=starts(lengths))
    assert torch.equal(inference, training.detach())


@pytest.mark.parametrize("length", [40, 600])
def test_tie_goes_to_the_lowest_position(kernel, length):
    """Ties occur within a tile, and between tiles that end in any order."""
    hidden = torch.ones(1, length, 8, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(300, 8, device=CUDA, dtype=torch.bfloat16)
    mask = torch.ones(1, length, device=CUDA)
    mask[:, :2] = 0
    sf.splade_head(hidden, weight, None, mask, activation="relu").sum().backward()
    expected = torch.zeros(1, length, 8)
    expected[:, 2] = 300
    assert torch.equal(hidden.grad.float().cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(kernel, dtype):
    hidden = lattice(3, 400, 16, dtype=dtype, device=CUDA)
    weight, _ = decoder(150, 16, dtype, CUDA)
    hidden[0, 5] = torch.nan
    hidden[0, 399, 3] = torch.inf
    hidden[1, 300:, 2] = -torch.inf
    weight[7] = torch.inf
    weight[8, 2] = torch.nan
    bias = torch.zeros(150, dtype=dtype, device=CUDA)
    bias[9], bias[10] = torch.nan, torch.inf
    mask = torch.ones(3, 400, device=CUDA)
    mask[2, 100:] = 0
    expected = reference.splade_head(hidden, weight, bias, mask, activation="relu")
    actual = sf.splade_head(hidden, weight, bias, mask, activation="relu")
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_positions_that_do_not_count_are_not_read(kernel):
    hidden = torch.randn(3, 500, 64, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(300, 64, device=CUDA, dtype=torch.bfloat16)
    mask = attention_mask("holes", 3, 500).to(CUDA)
    mask[1] = False
    expected = sf.splade_head(hidden, weight, None, mask)
    hidden[~mask] = torch.nan
    assert torch.equal(sf.splade_head(hidden, weight, None, mask), expected)
    assert (expected[1] == 0).all()


def test_the_same_bits_every_time(kernel):
    tensors = [
        torch.randn(20, 300, 64, device=CUDA, dtype=torch.bfloat16),
        torch.randn(3000, 64, device=CUDA, dtype=torch.bfloat16),
        torch.randn(3000, device=CUDA, dtype=torch.bfloat16),
    ]
    mask = attention_mask("holes", 20, 300).to(CUDA)
    first = gradients(sf.splade_head, tensors, mask)
    for _ in range(20):
        again = gradients(sf.splade_head, tensors, mask)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_captured_in_a_graph(kernel):
    """A replayed graph uses new values and a new mask."""
    hidden = lattice(4, 300, 64, dtype=torch.bfloat16, device=CUDA)
    weight, bias = decoder(500, 64, torch.bfloat16, CUDA)
    mask = attention_mask("right", 4, 300).to(CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sf.splade_head(hidden, weight, bias, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = sf.splade_head(hidden, weight, bias, mask)
    for kind in ("holes", "left", "empty_rows"):
        hidden.copy_(lattice(4, 300, 64, dtype=torch.bfloat16, device=CUDA))
        mask.copy_(attention_mask(kind, 4, 300))
        graph.replay()
        assert torch.equal(pooled, sf.splade_head(hidden, weight, bias, mask))


def test_on_a_side_stream(kernel):
    hidden = lattice(4, 300, 64, dtype=torch.bfloat16, device=CUDA)
    weight, bias = decoder(500, 64, torch.bfloat16, CUDA)
    expected = sf.splade_head(hidden, weight, bias)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        later = lattice(4, 300, 64, dtype=torch.bfloat16, device=CUDA)
        torch.cuda._sleep(10_000_000)
        later.copy_(hidden)
        actual = sf.splade_head(later, weight, bias)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_which_kernel_runs(fused, monkeypatch, dtype):
    """The fused kernel runs where it is enabled and supported, else the other one."""
    hidden = lattice(2, 30, 16, dtype=dtype, device=CUDA)
    weight, bias = decoder(50, 16, dtype, CUDA)

    def is_fused(*args, **options):
        return any(FUSED_KERNEL in name for name in launched_kernels(*args, **options))

    assert is_fused(hidden, weight, bias)
    assert not is_fused(hidden, weight, bias, pooling="sum")
    assert not is_fused(hidden.double(), weight.double(), bias.double())
    floats = hidden.float(), weight.float(), bias.float()
    assert is_fused(*floats)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
        assert not is_fused(*floats)
    assert not is_fused(hidden[..., :12], weight[:, :12], bias)
    unaligned = weight.new_empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
    assert not is_fused(hidden, unaligned, bias)
    monkeypatch.delenv("SPLADE_FAST_HOPPER")
    assert not is_fused(hidden, weight, bias)


def test_tf32_rounds_each_operand_by_a_unit_of_tf32_at_most(fused):
    hidden, weight = torch.randn(40, 768, device=CUDA), torch.randn(3000, 768, device=CUDA)
    exact = hidden.double() @ weight.double().t()
    # Two rounded operands, and sums in float32.
    unit = 2 * 2.0**-10 + 2.0**-20 + 768 * 2.0**-23
    bound = unit * (hidden.abs().double() @ weight.abs().double().t())
    actual = sf.splade_head(hidden[:, None], weight, activation="relu")
    assert ((actual.double() - exact.relu()).abs() <= bound).all()


SCREEN_KERNEL = "screen_sm90_kernel"


def few_active(hidden: Tensor, weight: Tensor, share: float = 0.005) -> Tensor:
    """Return a bias in steps of 1/4 that leaves about a share of the logits positive."""
    logits = hidden.flatten(0, -2)[:2000].float() @ weight.float().t()
    level = logits.flatten().cpu().kthvalue(int((1 - share) * logits.numel())).values.item()
    bias = -round(4 * level) / 4 + torch.randint(-2, 3, (len(weight),), device=hidden.device) / 4
    return bias.to(weight.dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("lengths", "dim", "vocabulary"),
    [
        ([1], 8, 1),
        ([257], 72, 129),
        ([5, 0, 1, 17], 64, 101),
        ([0, 0, 255, 1, 1, 255, 0], 128, 300),
        ([24] * 50, 384, 1000),
        ([700, 3, 0, 1024], 768, 30522),
        ([40] * 8, 1024, 5000),
    ],
)
def test_screened_packed(fused, dtype, lengths, dim, vocabulary):
    hidden = lattice(sum(lengths), dim, dtype=dtype, device=CUDA)
    weight, _ = decoder(vocabulary, dim, dtype, CUDA)
    options = {"cu_seqlens": starts(lengths), "algorithm": "screened"}
    compare(hidden, weight, few_active(hidden, weight), **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_screened_padded(fused, dtype, kind, activation):
    hidden = lattice(7, 300, 40, dtype=dtype, device=CUDA)
    weight, _ = decoder(201, 40, dtype, CUDA)
    mask = attention_mask(kind, 7, 300)
    mask = None if mask is None else mask.to(CUDA)
    if mask is not None:
        hidden = hidden.masked_fill(~mask[..., None], torch.nan)
    bias = few_active(hidden.nan_to_num(), weight)
    dense, screened = (
        sf.splade_head(hidden, weight, bias, mask, activation=activation, algorithm=algorithm)
        for algorithm in ("dense", "screened")
    )
    assert torch.equal(screened, dense)
    assert (dense > 0).any()


@pytest.mark.parametrize("dtype", HALF)
def test_screened_logits_around_zero(fused, dtype):
    """Logits are exact, rows do not fit int8, and biases almost cancel the logits."""
    for dim in (64, 256):
        hidden = torch.randint(-255, 256, (1, 700, dim), device=CUDA).to(dtype)
        weight = (torch.randint(-255, 256, (5000, dim), device=CUDA) * 2.0**-9).to(dtype)
        logits = (hidden[0].float() @ weight.float().t()).double()
        bias = (-logits.amax(0) + torch.randint(-2, 3, (5000,), device=CUDA) * 2.0**-9).to(dtype)
        pooled = sf.splade_head(hidden, weight, bias, activation="relu", algorithm="screened")
        exact = (logits.amax(0) + bias.double()).relu().to(dtype)
        assert torch.equal(pooled[0], exact)


@pytest.mark.parametrize("dtype", HALF)
def test_screened_where_nothing_is_spared(fused, dtype):
    """All logits are active, a token is not finite, or a weight changed unnoticed by torch."""
    hidden = lattice(4, 300, 64, dtype=dtype, device=CUDA)
    weight, bias = decoder(3000, 64, dtype, CUDA)

    def check(bias):
        dense, screened = (
            sf.splade_head(hidden, weight, bias, algorithm=algorithm)
            for algorithm in ("dense", "screened")
        )
        assert torch.equal(screened.isnan(), dense.isnan())
        assert torch.equal(screened.nan_to_num(), dense.nan_to_num())

    check(bias + 100)
    check(few_active(hidden, weight))
    weight.data.neg_()
    check(few_active(hidden, weight))
    hidden[1, 7, 3] = torch.nan
    check(bias)


def test_screened_in_a_graph(fused):
    """A replayed graph prepares a new weight, and uses new values and a new mask."""
    hidden = lattice(4, 300, 64, dtype=torch.bfloat16, device=CUDA)
    weight, _ = decoder(3000, 64, torch.bfloat16, CUDA)
    bias = few_active(hidden, weight)
    mask = attention_mask("right", 4, 300).to(CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sf.splade_head(hidden, weight, bias, mask, algorithm="screened")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = sf.splade_head(hidden, weight, bias, mask, algorithm="screened")
    for kind in ("holes", "left", "empty_rows"):
        hidden.copy_(lattice(4, 300, 64, dtype=torch.bfloat16, device=CUDA))
        weight.copy_(lattice(3000, 64, dtype=torch.bfloat16, device=CUDA))
        mask.copy_(attention_mask(kind, 4, 300))
        graph.replay()
        assert torch.equal(pooled, sf.splade_head(hidden, weight, bias, mask, algorithm="dense"))


def test_screened_the_same_bits_every_time(fused):
    tensors = [
        torch.randn(20, 300, 64, device=CUDA, dtype=torch.bfloat16),
        torch.randn(3000, 64, device=CUDA, dtype=torch.bfloat16),
        torch.full((3000,), -25.0, device=CUDA, dtype=torch.bfloat16),
    ]
    mask = attention_mask("holes", 20, 300).to(CUDA)
    first = gradients(sf.splade_head, tensors, mask, algorithm="screened")
    for _ in range(20):
        again = gradients(sf.splade_head, tensors, mask, algorithm="screened")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_where_screened_does_not_run(fused, monkeypatch):
    """The error gives the reason, and "auto" runs the dense product."""
    hidden = lattice(2, 30, 16, dtype=torch.bfloat16, device=CUDA)
    weight, bias = decoder(50, 16, torch.bfloat16, CUDA)
    screened = {"algorithm": "screened"}
    assert any(SCREEN_KERNEL in name for name in launched_kernels(hidden, weight, bias, **screened))
    assert not any(SCREEN_KERNEL in name for name in launched_kernels(hidden, weight, bias))
    with pytest.raises(NotImplementedError, match='supports pooling="max" only'):
        sf.splade_head(hidden, weight, bias, pooling="sum", **screened)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        sf.splade_head(hidden.float(), weight.float(), **screened)
    monkeypatch.delenv("SPLADE_FAST_HOPPER")
    with pytest.raises(NotImplementedError, match="SPLADE_FAST_HOPPER=1"):
        sf.splade_head(hidden, weight, bias, **screened)


def test_memory(fused):
    """Only the outputs and the keys of sequences in several tiles are allocated."""
    lengths = [24] * 4000
    hidden = torch.randn(sum(lengths), 128, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(30522, 128, device=CUDA, dtype=torch.bfloat16)
    cu_seqlens = starts(lengths)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pooled = sf.splade_head(hidden, weight, cu_seqlens=cu_seqlens)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.3 * pooled.nbytes
