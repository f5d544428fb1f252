"""sample equals the formula in plain PyTorch, and draws with exact probabilities."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import splade_fast as sf
import splade_fast.ops.sample as sample_module
from splade_fast import Philox, SparseRows
from splade_fast.reference import sample as reference
from tests.ops.inputs import DTYPES, lattice
from tests.ops.instruction_sets import call_with, instruction_sets_here
from tests.selection import pairwise
from tests.tolerances import assert_accurate

INF, NAN = torch.inf, torch.nan
SIGNIFICANCE = 1e-4  # seeds are fixed, so a test passes always or never


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def kernels(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(sample_module._library, "has_kernels", lambda device: False)
    return request.param


def generator(device: torch.device | str = "cpu", seed: int = 11, step: int = 5) -> Philox:
    rng = Philox(seed, device)
    rng.state[1] = step
    return rng


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def expected(queries, cache, *, scale: float = 1.0, **options) -> sf.NegativeSamples:
    """Compute the formula on the CPU, for inputs whose scores are exact in any order of sums."""
    queries, cache = (
        (rows.to_dense() if isinstance(rows, SparseRows) else rows).cpu()
        for rows in (queries, cache)
    )
    acc = acc_dtype(queries.dtype, cache.dtype)
    options = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()
    }
    scores = queries.to(acc) @ cache.to(acc).t() * scale
    found = reference.sample_negatives(scores, generator().state, **options)
    return sf.NegativeSamples(*found)


def assert_same(found: sf.NegativeSamples, wanted: sf.NegativeSamples) -> None:
    """Assert equal draws and scores, and a logsumexp within the tolerance of another order."""
    for name in ("indices", "scores", "perturbed"):
        actual, truth = getattr(found, name).cpu(), getattr(wanted, name)
        assert actual.dtype == truth.dtype
        torch.testing.assert_close(actual, truth, rtol=0, atol=0, equal_nan=True, msg=name)
    truth = wanted.logsumexp.double()
    assert_accurate(found.logsumexp.cpu(), truth, wanted.logsumexp)


def masks(batch: int, slots: int, device: torch.device) -> dict[str, Tensor]:
    """Return masks: two thirds invalid, and for each query excluded slots, also repeated ones."""
    valid = torch.arange(slots) % 3 == 1
    exclude = torch.randint(-1, slots + 1, (batch, 5))
    exclude[:, 1] = exclude[:, 0]
    return {"valid": valid.to(device), "exclude": exclude.to(device)}


OPTIONS = [
    {},
    {"num_samples": 5, "scale": -0.5, "inv_temp": 0.3},
    {"num_samples": 3, "inv_temp": 0.0},
    {"num_samples": 2, "slot_offset": 7, "query_offset": 9},
    {"slot_offset": 2**34 - 5003, "query_offset": 2**32 - 80},
    {"num_samples": 3, "top_k": 7},
    {"num_samples": 3, "top_k": 2, "slot_offset": 1},
    {"num_samples": 3, "top_k": 1},
    {"num_samples": 40, "top_k": 900},
    {"num_samples": 3, "top_k": 7, "top_k_method": "exact"},
    {"num_samples": 12, "top_k": 10, "top_k_method": "exact", "scale": 0.1},
    {"num_samples": 300, "top_k": 1700, "top_k_method": "exact"},
    {"num_samples": 3, "top_k": 10**9},
]


def sized(options: dict, slots: int) -> dict:
    """Return options whose offset at the upper limit stays there for another number of slots."""
    if options.get("slot_offset", 0) > 2**33:
        return {**options, "slot_offset": 2**34 - slots}
    return options


# Philox and the noise ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the vectors published with Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    found = reference.philox4x32([torch.tensor(word) for word in counter], key)
    assert [int(word) for word in found] == words


def test_words_and_their_refinements_are_where_the_counter_says():
    """A noise value equals the one computed here from the words of its block."""
    seed, step, query, slot = -3, (5 << 40) + 17, 2**32 - 2, 2**34 - 7
    state = torch.tensor([seed, step])
    found = reference.gumbel_noise(state, 1, 1, query_offset=query, slot_offset=slot)
    key = [seed % 2**64 & 0xFFFFFFFF, seed % 2**64 >> 32]

    def word(domain: int) -> Tensor:
        counter = [slot >> 2, query, step & 0xFFFFFFFF, step >> 32 | domain << 30]
        return reference.philox4x32([torch.tensor(x) for x in counter], key)[slot & 3]

    assert found.item() == reference.noise_from_words(word(0), word(1)).item()


def exact_noise(words: Tensor, refinements: Tensor) -> Tensor:
    words, refinements = words.double(), refinements.double()
    refined = (words * 2.0**32 + refinements + 0.5) * 2.0**-64
    e = torch.where(words < 2**16, refined, (words + 0.5) * 2.0**-32)
    rest = (2.0**32 - words - 0.5) * 2.0**-32
    return -torch.log(torch.where(e < 0.5, -torch.log1p(-e), -torch.log(rest)))


def test_noise_is_accurate_over_all_its_range():
    edges = torch.tensor([0, 2**16, 2**30, 2**31, 2**32])
    near = (edges[:, None] + torch.arange(-3000, 3000)).clamp(0, 2**32 - 1).flatten()
    words = torch.cat([near, torch.randint(0, 2**32, (2**20,)), 2 ** torch.arange(32)])
    refinements = torch.randint(0, 2**32, words.shape)
    refinements[0] = 0
    found, truth = reference.noise_from_words(words, refinements), exact_noise(words, refinements)
    error = (found.double() - truth).abs()
    ulp = 2.0 ** (truth.abs().clamp(min=1).log2().floor() - 23)
    large = truth.abs() >= 1
    assert (error / ulp)[large].max() <= 2.3
    assert error[~large].max() <= 3.6 * 2.0**-24
    assert found.max() == found[words == 0].max() > 44
    assert -3.14 < found.min() < -3.1


def test_noise_has_the_moments_of_a_gumbel_variable():
    noise = reference.gumbel_noise(torch.tensor([1, 2]), 1000, 1000).double()
    # Standard errors: 1.28 / 1000 and 2.98 / 1000.
    assert abs(noise.mean().item() - 0.5772156649) < 4 * 1.28e-3
    assert abs(noise.var().item() - math.pi**2 / 6) < 4 * 2.98e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "slots"), [(3, 1003), (70, 64), (1, 1)])
def test_noise_of_the_kernels_has_the_bits_of_the_reference(device, batch, slots, dtype):
    """Read the noise from `perturbed`, with scores of 0 and as many draws as slots."""
    queries, cache = (torch.zeros(rows, 2, dtype=dtype, device=device) for rows in (batch, slots))
    found = sf.sample_negatives(
        queries, cache, num_samples=slots, rng=generator(device), slot_offset=6, query_offset=1
    )
    noise = torch.empty(batch, slots, dtype=dtype)
    noise.scatter_(1, found.indices.cpu(), found.perturbed.cpu())
    wanted = reference.gumbel_noise(generator().state, batch, slots, slot_offset=6, query_offset=1)
    assert torch.equal(noise, wanted.to(dtype))


# The ops against the formula ---------------------------------------------------------------------


@pairwise(dtype=DTYPES, is_masked=[False, True], options=OPTIONS)
def test_dense(device, options, is_masked, dtype):
    queries = lattice(70, 9, dtype=dtype, device=device)
    cache = lattice(5003, 9, dtype=dtype, device=device)
    options = dict(options, **(masks(70, 5003, device) if is_masked else {}))
    found = sf.sample_negatives(queries, cache, rng=generator(device), **options)
    assert_same(found, expected(queries, cache, **options))


@pytest.mark.parametrize(
    ("batch", "slots", "depth"),
    [(1, 1, 1), (5, 3001, 17), (300, 257, 33), (16, 100, 768), (17, 55, 5), (3, 8, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_sizes(kernels, device, batch, slots, depth, dtype):
    queries = lattice(batch, depth, dtype=dtype, device=device)
    cache = lattice(slots, depth, dtype=dtype, device=device)
    for options in ({}, {"num_samples": 9, "top_k": 6}, masks(batch, slots, device)):
        found = sf.sample_negatives(queries, cache, rng=generator(device), **options)
        assert_same(found, expected(queries, cache, **options))


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("query_dtype", DTYPES)
def test_every_pair_of_dtypes(device, query_dtype, cache_dtype):
    queries = lattice(5, 20, dtype=query_dtype, device=device)
    cache = lattice(300, 20, dtype=cache_dtype, device=device)
    found = sf.sample_negatives(queries, cache, num_samples=3, rng=generator(device))
    assert_same(found, expected(queries, cache, num_samples=3))
    sparse = SparseRows.from_dense(cache.abs())
    for rows in (queries, SparseRows.from_dense(queries.abs())):
        found = sf.sample_negatives(rows, sparse, num_samples=3, rng=generator(device))
        assert_same(found, expected(rows, sparse, num_samples=3))


@pairwise(dtype=DTYPES, is_masked=[False, True], has_sparse_queries=[False, True], options=OPTIONS)
def test_sparse(device, options, has_sparse_queries, is_masked, dtype):
    queries = lattice(70, 20, dtype=dtype, device=device).clamp(min=0)
    queries[3] = 0
    cache = SparseRows.from_dense(lattice(2003, 20, dtype=dtype, device=device))
    rows = SparseRows.from_dense(queries) if has_sparse_queries else queries
    options = sized(dict(options, **(masks(70, 2003, device) if is_masked else {})), 2003)
    found = sf.sample_negatives(rows, cache, rng=generator(device), **options)
    assert_same(found, expected(rows, cache, **options))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_plain_way_takes_every_option(monkeypatch, sparse):
    monkeypatch.setattr(sample_module._library, "has_kernels", lambda device: False)
    queries = lattice(9, 20, dtype=torch.float32, device="cpu").clamp(min=0)
    cache = lattice(203, 20, dtype=torch.float32, device="cpu").clamp(min=0)
    for options in OPTIONS:
        options = sized(dict(options, **masks(9, 203, torch.device("cpu"))), 203)
        found = sf.sample_negatives(
            queries, SparseRows.from_dense(cache) if sparse else cache, rng=generator(), **options
        )
        assert_same(found, expected(queries, cache, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (5, 3001), (70, 64), (130, 1100)])
def test_gumbel_max(kernels, device, batch, slots, dtype):
    scores = lattice(batch, slots, dtype=dtype, device=device)
    per_query = torch.rand(batch, slots, device=device) < 0.3
    for num_samples, inv_temp, valid in (
        (1, 1.0, None),
        (7, 0.5, per_query),
        (slots + 2, 0.0, per_query[0]),
    ):
        options = {"num_samples": num_samples, "inv_temp": inv_temp, "valid": valid}
        found = sf.gumbel_max(scores, rng=generator(device), **options)
        if valid is not None:
            options["valid"] = valid.cpu()
        wanted = reference.gumbel_max(scores.cpu(), generator().state, **options)
        assert found.dtype == torch.int64
        assert torch.equal(found.cpu(), wanted)


def test_bool_exclude_is_the_listed_one(device):
    queries = lattice(9, 6, dtype=torch.float32, device=device)
    cache = lattice(203, 6, dtype=torch.float32, device=device)
    listed = torch.randint(0, 203, (9, 30), device=device)
    as_mask = torch.zeros(9, 203, dtype=torch.bool, device=device).scatter(1, listed, True)
    for options in ({}, {"top_k": 20}, {"top_k": 20, "top_k_method": "exact"}):
        options["num_samples"] = 15
        found = [
            sf.sample_negatives(queries, cache, exclude=exclude, rng=generator(device), **options)
            for exclude in (listed, as_mask)
        ]
        assert all(map(torch.equal, *found))
        assert not (found[0].indices[:, :, None] == listed[:, None]).any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_logsumexp_are_accurate(device, dtype, sparse):
    queries = torch.randn(20, 300, device=device).to(dtype)
    cache = (torch.randn(5000, 300, device=device) / 6).to(dtype)
    if sparse:
        queries, cache = queries.clamp(min=0), cache.clamp(min=0)
    rows = SparseRows.from_dense(cache) if sparse else cache
    found = sf.sample_negatives(queries, rows, num_samples=4, rng=generator(device))
    queries, cache, indices = queries.cpu(), cache.cpu(), found.indices.cpu()
    wide = queries.double().numpy().astype(np.longdouble) @ cache.t().double().numpy()
    largest = wide.max(1, keepdims=True)
    logsumexp = largest[:, 0] + np.log(np.exp(wide - largest).sum(1))
    truth = torch.from_numpy(wide.astype(np.float64)).gather(1, indices)
    baseline = queries.to(acc_dtype(dtype)) @ cache.to(acc_dtype(dtype)).t()
    assert_accurate(found.scores.cpu(), truth, baseline.gather(1, indices))
    truth = torch.from_numpy(logsumexp.astype(np.float64))
    assert_accurate(found.logsumexp.cpu(), truth, baseline.logsumexp(1))


def test_rows_far_apart_in_their_logsumexp(device):
    """The maxima of parts differ beyond the range of exp, with the largest first or last."""
    levels = torch.tensor([-1000.0, 0.0, 1000.0, -3000.0]).repeat_interleave(3000)
    cache = torch.stack([levels, levels.flip(0), levels - 5000], dim=1).to(device)
    queries = torch.eye(3, device=device)
    found = sf.sample_negatives(queries, cache, rng=generator(device))
    wanted = cache.t().cpu().double().logsumexp(1)
    torch.testing.assert_close(found.logsumexp.cpu().double(), wanted, rtol=1e-6, atol=0)


# Invariances -------------------------------------------------------------------------------------


def arguments_of_size(batch: int, slots: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 40), torch.randn(slots, 40) / 3


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
def test_threads_do_not_matter(options):
    queries, cache = arguments_of_size(20, 20_011)
    rows = SparseRows.from_dense(cache, k=5)
    options = sized(options, 20_011)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                [
                    *sf.sample_negatives(queries, cache, rng=generator(), **options),
                    *sf.sample_negatives(queries, rows, rng=generator(), **options),
                    sf.gumbel_max(queries @ cache.t(), 3, rng=generator()),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("cuts", [[0, 20_011], [0, 1, 7003, 7004, 20_011], [0, 9999, 20_011]])
@pytest.mark.parametrize("sparse", [False, True])
def test_shards_draw_what_the_whole_cache_does(kernels, device, cuts, sparse):
    queries, cache = (rows.to(device) for rows in arguments_of_size(6, 20_011))
    if sparse:
        cache = SparseRows.from_dense(cache, k=5)
    whole = sf.sample_negatives(queries, cache, num_samples=5, rng=generator(device))
    shards = [
        sf.sample_negatives(
            queries, cache[start:stop], num_samples=5, rng=generator(device), slot_offset=start
        )
        for start, stop in itertools.pairwise(cuts)
    ]
    perturbed = torch.cat([shard.perturbed for shard in shards], dim=1)
    indices = torch.cat(
        [
            torch.where(shard.indices >= 0, shard.indices + start, -1)
            for shard, start in zip(shards, cuts, strict=False)
        ],
        dim=1,
    )
    ranked, order = perturbed.sort(dim=1, descending=True, stable=True)
    if kernels and device.type == "cpu":
        assert torch.equal(ranked[:, :5], whole.perturbed)
    else:  # a GEMM of another size may sum in another order
        torch.testing.assert_close(ranked[:, :5], whole.perturbed)
    assert torch.equal(indices.gather(1, order)[:, :5], whole.indices)
    merged = torch.stack([shard.logsumexp for shard in shards]).logsumexp(0)
    torch.testing.assert_close(merged, whole.logsumexp)


def test_blocks_of_queries_draw_what_all_do(device):
    queries, cache = (rows.to(device) for rows in arguments_of_size(300, 500))
    whole = sf.sample_negatives(queries, cache, num_samples=3, rng=generator(device))
    parts = [
        sf.sample_negatives(
            queries[start : start + 90],
            cache,
            num_samples=3,
            rng=generator(device),
            query_offset=start,
        )
        for start in range(0, 300, 90)
    ]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)


def draws_digest() -> str:
    """Return a checksum of draws in all dtypes, from dense and sparse rows."""
    torch.manual_seed(0)
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        queries = (torch.randint(-3, 4, (37, 50)) / 2).to(dtype)
        cache = (torch.randint(-3, 4, (3011, 50)) / 2).to(dtype)
        for rows in (cache, sf.SparseRows.from_dense(cache)):
            for options in ({}, {"top_k": 11}, {"top_k": 11, "top_k_method": "exact"}):
                rng = sf.Philox(5)
                found = sf.sample_negatives(queries, rows, num_samples=9, rng=rng, **options)
                for tensor in (found.indices, found.scores, found.perturbed):
                    digest.update(tensor.numpy().tobytes())
        digest.update(sf.gumbel_max(queries, 4, rng=rng).numpy().tobytes())
    return digest.hexdigest()


def test_the_instruction_set_does_not_matter():
    digests = {isa: call_with(isa, draws_digest) for isa in instruction_sets_here()}
    assert set(digests.values()) == {draws_digest()}, digests


def test_strides_do_not_matter(device):
    queries = lattice(6, 8, dtype=torch.float32, device=device)
    cache = lattice(50, 8, dtype=torch.float32, device=device)
    wide = torch.zeros(50, 20, device=device)
    wide[:, 3:11] = cache
    wanted = sf.sample_negatives(queries, cache, num_samples=4, rng=generator(device))
    columns = queries.t().contiguous().t()
    expanded = torch.ones(50, 2, dtype=torch.bool, device=device)[:, 0]
    for given in (wide[:, 3:11], cache.t().contiguous().t(), cache.flip(0).flip(0)):
        found = sf.sample_negatives(
            columns, given, num_samples=4, valid=expanded, rng=generator(device)
        )
        assert_same(found, sf.NegativeSamples(*(tensor.cpu() for tensor in wanted)))
    scores = queries @ cache.t()
    drawn = sf.gumbel_max(scores, 4, rng=generator(device))
    assert torch.equal(sf.gumbel_max(scores.t().contiguous().t(), 4, rng=generator(device)), drawn)
    assert torch.equal(drawn, wanted.indices)


# Special values ----------------------------------------------------------------------------------


def test_nan_first_then_inf_then_the_rest_and_never_minus_inf(kernels, device):
    scores = torch.tensor([[1.0, INF, -INF, NAN, 2.0, INF, NAN, -INF]], device=device)
    assert sf.gumbel_max(scores, 4, rng=generator(device)).tolist() == [[3, 6, 1, 5]]
    found = sf.gumbel_max(scores, 8, rng=generator(device))[0].tolist()
    assert found[:4] == [3, 6, 1, 5]
    assert sorted(found[4:6]) == [0, 4]
    assert found[6:] == [-1, -1]
    # Uniform draws: NaN comes first, and all others except -inf are equally likely.
    uniform = sf.gumbel_max(scores, 8, inv_temp=0.0, rng=generator(device))[0].tolist()
    assert uniform[:2] == [3, 6]
    assert sorted(uniform[2:6]) == [0, 1, 4, 5]
    assert uniform[6:] == [-1, -1]


@pytest.mark.parametrize("sparse", [False, True])
def test_special_scores(kernels, device, sparse):
    """Special values occur as products with the cache, with every way to keep slots."""
    column = torch.tensor([1.0, INF, -INF, NAN, 2.0, 0.5, -3.0, 4.0], device=device)
    queries = torch.tensor([[1.0]], device=device)
    cache = column.unsqueeze(1)
    if sparse:
        indices = torch.zeros(8, 1, dtype=torch.int32, device=device)
        lengths = torch.ones(8, dtype=torch.int32, device=device)
        cache = SparseRows(indices, cache, lengths, 1)
    for dropped in (set(), {3}, {3, 1}, {0, 1, 3, 4, 5, 6, 7}, set(range(8))):
        valid = torch.tensor([slot not in dropped for slot in range(8)], device=device)
        for options in ({}, {"top_k": 3}, {"top_k": 3, "top_k_method": "exact"}):
            options.update(num_samples=4, valid=valid)
            found = sf.sample_negatives(queries, cache, rng=generator(device), **options)
            options["valid"] = valid.cpu()
            wanted = reference.sample_negatives(column.cpu()[None], generator().state, **options)
            assert_same(found, sf.NegativeSamples(*wanted))
            assert found.logsumexp.isnan().item() == (3 not in dropped)


def test_an_infinite_score_far_below_finite_ones(kernels, device):
    """One part has an infinite maximum, and the differences of others overflow exp."""
    column = torch.zeros(12000, device=device)
    column[3], column[9000] = INF, 2000.0
    for scores in (column, column.flip(0)):
        found = sf.sample_negatives(
            torch.ones(1, 1, device=device), scores.unsqueeze(1), rng=generator(device)
        )
        assert found.logsumexp.tolist() == found.perturbed.flatten().tolist() == [INF]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "top_k_method": "exact"}])
def test_what_leaves_the_range_of_the_type_is_not_drawn(kernels, device, options):
    """inv_temp * score = -inf."""
    cache = torch.tensor([[-3e38], [-1.0], [-3e38], [-2.0]], device=device)
    queries = torch.ones(1, 1, device=device)
    options = {**options, "num_samples": 4, "inv_temp": 10.0}
    found = sf.sample_negatives(queries, cache, rng=generator(device), **options)
    assert_same(found, expected(queries, cache, **options))
    assert sorted(found.indices[0].tolist())[:2] == [-1, -1]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "top_k_method": "exact"}])
def test_what_is_not_drawable_is_not_counted(kernels, device, options):
    """Values of invalid rows have no effect, and missing draws are -1."""
    cache = torch.randn(40, 4, device=device)
    cache[5:] = NAN
    valid = torch.arange(40, device=device) < 5
    queries = torch.randn(3, 4, device=device)
    found = sf.sample_negatives(
        queries,
        cache,
        num_samples=7,
        valid=valid,
        exclude=torch.tensor([[0, -1], [-1, 50], [3, 3]], device=device),
        rng=generator(device),
        **options,
    )
    drawn = found.indices >= 0
    assert found.logsumexp.isfinite().all()
    assert (found.indices < 5).all()
    assert (drawn.sum(1) <= 5).all()
    assert (found.scores.isfinite() == drawn).all()
    assert (found.perturbed.isfinite() == drawn).all()
    assert (found.scores[~drawn] == -INF).all()
    if not options:
        assert drawn.sum(1).tolist() == [4, 5, 4]
    none = sf.sample_negatives(
        queries, cache, num_samples=2, valid=torch.zeros_like(valid), rng=generator(device)
    )
    assert none.indices.tolist() == [[-1, -1]] * 3
    assert none.logsumexp.tolist() == [-INF] * 3
    assert none.scores.tolist() == none.perturbed.tolist() == [[-INF, -INF]] * 3


@pytest.mark.parametrize(("batch", "slots"), [(0, 3), (3, 0), (0, 0)])
def test_nothing(kernels, device, batch, slots):
    queries, cache = torch.randn(batch, 4, device=device), torch.randn(slots, 4, device=device)
    for rows in (cache, SparseRows.from_dense(cache)):
        for options in ({}, {"top_k": 2}, {"top_k": 2, "top_k_method": "exact"}):
            found = sf.sample_negatives(queries, rows, num_samples=2, **options)
            assert found.indices.tolist() == [[-1, -1]] * batch
            assert found.logsumexp.tolist() == [-INF] * batch
            assert found.scores.shape == found.perturbed.shape == (batch, 2)
    assert sf.gumbel_max(queries @ cache.t(), 2).tolist() == [[-1, -1]] * batch


def test_grouped_top_k_is_the_papers_where_it_divides(device):
    queries, cache = torch.randn(5, 8, device=device), torch.randn(60, 8, device=device)
    for top_k in (1, 4, 60):
        grouped, kept = (queries @ cache.t()).view(5, top_k, -1).max(-1)
        kept += torch.arange(top_k, device=device) * (60 // top_k)
        found = sf.sample_negatives(
            queries, cache, num_samples=top_k, top_k=top_k, rng=generator(device)
        )
        assert torch.equal(found.indices.sort(1)[0], kept)
        torch.testing.assert_close(found.logsumexp, grouped.logsumexp(1))


def test_exact_top_k_keeps_the_highest(device):
    queries, cache = torch.randn(5, 8, device=device), torch.randn(60, 8, device=device)
    highest, kept = (queries @ cache.t()).topk(7, dim=1)
    found = sf.sample_negatives(
        queries, cache, num_samples=7, top_k=7, top_k_method="exact", rng=generator(device)
    )
    assert torch.equal(found.indices.sort(1)[0], kept.sort(1)[0])
    torch.testing.assert_close(found.logsumexp, highest.logsumexp(1))


def test_of_equal_scores_the_lowest_slots_are_kept(device):
    cache = torch.tensor([1.0, 2, 2, 2, 2, 1, 1, 2, 2], device=device).unsqueeze(1)
    queries = torch.ones(1, 1, device=device)
    for method, kept in (("grouped", [1, 3, 7]), ("exact", [1, 2, 3])):
        found = sf.sample_negatives(
            queries, cache, num_samples=3, top_k=3, top_k_method=method, rng=generator(device)
        )
        assert found.indices.sort(1)[0].tolist() == [kept]


# Distributions -----------------------------------------------------------------------------------


def p_value(counts: Tensor, expectations: Tensor) -> float:
    """Return the p-value of Pearson's chi-squared test, whose freedom is the number of bins - 1."""
    assert expectations.min() >= 5
    statistic = ((counts - expectations) ** 2 / expectations).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def test_draws_are_from_the_softmax(device):
    """2^20 draws, one a row, over slots whose probabilities span four orders of magnitude."""
    scores = torch.linspace(0, 9, 50).to(device)
    rng = generator(device)
    counts = torch.zeros(50, dtype=torch.float64)
    for _ in range(16):
        drawn = sf.gumbel_max(scores.expand(2**16, 50), rng=rng, inv_temp=0.9)
        counts += torch.bincount(drawn[:, 0].cpu(), minlength=50)
    assert counts.sum() == 2**20
    probabilities = (0.9 * scores.cpu().double()).softmax(0)
    assert p_value(counts, 2**20 * probabilities) > SIGNIFICANCE
    # The test has power: it rejects a temperature that is off by a hundredth.
    wrong = (0.909 * scores.cpu().double()).softmax(0)
    assert p_value(2**20 * wrong, 2**20 * probabilities) < SIGNIFICANCE


