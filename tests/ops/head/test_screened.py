"""The screened head equals the dense head to the bit, and runs when it is faster."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import splade_fast as sf
from splade_fast import _library
from splade_fast.ops.head import screening
from splade_fast.ops.head.screening import ScreeningState, find_screening_state
from splade_fast.ops.head.screening_basis import Moments, balanced_basis
from splade_fast.ops.head.screening_hopper import check_supported
from tests.ops.inputs import (
    ACTIVATIONS,
    DTYPES,
    MASKS,
    POOLINGS,
    attention_mask,
)
from tests.ops.instruction_sets import assert_pass_with, instruction_sets_here
from tests.selection import ALL, pairwise

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["rotated", "along a basis"])
def rounding(request, monkeypatch):
    """Round to int8 after a rotation and along a basis, which is used from the first call here."""
    if request.param == "rotated":
        yield
        return
    prepare = ScreeningState.prepare

    def prepare_with_basis(state, *arguments):
        return prepare(state, *arguments[:5], is_training=False)

    monkeypatch.setattr(screening, "_BASIS_TOKENS_PER_DIM", 0)
    monkeypatch.setattr(ScreeningState, "prepare", prepare_with_basis)
    # Many small products on several threads are slow where cores are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


exact = pytest.mark.usefixtures("rounding")


def same_bits(actual, expected):
    """Assert equality to the bit, where all NaN are equal."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.masked_fill(nan, 0), expected.masked_fill(nan, 0))