@pytest.mark.parametrize("sparse", [False, True])
def test_draws_from_a_cache_are_from_the_softmax(device, sparse):
    """2^20 draws from scores computed on the way, over the steps of one generator."""
    levels = torch.linspace(0.1, 4, 40)
    slots = torch.arange(200) % 40
    cache = levels[slots].unsqueeze(1).to(device)
    if sparse:
        cache = SparseRows.from_dense(cache)
    queries = torch.ones(4096, 1, device=device)
    rng = generator(device)
    counts = torch.zeros(40, dtype=torch.float64)
    for _ in range(256):
        found = sf.sample_negatives(queries, cache, scale=2.0, rng=rng)
        counts += torch.bincount(slots[found.indices[:, 0].cpu()], minlength=40)
    counts_wanted = 2**20 * (2 * levels.double()).softmax(0)
    assert p_value(counts, counts_wanted) > SIGNIFICANCE


def test_draws_without_replacement_have_the_probabilities_of_ordered_pairs(device):
    """P(i, j) = p_i p_j / (1 - p_i), over 2^20 draws of two of five slots."""
    scores = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])
    rng = generator(device)
    counts = torch.zeros(25, dtype=torch.float64)
    for _ in range(16):
        drawn = sf.gumbel_max(scores.to(device).expand(2**16, 5), 2, rng=rng).cpu()
        counts += torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    p = scores.double().softmax(0)
    pairs = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0).flatten()
    torch.testing.assert_close(pairs.sum().item(), 1.0)
    possible = pairs > 0
    assert counts[~possible].sum() == 0
    assert p_value(counts[possible], 2**20 * pairs[possible]) > SIGNIFICANCE
    # With replacement the second draw would have the probabilities p again.
    wrong = (p[:, None] * p).flatten()[possible]
    assert p_value(2**20 * wrong / wrong.sum(), 2**20 * pairs[possible]) < SIGNIFICANCE


def test_the_tail_is_there():
    """Slots 10 to 18 below the best one are drawn as often as the softmax says.

    Draws from 4 · 10^9 noise values; the numbers of slots make all gaps about equally likely.
    Noise from a uniform of 24 bits is at most 16.6. The test computes the probabilities of such
    draws exactly, and rejects them.
    """
    gaps = {10: 16, 12: 128, 14: 1000, 16: 8000, 18: 56_000}
    levels = torch.cat([torch.zeros(1), *(torch.full((n,), -float(g)) for g, n in gaps.items())])
    bins = torch.cat([torch.full((n,), i) for i, n in enumerate((1, *gaps.values()))])
    queries, cache = torch.ones(1024, 1), levels.unsqueeze(1)
    rng = generator()
    steps = 60
    counts = torch.zeros(len(gaps) + 1, dtype=torch.float64)
    for _ in range(steps):
        drawn = sf.sample_negatives(queries, cache, rng=rng).indices[:, 0]
        counts += torch.bincount(bins[drawn], minlength=len(counts))
    draws = steps * len(queries)
    weights = torch.zeros(len(counts), dtype=torch.float64)
    weights.index_add_(0, bins, levels.double().exp())
    exact = draws * weights / weights.sum()
    assert p_value(counts, exact) > SIGNIFICANCE

    # u_0 of the best slot; another beats it where its u exceeds u_0^(exp(-gap)).
    u = torch.arange(1, 2**24, dtype=torch.float64) / 2**24
    coarse = torch.zeros_like(exact)
    for i, (gap, slots) in enumerate(gaps.items(), start=1):
        exponent = u.log() * math.exp(-gap)  # log of the bound, which is close to 1
        beyond = (-torch.expm1(exponent) * 2**24).ceil() - 1  # multiples of 2^-24 above it
        coarse[i] = draws * (-torch.expm1(slots * torch.log1p(-beyond / 2**24))).mean()
    coarse[0] = draws - coarse.sum()
    assert p_value(coarse, exact) < SIGNIFICANCE