def assert_same(hidden, weight, bias=None, mask=None, **options):
    """Assert that the screened head equals the dense one: values, argmax and every gradient."""
    results = []
    for algorithm in ("dense", "screened"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
        pooled = sf.splade_head(
            leaves[0],
            leaves[1],
            leaves[2] if bias is not None else None,
            mask,
            algorithm=algorithm,
            **options,
        )
        # Different for every entry, so that a wrong argmax shows in the gradient of hidden.
        factor = torch.arange(1, pooled.numel() + 1, dtype=pooled.dtype).view_as(pooled)
        gradients = torch.autograd.grad((pooled * factor.remainder(97)).sum(), leaves)
        results.append((pooled.detach(), *gradients))
    for actual, expected in zip(results[1], results[0], strict=True):
        same_bits(actual, expected)


def trained(batch, length, dim, vocabulary, dtype, active=0.02):
    """Return inputs with a common mean and outlier dimensions, and a share of active dims."""
    hidden = torch.randn(batch, length, dim) + torch.randn(dim)
    hidden[..., : dim // 20 + 1] *= 8
    weight = torch.randn(vocabulary, dim) / dim**0.5
    largest = (hidden @ weight.T).amax(1) if length else torch.zeros(batch, vocabulary)
    bias = -torch.quantile(largest.flatten(), 1 - active) + torch.randn(vocabulary) / 10
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


@exact
@pairwise(dtype=DTYPES, pooling=POOLINGS, mask=MASKS)
def test_equals_the_dense_head(dtype, pooling, mask):
    inputs = trained(5, 37, 100, 301, dtype)
    assert_same(*inputs, attention_mask(mask, 5, 37), pooling=pooling)


@exact
@pairwise(pooling=POOLINGS, activation=ACTIVATIONS, active=[0.001, 0.3, 1.0])
def test_every_activation_and_share(pooling, activation, active):
    inputs = trained(3, 20, 64, 500, torch.float32, active)
    assert_same(*inputs, pooling=pooling, activation=activation)


@exact
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed(pooling):
    hidden, weight, bias = trained(1, 60, 96, 200, torch.float32)
    bounds = torch.tensor([0, 0, 7, 7, 31, 32, 60, 60], dtype=torch.int32)
    assert_same(hidden[0], weight, bias, cu_seqlens=bounds, pooling=pooling)


@exact
@pytest.mark.parametrize(
    ("batch", "length", "dim", "vocabulary"),
    [
        (0, 3, 8, 10),
        (2, 0, 8, 10),
        (2, 3, 8, 0),
        (2, 3, 0, 10),
        (1, 1, 1, 1),
        (1, 16, 64, 48),
        (2, 17, 65, 49),
        (3, 9, 768, 100),
        (1, 5000, 8, 60),
        (700, 2, 8, 50),
    ],
)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_sizes(batch, length, dim, vocabulary, pooling):
    hidden = torch.randn(batch, length, dim)
    assert_same(hidden, torch.randn(vocabulary, dim), torch.randn(vocabulary), pooling=pooling)


@exact
@pytest.mark.parametrize("pooling", POOLINGS)
def test_more_tokens_than_a_block_of_the_dense_head(pooling):
    """Sum pooling of more than 16 MiB of packed tokens uses the tiles of the dense head."""
    inputs = trained(3, 3000, 768, 50, torch.float32)
    assert_same(*inputs, pooling=pooling)


@exact
def test_without_bias_and_not_contiguous():
    hidden, weight, _ = trained(4, 10, 128, 96, torch.float32)
    assert_same(hidden, weight)
    assert_same(hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T)


@exact
@pytest.mark.parametrize("k", [None, 8])
def test_topk(k):
    inputs = trained(40, 12, 128, 300, torch.float32)
    dense, screened = (
        sf.splade_head_topk(*inputs, k=k, algorithm=algorithm)
        for algorithm in ("dense", "screened")
    )
    assert screened.equal(dense)


# Adversarial inputs ------------------------------------------------------------------------------


def nudged(x, steps):
    """Return the `steps`-th next float."""
    for _ in range(abs(steps)):
        x = torch.nextafter(x, torch.full_like(x, torch.inf if steps > 0 else -torch.inf))
    return x


@exact
@pytest.mark.parametrize("steps", range(-3, 4))
@pytest.mark.parametrize("dim", [1, 7, 128, 768])
def test_logits_within_a_few_ulp_of_zero(steps, dim):
    """The last bit of the product decides whether an entry is active."""
    hidden, weight = torch.randn(1, 1, dim), torch.randn(400, dim)
    logits = sf.splade_head(hidden, weight, activation="relu", algorithm="dense")
    negative = sf.splade_head(hidden, -weight, activation="relu", algorithm="dense")
    bias = nudged(negative - logits, steps)[0]
    pooled = sf.splade_head(hidden, weight, bias, activation="relu", algorithm="dense")
    assert ((pooled > 0).float().mean() > 0.9) == (steps > 0)
    assert_same(hidden, weight, bias)


@exact
def test_ties_and_near_ties_of_the_maximum():
    """Tokens are equal or differ by one ulp in some dimensions."""
    token = torch.randn(128)
    hidden = token.repeat(40, 1)
    hidden[1::3] = nudged(hidden[1::3], 1)
    hidden[2::3, :64] = nudged(hidden[2::3, :64], -1)
    order = torch.randperm(40)
    weight = torch.randn(300, 128)
    assert_same(torch.stack([hidden, hidden[order]]), weight, torch.randn(300) * 5)


@exact
@pytest.mark.parametrize("kind", ["one", "many", "token", "entry", "constant"])
def test_outliers_and_zero_rows(kind):
    hidden, weight, bias = trained(3, 24, 192, 200, torch.float32)
    if kind == "one":
        hidden[..., 5] *= 1000
    elif kind == "many":
        hidden[..., ::16] *= 100
        weight[..., ::12] *= 100
    elif kind == "token":
        hidden[:, ::2] = 0
        hidden[0, 3] *= 1e4
    elif kind == "entry":
        weight[::2] = 0
        weight[7] *= 1e4
    else:
        hidden[:] = 1.25
        weight[:] = weight[:, :1]
    assert_same(hidden, weight, bias)


@exact
@pytest.mark.parametrize("hidden_scale", [1e-44, 1e-38, 1e-20, 1, 1e15, 1e25, 1e37])
@pytest.mark.parametrize("weight_scale", [1e-44, 1e-38, 1e-20, 1, 1e15, 1e25, 1e37])
def test_scales_down_to_denormals_and_up_to_overflow(hidden_scale, weight_scale):
    hidden, weight, _ = trained(2, 12, 64, 100, torch.float32)
    hidden, weight = hidden * hidden_scale, weight * weight_scale
    hidden[1, ::2] /= hidden_scale
    weight[::2] /= weight_scale
    results = [
        sf.splade_head(hidden, weight, activation="relu", algorithm=algorithm)
        for algorithm in ("dense", "screened")
    ]
    same_bits(results[1], results[0])


@exact
@pytest.mark.parametrize("flush", [False, True])
def test_denormals_flushed_or_not(flush):
    hidden, weight = torch.randn(2, 6, 40) * 1e-22, torch.randn(64, 40) * 1e-20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has its own flush mode
    torch.set_flush_denormal(flush)
    try:
        assert_same(hidden, weight, torch.randn(64) * 1e-41, activation="relu")
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@exact
@pairwise(
    pooling=POOLINGS,
    value=[torch.inf, -torch.inf, torch.nan],
    place=["hidden", "weight", "bias", "all"],
)
def test_inf_and_nan(pooling, value, place):
    hidden, weight, bias = trained(4, 9, 70, 120, torch.float32, 0.2)
    if place in ("hidden", "all"):
        hidden[1, 4, 3] = value
        hidden[2, :, 0] = value
    if place in ("weight", "all"):
        weight[5, 6] = value
        weight[70] = value
    if place in ("bias", "all"):
        bias[3::7] = value
    for algorithm in ("dense", "screened"):
        pooled = sf.splade_head(hidden, weight, bias, pooling=pooling, algorithm=algorithm)
        if algorithm == "dense":
            expected = pooled
    same_bits(pooled, expected)


def random_case(generator):
    """Return small inputs of random shape and scale, with ties, zeros and logits near 0."""

    def below(limit):
        return int(torch.randint(limit, (), generator=generator))

    batch, length, dim, vocabulary = 1 + below(3), 1 + below(9), 1 + below(90), 1 + below(60)
    hidden = torch.randn(batch, length, dim, generator=generator)
    weight = torch.randn(vocabulary, dim, generator=generator)
    kind = below(6)
    if kind == 1:  # exact products, many ties
        hidden, weight = hidden.round(), weight.round()
    elif kind == 2:
        hidden = hidden * torch.exp2(torch.randint(-30, 30, (dim,), generator=generator))
    elif kind == 3:
        weight = weight * torch.exp2(torch.randint(-30, 30, (vocabulary, 1), generator=generator))
    elif kind == 4:
        hidden = hidden + 10 * torch.randn(dim, generator=generator)
    dtype = torch.bfloat16 if below(3) == 0 else torch.float32
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    # Biases almost cancel a logit of each entry, so that most logits are near 0.
    logits = hidden[below(batch), below(length)].float() @ weight.float().T
    bias = -logits * (1 + 2.0 ** -below(25) * torch.randn(vocabulary, generator=generator))
    mask = torch.rand(batch, length, generator=generator) < 0.8
    return hidden, weight, bias.to(dtype), mask, POOLINGS[below(2)]


@exact
def test_random_cases():
    cases = 10_000 if os.environ.get(ALL) else 1_000
    generator = torch.Generator().manual_seed(0)
    active = 0
    for _ in range(cases):
        hidden, weight, bias, mask, pooling = random_case(generator)
        dense, screened = (
            sf.splade_head(hidden, weight, bias, mask, pooling=pooling, algorithm=algorithm)
            for algorithm in ("dense", "screened")
        )
        assert torch.equal(screened, dense), (hidden, weight, bias, mask, pooling)
        active += int(dense.count_nonzero())
    assert active > cases


@pytest.mark.parametrize("isa", instruction_sets_here()[:-1])
def test_other_instruction_sets(isa):
    chosen = "test_equals_the_dense_head or test_inf_and_nan or ulp or outliers or test_sizes"
    assert_pass_with(isa, __file__, chosen)


# Choice of the algorithm -------------------------------------------------------------------------


class Calls:
    """Counts of what algorithm="auto" does."""

    def __init__(self, monkeypatch):
        self.prepared = 0
        self.declined = []
        prepare, record = ScreeningState.prepare, ScreeningState.record_trial

        def counting_prepare(state, *args):
            before = state.prepared
            prepared = prepare(state, *args)
            self.prepared += prepared is not before
            return prepared

        def counting_record(state, is_declined):
            self.declined.append(is_declined)
            record(state, is_declined)

        monkeypatch.setattr(ScreeningState, "prepare", counting_prepare)
        monkeypatch.setattr(ScreeningState, "record_trial", counting_record)


@pytest.fixture
def calls(monkeypatch):
    if sf.build_info()["cpu_instruction_set"] == "portable":
        pytest.skip("the portable product is slower than the dense one: it is never chosen")
    return Calls(monkeypatch)


def test_auto_screens_a_trained_model(calls):
    hidden, weight, bias = trained(16, 40, 128, 2000, torch.float32, 0.005)
    pooled = [sf.splade_head(hidden, weight, bias) for _ in range(3)]
    assert calls.declined == [False] * 3
    assert calls.prepared == 1
    assert torch.equal(pooled[2], sf.splade_head(hidden, weight, bias, algorithm="dense"))


def test_auto_declines_where_everything_is_active_and_asks_ever_less_often(calls):
    hidden, weight = torch.randn(16, 40, 64), torch.randn(2000, 64)
    bias = torch.full((2000,), 50.0)
    asked = []
    for _ in range(40):
        before = len(calls.declined)
        pooled = sf.splade_head(hidden, weight, bias, pooling="sum")
        asked.append(len(calls.declined) > before)
    assert all(calls.declined)
    # After n declines in a row, 2**n - 1 calls run without a trial.
    assert [i for i, yes in enumerate(asked) if yes] == [0, 2, 6, 14, 30]
    expected = sf.splade_head(hidden, weight, bias, pooling="sum", algorithm="dense")
    assert torch.equal(pooled, expected)
    assert not torch.equal(pooled, torch.zeros_like(pooled))


def test_auto_returns_to_screening_once_training_has_made_the_model_sparse(calls):
    hidden, weight, bias = trained(16, 40, 128, 2000, torch.float32, 0.005)
    for _ in range(3):
        sf.splade_head(hidden, weight, bias + 100)
    assert calls.declined == [True, True]
    for _ in range(4):
        sf.splade_head(hidden, weight, bias)
    assert calls.declined == [True, True, False]


def test_forced_screening_is_never_declined_and_counts_for_nothing(calls):
    hidden, weight = torch.randn(2, 4, 64), torch.randn(100, 64)
    sf.splade_head(hidden, weight, torch.full((100,), 50.0), algorithm="screened")
    assert calls.declined == []


def test_dense_is_never_asked(calls):
    hidden, weight, bias = trained(16, 40, 128, 2000, torch.float32, 0.005)
    sf.splade_head(hidden, weight, bias, algorithm="dense")
    assert calls.prepared == 0


def test_few_tokens_are_not_worth_preparing_a_weight_that_training_changes(calls):
    hidden, weight, bias = trained(2, 20, 128, 500, torch.float32, 0.005)
    sf.splade_head(hidden.requires_grad_(), weight, bias)
    assert calls.prepared == 0
    sf.splade_head(hidden.detach(), weight, bias)
    assert calls.prepared == 1


# Prepared weights --------------------------------------------------------------------------------


def test_a_changed_weight_is_prepared_anew(calls):
    hidden, weight, bias = trained(4, 20, 64, 300, torch.float32)
    screened = {"algorithm": "screened"}
    sf.splade_head(hidden, weight, bias, **screened)
    sf.splade_head(hidden, weight, bias, **screened)
    assert calls.prepared == 1
    for change in (
        lambda: weight.neg_(),
        lambda: weight.data.mul_(3),  # torch does not count this one
        lambda: weight[7].fill_(2.5),
    ):
        change()
        expected = sf.splade_head(hidden, weight, bias, algorithm="dense")
        assert torch.equal(sf.splade_head(hidden, weight, bias, **screened), expected)
    assert calls.prepared == 4


def test_an_optimiser_step_is_noticed():
    hidden, weight, bias = trained(8, 80, 64, 300, torch.float32)
    decoder = torch.nn.Linear(64, 300)
    decoder.load_state_dict({"weight": weight, "bias": bias})
    optimiser = torch.optim.SGD(decoder.parameters(), lr=0.5)
    for _ in range(3):
        pooled = [
            sf.splade_head(hidden, decoder.weight, decoder.bias, algorithm=algorithm)
            for algorithm in ("screened", "dense")
        ]
        assert torch.equal(*pooled)
        optimiser.zero_grad()
        pooled[0].sum().backward()
        optimiser.step()


def test_prepared_weights_are_freed_with_the_weight():
    gc.collect()
    before = len(screening._states)
    hidden, weight, bias = trained(2, 5, 64, 300, torch.float32)
    sf.splade_head(hidden, weight, bias, algorithm="screened")
    view = weight[10:]
    assert len(screening._states) == before + 1
    del weight
    assert len(screening._states) == before + 1  # the view still holds the storage
    del view
    gc.collect()
    assert len(screening._states) == before


@pytest.mark.parametrize("dim", [128, 384, 768])
def test_size_of_prepared_weights(dim):
    """A prepared weight has at most 0.3 times the size of the float32 weight."""
    hidden, weight, bias = trained(1, 5, dim, 4800, torch.float32)
    sf.splade_head(hidden, weight, bias, algorithm="screened")
    prepared = find_screening_state(weight, weight.dtype).prepared
    size = sum(t.nbytes for t in (prepared.mean, prepared.packed, prepared.rows))
    assert size <= 0.3 * weight.nbytes


def test_a_larger_batch_gives_a_better_mean():
    hidden, weight, bias = trained(16, 40, 64, 300, torch.float32)
    decoder = find_screening_state(weight, weight.dtype)
    means = []
    for batch in (1, 2, 4, 16):
        sf.splade_head(hidden[:batch], weight, bias, algorithm="screened")
        means.append(decoder.prepared.tokens)
    assert means == [40, 40, 160, 640]


def test_hidden_states_that_are_not_finite_leave_no_trace_in_the_mean():
    hidden, weight, bias = trained(4, 20, 64, 300, torch.float32)
    bad = hidden.clone()
    bad[0, 0] = torch.nan
    sf.splade_head(bad, weight, bias, algorithm="screened")
    assert find_screening_state(weight, weight.dtype).prepared.mean.count_nonzero() == 0
    assert_same(hidden, weight, bias)


def test_inference_tensors():
    """torch does not count their changes, so nothing is kept."""
    with torch.inference_mode():
        hidden, weight, bias = trained(4, 20, 64, 300, torch.float32)
        first = sf.splade_head(hidden, weight, bias, algorithm="screened")
        weight.neg_()
        second = sf.splade_head(hidden, weight, bias, algorithm="screened")
        assert torch.equal(second, sf.splade_head(hidden, weight, bias, algorithm="dense"))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_remembers_the_weight_that_was_cast(calls, dtype):
    hidden, weight, bias = trained(16, 40, 64, 300, torch.float32)
    with torch.autocast("cpu", dtype):
        for _ in range(3):
            pooled = sf.splade_head(hidden, weight, bias, algorithm="screened")
        expected = sf.splade_head(hidden, weight, bias, algorithm="dense")
    assert calls.prepared == 1
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, expected)


def test_compiles_in_one_graph():
    hidden, weight, bias = trained(8, 80, 64, 300, torch.float32)

    def loss(hidden, weight, bias, algorithm):
        pooled = sf.splade_head(hidden * 2, weight, bias, algorithm=algorithm)
        return pooled.square().sum()

    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    # aot_eager computes as eager does: bits may be compared.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves, "dense"), leaves)
    for algorithm in ("auto", "screened"):
        actual = torch.autograd.grad(compiled(*leaves, algorithm), leaves)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_too_many_dimensions():
    hidden, weight = torch.zeros(1, 1, 2**16 + 1), torch.zeros(1, 2**16 + 1)
    with pytest.raises(NotImplementedError, match="at most 65536 dimensions, got 65537"):
        sf.splade_head(hidden, weight, algorithm="screened")
    assert sf.splade_head(hidden, weight).item() == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hopper": "0"}, "must be enabled with SPLADE_FAST_HOPPER=1"),
        ({"pooling": 1}, 'supports pooling="max" only'),
        ({"dtype": torch.float32}, "needs bfloat16 or float16, got torch.float32"),
        ({"dim": 12}, "a multiple of 8, got 12"),
        ({"dim": 2**16 + 8}, "at most 65536 dimensions, a multiple of 8, got 65544"),
        ({"kernels": ""}, "was built without sm_90a"),
        ({"capability": (8, 0)}, "needs compute capability 9.0, found 8.0"),
    ],
)
def test_what_a_gpu_needs(monkeypatch, change, reason):
    def check(hopper="1", pooling=0, dtype=torch.bfloat16, dim=16, kernels="head_sm90a", **found):
        capability = found.get("capability", (9, 0))
        monkeypatch.setenv("SPLADE_FAST_HOPPER", hopper)
        monkeypatch.setattr("splade_fast._library.cuda_capability", lambda index: capability)
        monkeypatch.setitem(_library._STATE.built, "cuda_kernels", kernels)
        check_supported(torch.zeros(1, 1, dim, dtype=dtype), pooling)

    check()
    with pytest.raises(NotImplementedError, match=reason):
        check(**change)