def test_queries_slots_and_steps_are_independent():
    """Noise shifted by one query, slot, step or seed is uncorrelated: |r| of 10^6 pairs."""
    base = reference.gumbel_noise(torch.tensor([9, 0]), 1000, 1000).double()
    base = (base - base.mean()) / base.std()
    others = [
        reference.gumbel_noise(torch.tensor([9, 0]), 1000, 1000, query_offset=1),
        reference.gumbel_noise(torch.tensor([9, 0]), 1000, 1000, slot_offset=1),
        reference.gumbel_noise(torch.tensor([9, 1]), 1000, 1000),
        reference.gumbel_noise(torch.tensor([10, 0]), 1000, 1000),
    ]
    for other in others:
        other = (other.double() - other.double().mean()) / other.double().std()
        assert abs((base * other).mean().item()) < 4e-3


# The generator -----------------------------------------------------------------------------------


def test_each_call_goes_one_step_on(kernels, device):
    scores = torch.zeros(4, 1000, device=device)
    rng = Philox(3, device)
    assert rng.state.device.type == device.type
    first, second = sf.gumbel_max(scores, rng=rng), sf.gumbel_max(scores, rng=rng)
    assert not torch.equal(first, second)
    sf.sample_negatives(scores[:, :2], torch.randn(5, 2, device=device), rng=rng)
    assert rng.state.tolist() == [3, 3]
    assert torch.equal(sf.gumbel_max(scores, rng=Philox(3, device)), first)
    assert not torch.equal(sf.gumbel_max(scores, rng=Philox(4, device)), first)


def test_the_state_resumes_in_a_module():
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rng = Philox(2**63 + 7)

    scores = torch.zeros(3, 500)
    cache, other = Cache(), Cache()
    sf.gumbel_max(scores, rng=cache.rng)
    saved = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
    assert list(saved) == ["rng.state"]
    following = sf.gumbel_max(scores, rng=cache.rng)
    other.load_state_dict(saved)
    assert torch.equal(sf.gumbel_max(scores, rng=other.rng), following)
    assert cache.to("meta").rng.device.type == "meta"
    assert Cache().half().rng.state.dtype == torch.int64


def test_clones_go_on_alike_and_forks_differ(device):
    scores = torch.zeros(3, 500, device=device)
    rng = generator(device)
    clone = rng.clone()
    assert torch.equal(sf.gumbel_max(scores, rng=rng), sf.gumbel_max(scores, rng=clone))
    sf.gumbel_max(scores, rng=rng)
    assert clone.state.tolist() == [11, 6]
    forks = [rng.fork(stream) for stream in (0, 1, 2**40)]
    assert len({fork.state[0].item() for fork in (*forks, rng)}) == 4
    assert [fork.state[1].item() for fork in forks] == [0, 0, 0]
    assert torch.equal(rng.fork(1).state, generator(device).fork(1).state)
    for stream in (-1, 2**64):
        with pytest.raises(ValueError, match=f"below 2\\^64, got {stream}"):
            rng.fork(stream)