# The basis ---------------------------------------------------------------------------------------

in_stages = pytest.mark.skipif(
    sf.build_info()["cpu_instruction_set"] == "amx", reason="AMX multiplies in one go"
)


def narrow(tokens, dim, vocabulary, active=0.01):
    """Return hidden states with a few large principal components, which are not axes."""
    axes = torch.linalg.qr(torch.randn(dim, dim))[0]
    hidden = torch.randn(tokens // 40, 40, dim) * 0.9 ** torch.arange(dim) @ axes + torch.randn(dim)
    weight = torch.randn(vocabulary, dim) / dim**0.5
    largest = (hidden @ weight.T).amax(1)
    bias = torch.full((vocabulary,), -torch.quantile(largest.flatten(), 1 - active).item())
    return hidden, weight, bias


def percent_of_product(hidden, weight, bias):
    prepared = find_screening_state(weight, weight.dtype).prepared
    options = (None, None, 0, 1, False, False)
    report = torch.ops.splade_fast.head_forward_screened(
        hidden, weight, bias, *options, *prepared.arguments, False
    )[3]
    return report[3].item()


@in_stages
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_after_enough_tokens_a_basis_spares_part_of_the_product(dtype, pooling):
    hidden, weight, bias = (t.to(dtype) for t in narrow(1200, 64, 3000))
    expected = sf.splade_head(hidden, weight, bias, pooling=pooling, algorithm="dense")
    options = {"pooling": pooling, "algorithm": "screened"}
    assert torch.equal(sf.splade_head(hidden, weight, bias, **options), expected)
    assert find_screening_state(weight, dtype).prepared.basis is None
    assert percent_of_product(hidden, weight, bias) == 100
    assert torch.equal(sf.splade_head(hidden, weight, bias, **options), expected)
    assert find_screening_state(weight, dtype).prepared.basis is not None
    assert percent_of_product(hidden, weight, bias) < 70
    # Hidden states from another distribution than those that the basis was computed from.
    for other in (torch.randn(3, 50, 64), 1e6 * torch.randn(2, 9, 64), torch.zeros(1, 3, 64)):
        others = other.to(dtype), weight, bias
        dense = sf.splade_head(*others, pooling=pooling, algorithm="dense")
        same_bits(sf.splade_head(*others, **options), dense)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30, 1e-30])
@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_extreme_values_along_a_basis_made_without_them(value, place):
    hidden, weight, bias = narrow(80, 64, 300)
    moments = Moments(64)
    moments.add(hidden.flatten(0, 1))
    basis = balanced_basis(moments, weight, bias)
    tensor = hidden if place == "hidden" else weight
    tensor.view(-1, 64)[::7, ::5] = value
    mean = moments.mean.float()
    packed, rows = torch.ops.splade_fast.head_prepare(
        weight, mean, basis.matrices, basis.order, basis.error
    )
    for pooling in (0, 1):
        options = (None, None, pooling, 1, False, False)
        prepared = (mean, packed, rows, basis.matrices, basis.order)
        ops = torch.ops.splade_fast
        screened = ops.head_forward_screened(hidden, weight, bias, *options, *prepared, False)[0]
        same_bits(screened, ops.head_forward_dense(hidden, weight, bias, *options)[0])


@in_stages
def test_calls_without_a_trial_bring_a_basis_nearer(calls):
    hidden, weight, bias = narrow(2400, 64, 300)
    texts = hidden.view(300, 1, 8, 64)
    for text in texts:
        sf.splade_head(text, weight, bias + 100)
    assert all(calls.declined)
    assert len(calls.declined) * 8 < 64 * 32  # the trials alone have too few tokens
    for text in texts[:64]:
        sf.splade_head(text, weight, bias)
    assert find_screening_state(weight, weight.dtype).prepared.basis is not None
    assert not calls.declined[-1]