def test_without_a_generator_torchs_seed_decides(kernels, device):
    scores = torch.zeros(3, 5000, device=device)
    torch.manual_seed(1)
    first, second = sf.gumbel_max(scores), sf.gumbel_max(scores)
    torch.manual_seed(1)
    assert torch.equal(sf.gumbel_max(scores), first)
    assert torch.equal(sf.gumbel_max(scores), second)
    assert not torch.equal(first, second)


def test_seeds_are_64_bits():
    assert Philox(2**64 - 1).state.tolist() == Philox(-1).state.tolist() == [-1, 0]
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            Philox(seed)
    for seed in (1.0, True):
        with pytest.raises(TypeError, match=f"seed must be an integer, got {type(seed).__name__}"):
            Philox(seed)


def test_numbers_of_numpy_are_taken():
    queries, cache = torch.rand(3, 2), torch.rand(7, 2)
    plain = {"num_samples": 2, "scale": 0.5, "inv_temp": 2, "slot_offset": 3, "query_offset": 1}
    types = [np.int64, np.float32, np.int32, np.uint8, torch.tensor]
    given = {name: make(plain[name]) for name, make in zip(plain, types, strict=True)}
    expected = sf.sample_negatives(queries, cache, **plain, rng=Philox(7).fork(2))
    found = sf.sample_negatives(queries, cache, **given, rng=Philox(np.int64(7)).fork(np.int8(2)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(TypeError, match="stream must be an integer, got float"):
        Philox(7).fork(2.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph_draws_anew_each_time():
    queries, cache = torch.randn(4, 8, device="cuda"), torch.randn(900, 8, device="cuda")
    rng, eager = Philox(1, "cuda"), Philox(1, "cuda")
    sf.sample_negatives(queries, cache, rng=rng.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sf.sample_negatives(queries, cache, rng=rng)
    for _ in range(3):
        graph.replay()
        wanted = sf.sample_negatives(queries, cache, rng=eager)
        assert torch.equal(captured.indices, wanted.indices)
    assert rng.state.tolist() == [1, 3]


# In torch ----------------------------------------------------------------------------------------


def op_options(valid: Tensor | None, exclude: Tensor | None, top_k: int | None) -> tuple:
    return 2, 0.5, 1.0, top_k, False, valid, exclude, 1, 2


def test_opcheck(device):
    queries, cache = torch.randn(3, 8, device=device), torch.randn(20, 8, device=device)
    state = generator(device).state
    scores = queries @ cache.t()
    rows = SparseRows.from_dense(cache.clamp(min=0))
    parts = (rows.indices, rows.values, rows.lengths, 8)
    of_queries = SparseRows.from_dense(queries.clamp(min=0))
    ops = torch.ops.splade_fast
    for draw in (op_options(None, None, None), op_options(*masks(3, 20, device).values(), 4)):
        torch.library.opcheck(ops.sample_dense.default, (queries, cache, state, *draw))
        for mine in (
            (None, queries, None),
            (of_queries.indices, of_queries.values, of_queries.lengths),
        ):
            torch.library.opcheck(ops.sample_sparse.default, (*mine, *parts, state, *draw))
    for valid in (None, scores > 0, scores[0] > 0):
        torch.library.opcheck(ops.sample_scores.default, (scores, state, 2, 1.0, valid, 0, 0))


def test_compiles_in_one_graph(device):
    """The first batch is compiled with static shapes, the second with dynamic sizes."""
    rng = Philox(1, device)

    def step(queries, cache, indices, values, lengths, valid, exclude):
        dense = sf.sample_negatives(
            queries * 2, cache, num_samples=2, top_k=4, valid=valid, exclude=exclude, rng=rng
        )
        rows = SparseRows(indices, values, lengths, 8)
        sparse = sf.sample_negatives(queries, rows, top_k=4, top_k_method="exact", rng=rng)
        drawn = sf.gumbel_max(queries @ cache.t(), 2, valid=valid, rng=rng)
        return *dense, *sparse, drawn + 1

    compiled = torch.compile(step, fullgraph=True)
    for batch, slots in ((3, 20), (4, 31)):
        queries = lattice(batch, 8, dtype=torch.float32, device=device)
        cache = lattice(slots, 8, dtype=torch.float32, device=device)
        rows = SparseRows.from_dense(cache)
        given = (queries, cache, rows.indices, rows.values, rows.lengths)
        given = (*given, *masks(batch, slots, device).values())
        rng.load_state_dict({"state": torch.tensor([1, 8])})
        wanted = step(*given)
        rng.load_state_dict({"state": torch.tensor([1, 8])})
        found = compiled(*given)
        assert rng.state.tolist() == [1, 11]
        for actual, truth in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, truth)


def test_compiles_without_a_generator(device):
    compiled = torch.compile(lambda scores: sf.gumbel_max(scores, 3), fullgraph=True)
    scores = torch.zeros(2, 5000, device=device)
    first, second = compiled(scores), compiled(scores)
    assert first.shape == (2, 3)
    assert not torch.equal(first, second)


def test_there_is_no_gradient(kernels, device):
    queries = torch.randn(3, 8, device=device, requires_grad=True)
    cache = torch.randn(20, 8, device=device, requires_grad=True)
    found = sf.sample_negatives(queries, cache, rng=generator(device))
    assert not any(tensor.requires_grad for tensor in found)
    assert not sf.gumbel_max(queries @ cache.t(), rng=generator(device)).requires_grad


def test_autocast_does_not_round_the_scores(kernels, device):
    queries, cache = torch.randn(3, 80, device=device), torch.randn(20, 80, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = sf.sample_negatives(queries, cache, rng=generator(device))
    wanted = sf.sample_negatives(queries, cache, rng=generator(device))
    assert torch.equal(found.scores, wanted.scores)


def test_meta():
    queries = torch.empty(2, 8, device="meta", dtype=torch.bfloat16)
    cache = torch.empty(5, 8, device="meta", dtype=torch.float16)
    found = sf.sample_negatives(queries, cache, num_samples=9, rng=Philox(0, "meta"))
    assert found.indices.shape == found.scores.shape == found.perturbed.shape == (2, 9)
    assert found.logsumexp.shape == (2,)
    assert found.scores.dtype == torch.float32
    assert sf.gumbel_max(queries, 3).shape == (2, 3)


# Errors ------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
    ({"num_samples": 1.0}, TypeError, "num_samples must be an integer, got float"),
    ({"inv_temp": -0.1}, ValueError, "inv_temp must be a finite number of at least 0, got -0.1"),
    ({"inv_temp": NAN}, ValueError, "inv_temp must be a finite number .* got nan"),
    ({"inv_temp": "1"}, ValueError, "inv_temp must be a finite number .* got '1'"),
    ({"scale": INF}, ValueError, "scale must be a finite number, got inf"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k_method": "sorted"}, ValueError, "top_k_method must be one of .* got 'sorted'"),
    ({"valid": torch.ones(7)}, TypeError, "valid must be bool, got torch.float32"),
    ({"valid": torch.ones(8, dtype=torch.bool)}, ValueError, r"valid .* \(7,\), got \(8,\)"),
    ({"valid": [True]}, TypeError, "valid must be a tensor, got list"),
    ({"exclude": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"\(3, any\), got \(2, 1\)"),
    ({"exclude": torch.zeros(3, 1)}, TypeError, "exclude must be int64 slots or bool"),
    ({"exclude": torch.zeros(3, 2, dtype=torch.bool)}, ValueError, r"\(3, 7\), got \(3, 2\)"),
    ({"rng": torch.Generator()}, TypeError, "rng must be a Philox or None, got Generator"),
    ({"rng": Philox(1, "meta")}, ValueError, "rng must be on the device of the scores"),
    ({"slot_offset": -1}, ValueError, "slot_offset must be at least 0"),
    ({"slot_offset": 2**34 - 6}, ValueError, "slot_offset must be .* at most 17179869177"),
    ({"query_offset": 2**32 - 2}, ValueError, "query_offset must be .* at most 4294967293"),
    ({"query_offset": 1.5}, TypeError, "query_offset must be an integer, got float"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_before_a_step(options, error, message):
    rng = Philox(1)
    with pytest.raises(error, match=message):
        sf.sample_negatives(torch.ones(3, 2), torch.ones(7, 2), **{"rng": rng, **options})
    assert rng.state.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("queries", "cache", "error", "message"),
    [
        (torch.ones(3, 2), torch.ones(7, 3), ValueError, r"queries must be \(queries, 3\)"),
        (torch.ones(3), torch.ones(7, 3), ValueError, r"queries must be \(queries, 3\)"),
        (torch.ones(3, 2), torch.ones(7), ValueError, r"cache must be \(slots, depth\)"),
        (torch.ones(3, 2).int(), torch.ones(7, 2), TypeError, "queries must be one of"),
        (torch.ones(3, 2), torch.ones(7, 2).int(), TypeError, "cache must be one of"),
        (torch.ones(3, 2), [[1.0]], TypeError, "cache must be a tensor or SparseRows, got list"),
        (torch.ones(3, 2, device="meta"), torch.ones(7, 2), ValueError, "queries must be on"),
        (
            SparseRows.from_dense(torch.ones(3, 2)),
            torch.ones(7, 2),
            TypeError,
            "queries must be a tensor with a dense cache, got SparseRows",
        ),
        (
            torch.ones(3, 2),
            SparseRows.from_dense(torch.ones(7, 3)),
            ValueError,
            r"cache\.num_cols = 3",
        ),
    ],
)
def test_bad_operands_are_refused(queries, cache, error, message):
    with pytest.raises(error, match=message):
        sf.sample_negatives(queries, cache)


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match=r"scores must be \(queries, slots\), got \(3,\)"):
        sf.gumbel_max(torch.ones(3))
    with pytest.raises(TypeError, match="scores must be one of"):
        sf.gumbel_max(torch.ones(3, 2).int())
    with pytest.raises(ValueError, match=r"valid must have the shape \(3, 2\), got \(2, 2\)"):
        sf.gumbel_max(torch.ones(3, 2), valid=torch.ones(2, 2, dtype=torch.bool))


def test_contents_of_sparse_rows_outside_are_refused():
    good = SparseRows.from_dense(torch.eye(8)[:5] + torch.eye(8)[1:6])
    indices, lengths = good.indices.clone(), good.lengths.clone()
    indices[3, 1], lengths[2] = 8, 3
    for bad, message in (
        (SparseRows(indices, good.values, good.lengths, 8), "indices must be between 0 and 7"),
        (SparseRows(good.indices, good.values, lengths, 8), "lengths must be between 0 and 2"),
    ):
        rng = Philox(1)
        for queries, cache in ((good, bad), (bad, good)):
            for options in ({}, {"top_k": 2}, {"top_k": 2, "top_k_method": "exact"}):
                with pytest.raises(RuntimeError, match=message):
                    sf.sample_negatives(queries, cache, rng=rng, **options)
        assert rng.state.tolist() == [1, 0]


def test_the_ops_check_for_callers_in_cpp():
    """The ops refuse arguments that C++ callers pass without the checks in Python."""
    queries, cache, state = torch.ones(3, 2), torch.ones(7, 2), generator().state
    dense = torch.ops.splade_fast.sample_dense
    good = [1, 1.0, 1.0, None, False, None, None, 0, 0]
    bad = [
        (0, 0, "num_samples must be at least 1"),
        (1, NAN, "scale must be finite"),
        (2, -1.0, "inv_temp must be finite and at least 0"),
        (3, 0, "top_k must be at least 1"),
        (5, torch.ones(6, dtype=torch.bool), "valid must be bool"),
        (6, torch.ones(2, 1, dtype=torch.int64), "exclude must be"),
        (7, 2**34, "slot_offset"),
        (8, -1, "query_offset"),
    ]
    for place, value, message in bad:
        draw = list(good)
        draw[place] = value
        with pytest.raises(RuntimeError, match=message):
            dense(queries, cache, state, *draw)
    with pytest.raises(RuntimeError, match="state must be int64"):
        dense(queries, cache, state[:1], *good)
    with pytest.raises(RuntimeError, match="valid must be bool"):
        torch.ops.splade_fast.sample_scores(queries, state, 1, 1.0, queries, 0, 0)