@in_stages
def test_a_basis_that_spares_nothing_goes_and_is_not_made_again(monkeypatch):
    made = []

    def counting(*arguments):
        made.append(balanced_basis(*arguments))
        return made[-1]

    monkeypatch.setattr(screening, "balanced_basis", counting)
    hidden, weight = torch.randn(30, 40, 64), torch.randn(500, 64)
    bias = torch.full((500,), -2.0)
    for _ in range(6):
        sf.splade_head(hidden, weight, bias, algorithm="screened")
    assert len(made) == 1
    assert made[0] is not None
    assert find_screening_state(weight, weight.dtype).prepared.basis is None


@in_stages
def test_no_basis_for_a_weight_that_changes():
    hidden, weight, bias = narrow(2400, 64, 300)
    decoder = find_screening_state(weight, weight.dtype)
    for _ in range(3):  # training
        sf.splade_head(hidden.requires_grad_(), weight, bias, algorithm="screened")
        assert decoder.prepared.basis is None
    hidden = hidden.detach()
    sf.splade_head(hidden[:30], weight, bias, algorithm="screened")
    weight.neg_()
    sf.splade_head(hidden[:30], weight, bias, algorithm="screened")
    assert decoder.prepared.basis is None
    sf.splade_head(hidden, weight, bias, algorithm="screened")
    assert decoder.prepared.basis is not None
    weight.neg_()
    expected = sf.splade_head(hidden[:9], weight, bias, algorithm="dense")
    assert torch.equal(sf.splade_head(hidden[:9], weight, bias, algorithm="screened"), expected)
    assert decoder.prepared.basis is None


@in_stages
def test_a_basis_begun_under_inference_mode_and_ended_without():
    hidden, weight, bias = narrow(1200, 64, 300)
    expected = sf.splade_head(hidden, weight, bias, algorithm="dense")
    with torch.inference_mode():
        sf.splade_head(hidden, weight, bias, algorithm="screened")
    assert torch.equal(sf.splade_head(hidden, weight, bias, algorithm="screened"), expected)
    assert find_screening_state(weight, weight.dtype).prepared.basis is not None
    assert_same(hidden, weight, bias)


@in_stages
@pytest.mark.usefixtures("often_switching_threads")
def test_threads_prepare_a_basis_together():
    weight = torch.randn(600, 16)
    batches = [torch.randn(1, 40, 16) for _ in range(64)]  # 32 D tokens after 13 batches
    expected = [sf.splade_head(batch, weight, algorithm="dense") for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            copy = weight.clone()
            results = threads.map(
                lambda batch, copy=copy: sf.splade_head(batch, copy, algorithm="screened"), batches
            )
            assert all(map(torch.equal, results, expected))


def test_a_basis_made_under_inference_mode_serves_a_backward():
    hidden, weight, bias = narrow(2400, 64, 300)
    with torch.inference_mode():
        sf.splade_head(hidden, weight, bias, algorithm="screened")
    assert find_screening_state(weight, weight.dtype).prepared.basis is not None
    gradients = []
    for algorithm in ("dense", "screened"):
        leaf = hidden.clone().requires_grad_()
        sf.splade_head(leaf, weight, bias, algorithm=algorithm).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dim", [1, 64, 100, 384])
def test_the_basis_keeps_products_and_balances_moments(dim):
    tokens, weight = torch.randn(5000, dim), torch.randn(3000, dim)
    tokens[:, : dim // 2] *= 4
    weight[:, dim // 4 :] *= 3
    moments = Moments(dim)
    moments.add(tokens[:2000])
    moments.add(tokens[2000:])
    centred = tokens.double() - tokens.double().mean(0)
    torch.testing.assert_close(moments.covariance, centred.T @ centred / 5000, rtol=1e-4, atol=1e-4)
    basis = balanced_basis(moments, weight, None)
    left, right = basis.matrices.double()
    ends = [left.shape[1] // 4, left.shape[1] // 2]
    identity = torch.eye(dim, dtype=torch.float64)
    assert (left @ right.T - identity).norm() <= basis.error <= 1e-4
    assert basis.order.sort()[0].tolist() == list(range(3000))
    # In each stage both have the same sums of squares up to a factor; the first stage has the most.
    entries = weight.double().T @ weight.double()
    of_tokens, of_entries = (
        torch.stack([part.sum() for part in (side.T @ m @ side).diagonal().tensor_split(ends)])
        for side, m in ((left, centred.T @ centred), (right, entries))
    )
    torch.testing.assert_close(
        of_tokens / of_tokens.sum(), of_entries / of_entries.sum(), rtol=1e-3, atol=1e-6
    )
    assert of_tokens[0] > of_tokens[2] / 2 or dim == 1
