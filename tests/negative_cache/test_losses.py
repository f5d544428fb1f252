"""Tests of the losses against published numbers, plain PyTorch and each other."""

import pickle

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import splade_fast as sf
from splade_fast.negative_cache import Scale, SparseFeature
from splade_fast.negative_cache.losses import CacheClassificationLoss
from splade_fast.negative_cache.negative_cache import CacheManager, NegativeCache
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from tests.negative_cache.models import column, full_cache, identity
from tests.selection import pairwise

QUERIES, POSITIVES = column(-1, 1, 3), column(2, 2, 1)
PROBABILITIES = torch.tensor([0.0420101, 0.705385, 0.499381])


def make_loss(*, retrieval=None, embedding_key="embeddings", data_keys=("data",), **options):
    loss = CacheClassificationLoss(embedding_key, data_keys, **{"reducer": None, **options})
    if retrieval is not None:
        loss._retrieval_fn = retrieval
    return loss


def always(*slots: int):
    return lambda scores: torch.tensor(slots).unsqueeze(1)


def random_problem(
    queries: int = 5, slots: int = 40, dim: int = 6, seed: int = 0, dtype=torch.float32
) -> tuple[Tensor, Tensor, NegativeCache]:
    generator = torch.Generator().manual_seed(seed)
    q, p, e = (
        torch.randn(n, dim, generator=generator, dtype=dtype) for n in (queries, queries, slots)
    )
    return q, p, full_cache(e)


def plain_cross_entropy(queries, positives, documents, transform=lambda s: s, counted_mask=None):
    """Return -log softmax([s_pos, S])[0], differentiable."""
    scores = transform(queries @ documents.t())
    if counted_mask is not None:
        scores = scores.masked_fill(~counted_mask, -torch.inf)
    own = transform((queries * positives).sum(1, keepdim=True))
    return -torch.cat([own, scores], 1).log_softmax(1)[:, 0]


# Published numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [None, torch.mean])
def test_interpretable_loss(reducer):
    result = make_loss(reducer=reducer)(
        identity, QUERIES, POSITIVES, {"cache": full_cache(column(1, -1))}
    )
    expected = torch.tensor([3.169846, 0.349012, 0.694385])
    expected = expected if reducer is None else reducer(expected)
    assert_close(result.interpretable_loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reducer", [None, torch.mean])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_training_loss(reducer, factor):
    """Check that scores of doubled vectors, quartered by the transform, are the same."""
    transforms = [None] if factor == 1 else [Scale(0.25), lambda scores: 0.25 * scores]
    for transform in transforms:
        result = make_loss(reducer=reducer, score_transform=transform, retrieval=always(0, 1, 0))(
            identity, factor * QUERIES, factor * POSITIVES,
            {"cache": full_cache(factor * column(1, -1))},
        )  # fmt: skip
        expected = (1 - PROBABILITIES) * torch.tensor([1.0, -3.0, 0.0])
        expected = expected if reducer is None else reducer(expected)
        assert_close(result.training_loss, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_training_loss():
    query_model = torch.tensor(1.0, requires_grad=True)
    doc_model = torch.tensor(1.0, requires_grad=True)
    loss = make_loss(reducer=torch.mean, retrieval=always(0, 1, 0))(
        lambda data: data["data"] * doc_model,
        query_model * QUERIES,
        doc_model * POSITIVES,
        {"cache": full_cache(column(1, -1))},
    ).training_loss
    loss.backward()
    # The loss is mean((1 - p) * differences of scores), each linear in either model.
    expected = ((1 - PROBABILITIES) * torch.tensor([1.0, -3.0, 0.0])).mean()
    assert_close(query_model.grad, expected, rtol=1e-5, atol=1e-6)
    assert_close(doc_model.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reducer", [None, torch.mean])
def test_staleness(reducer):
    result = make_loss(reducer=reducer, retrieval=always(0, 1, 0))(
        identity, column(0, 0, 0), column(0, 0, 0),
        {"cache": full_cache(column(1, -1), column(2, -3))},
    )  # fmt: skip
    expected = torch.tensor([0.25, 4 / 9, 0.25])
    assert_close(result.staleness, expected if reducer is None else reducer(expected))
    assert not result.staleness.requires_grad


@pytest.mark.parametrize("transform", [None, Scale(1.0), lambda scores: scores])
def test_interpretable_loss_with_top_k(transform):
    result = make_loss(top_k=2, score_transform=transform)(
        identity, column(-1, 1), column(2, 2), {"cache": full_cache(column(1, -1, 3, 2))}
    )
    expected = torch.tensor([3.0949229, 1.407605964])
    assert_close(result.interpretable_loss, expected, rtol=1e-6, atol=1e-6)


def test_training_loss_with_top_k():
    """Check the loss of kept slots: 1 and 3 of the first query, 0 and 2 of the second."""
    result = make_loss(top_k=2, retrieval=always(0, 0))(
        identity, column(-1, 1), column(2, 2), {"cache": full_cache(column(1, -1, 3, 2))}
    )
    p = torch.exp(-torch.tensor([3.0949229, 1.407605964]))
    assert_close(result.training_loss, (1 - p) * torch.tensor([3.0, -1.0]), rtol=1e-5, atol=1e-6)
    assert result.updated_item_indices["cache"].tolist() == [1, 0]


def test_several_caches_are_one_in_the_order_of_their_names():
    cache = {"cache2": full_cache(column(-1)), "cache1": full_cache(column(1))}
    result = make_loss(retrieval=always(0, 1, 0))(identity, QUERIES, POSITIVES, cache)
    expected = (1 - PROBABILITIES) * torch.tensor([1.0, -3.0, 0.0])
    assert_close(result.training_loss, expected, rtol=1e-6, atol=1e-6)


def test_refreshed_embeddings_of_several_caches():
    cache = {
        "cache1": full_cache(column(1, 2, 3), column(10, 20, 30)),
        "cache2": full_cache(column(-1, -2), column(-10, -20)),
    }
    result = make_loss(retrieval=always(0, 1, 3))(identity, column(0, 0, 0), column(2, 2, 1), cache)
    assert result.updated_item_mask["cache1"].tolist() == [True, True, False]
    assert result.updated_item_mask["cache2"].tolist() == [False, False, True]
    assert result.updated_item_data["cache1"]["embeddings"][:2].tolist() == [[10], [20]]
    assert result.updated_item_data["cache2"]["embeddings"][2].tolist() == [-10]
    assert result.updated_item_indices["cache1"][:2].tolist() == [0, 1]
    assert result.updated_item_indices["cache2"][2] == 0


# Fused, tiled and plain computation agree --------------------------------------------------------


@pairwise(
    top_k=[None, 1, 7, 40, 99],
    method=["grouped", "exact"],
    num_negatives=[1, 3],
    in_batch=[False, True],
    exclude=[None, "data"],
)
def test_any_callable_draws_what_the_fused_way_draws(
    monkeypatch, top_k, method, num_negatives, in_batch, exclude
):
    """Check that draws depend neither on tiles, nor on the number of caches or the transform."""
    monkeypatch.setattr("splade_fast.negative_cache.retrieval._TILE_SCORES", 30)
    queries, positives, whole = random_problem()
    whole.valid[3:9] = False
    embeddings = whole.data["embeddings"]
    positives[1] = embeddings[20]
    parts = {
        name: NegativeCache(
            {key: whole.data[key][rows] for key in whole.data}, whole.age[rows], whole.valid[rows]
        )
        for name, rows in {"b": slice(17, 40), "a": slice(0, 17)}.items()
    }
    results = []
    for cache, transform in (
        ({"cache": whole}, Scale(0.5)),
        ({"cache": whole}, lambda scores: scores * 0.5),
        (parts, Scale(0.5)),
        (parts, lambda scores: scores * 0.5),
    ):
        loss = make_loss(
            top_k=top_k, top_k_method=method, num_negatives=num_negatives, in_batch=in_batch,
            exclude=exclude, score_transform=transform, retrieval=GumbelMaxRetrievalFn(seed=3),
        )  # fmt: skip
        for _ in range(3):
            result = loss(identity, queries, positives, cache, pos_features={"data": positives})
            for name, mask in result.updated_item_mask.items():
                assert cache[name].valid[result.updated_item_indices[name][mask]].all()
        results.append(result)
    for result in results[1:]:
        for name in ("training_loss", "interpretable_loss", "staleness"):
            assert_close(getattr(result, name), getattr(results[0], name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("method", ["grouped", "exact"])
def test_the_loss_is_the_formula(top_k, method):
    queries, positives, cache = random_problem()
    documents = cache.data["embeddings"]
    scores = queries @ documents.t()
    counted_mask = torch.ones_like(scores, dtype=torch.bool)
    if top_k and method == "exact":
        counted_mask = scores >= scores.topk(top_k).values[:, -1:]
    elif top_k:
        groups = scores.tensor_split(top_k, 1)
        counted_mask = torch.cat([group == group.amax(1, keepdim=True) for group in groups], 1)
    result = make_loss(top_k=top_k, top_k_method=method)(
        identity, queries, positives, {"cache": cache}
    )
    exact = plain_cross_entropy(queries, positives, documents, counted_mask=counted_mask)
    assert_close(result.interpretable_loss, exact)


def test_the_same_seed_draws_the_same_and_steps_differ():
    queries, positives, cache = random_problem(queries=64)
    draws = []
    for seed in (1, 1, 2):
        loss = make_loss(retrieval=GumbelMaxRetrievalFn(seed=seed))
        for _ in range(2):
            result = loss(identity, queries, positives, {"cache": cache})
            draws.append(result.updated_item_indices["cache"])
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])


def test_manual_seed_decides():
    seeds = []
    for _ in range(2):
        torch.manual_seed(5)
        seeds.append(make_loss().retrieval_fn.rng.state.tolist())
    assert seeds[0] == seeds[1]


# The gradient is that of the cross entropy, in expectation ---------------------------------------


@pairwise(num_negatives=[1, 2, 4, 50], in_batch=[False, True], inv_temp=[1.0, 0.5])
def test_expected_gradient_is_that_of_the_cross_entropy(num_negatives, in_batch, inv_temp):
    """Estimate the expected gradient by the mean over many copies of one query.

    The mean weight of each document must be (1 - p) softmax(S), within 5 standard errors. inv_temp
    changes the expectation for one negative, and not for several.
    """
    copies, slots = 4000, 9
    generator = torch.Generator().manual_seed(1)
    documents = torch.randn(slots, 3, generator=generator, dtype=torch.float64)
    query, positive = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    others = torch.randn(copies, 3, generator=generator, dtype=torch.float64)
    positives = positive.repeat(copies, 1)
    if in_batch:
        # With few other positives, the exact gradient is cheap to compute.
        copies_of_one = 40
        runs = copies // copies_of_one
    else:
        copies_of_one, runs = copies, 1
    weights = []
    loss = make_loss(
        num_negatives=num_negatives, in_batch=in_batch,
        retrieval=GumbelMaxRetrievalFn(inv_temp, seed=7),
    )  # fmt: skip
    for _ in range(runs):
        table = documents.clone().requires_grad_()
        mine = positives[:copies_of_one].clone()
        if in_batch:
            mine[1:] = others[: copies_of_one - 1]
        mine.requires_grad_()
        data = torch.arange(slots)
        cache = NegativeCache({"embeddings": documents, "data": data}, torch.zeros(slots))
        queries = query.repeat(copies_of_one, 1)
        result = loss(lambda f, table=table: table[f["data"]], queries, mine, {"cache": cache})
        gradient = torch.autograd.grad(result.training_loss.sum(), table, retain_graph=True)[0]
        weights.append(gradient / copies_of_one)
    exact_table = documents.clone().requires_grad_()
    pool = exact_table
    exact, tempered = 0, 0
    rows = copies_of_one if in_batch else 1
    for row in range(rows):
        if in_batch:
            rest = torch.cat([mine[:row], mine[row + 1 :]]).detach()
            pool = torch.cat([exact_table, rest])
        cross_entropy = plain_cross_entropy(query[None], mine[row : row + 1].detach(), pool).sum()
        exact = exact + cross_entropy
        drawn = (inv_temp * (pool @ query)).softmax(0)[:slots]
        tempered = tempered + (1 - torch.exp(-cross_entropy)) * drawn[:, None] * query
    expected = torch.autograd.grad(exact / rows, exact_table)[0]
    if num_negatives == 1 and inv_temp != 1:
        expected = tempered.detach() / rows
    # The gradient of one query is the query times a weight of at most about 1.
    error = 5 * query.abs().max() / (copies**0.5)
    assert_close(torch.stack(weights).mean(0), expected, rtol=0, atol=error.item())
    if num_negatives >= slots and not in_batch:
        assert_close(weights[0], expected)


def test_gradient_of_queries_and_positives():
    """Check that the loss is the full cross entropy if all documents are drawn."""
    queries, positives, cache = random_problem(dtype=torch.float64)
    documents = cache.data["embeddings"]
    leaves = [t.clone().requires_grad_() for t in (queries, positives)]
    result = make_loss(num_negatives=40)(identity, *leaves, {"cache": cache})
    ours = torch.autograd.grad(result.training_loss.sum(), leaves)
    expected = torch.autograd.grad(plain_cross_entropy(*leaves, documents).sum(), leaves)
    assert_close(ours, expected)


# Features beyond the published packages ----------------------------------------------------------


def test_empty_slots_do_not_count():
    queries, positives, cache = random_problem(queries=300)
    cache.valid[5:] = False
    documents = cache.data["embeddings"]
    result = make_loss()(identity, queries, positives, {"cache": cache})
    exact = plain_cross_entropy(queries, positives, documents[:5])
    assert_close(result.interpretable_loss, exact)
    assert (result.updated_item_indices["cache"] < 5).all()
    counting = make_loss(count_empty_slots=True)(identity, queries, positives, {"cache": cache})
    assert_close(counting.interpretable_loss, plain_cross_entropy(queries, positives, documents))
    assert (counting.updated_item_indices["cache"] >= 5).any()


@pytest.mark.parametrize("options", [
    {}, {"top_k": 3}, {"score_transform": torch.tanh}, {"num_negatives": 3},
    {"retrieval": MaxScoreRetrievalFn()}, {"top_k": 2, "retrieval": MaxScoreRetrievalFn()},
])  # fmt: skip
def test_an_empty_cache_gives_loss_0(options):
    queries, positives, cache = random_problem()
    cache.valid[:] = False
    queries.requires_grad_()
    network = torch.nn.Linear(6, 6)

    def network_of_positives(features):
        """Encode features of the positives alone; real networks may divide by 0 on others."""
        data = features["data"]
        assert torch.equal(data, positives.repeat_interleave(options.get("num_negatives", 1), 0))
        return network(data)

    result = make_loss(**options)(
        network_of_positives, queries, positives, {"cache": cache}, pos_features={"data": positives}
    )
    assert result.training_loss.tolist() == [0] * 5
    assert result.interpretable_loss.tolist() == [0] * 5
    assert result.staleness.tolist() == [0] * 5
    assert not result.updated_item_mask["cache"].any()
    result.training_loss.sum().backward()
    assert not queries.grad.any()
    assert not network.weight.grad.any()


def test_own_positive_is_excluded_by_id_or_by_features():
    ids = torch.tensor([1, 2, 3, 2])
    embeddings = torch.eye(4)
    cache = NegativeCache({"embeddings": embeddings, "data": embeddings.clone(), "id": ids},
                          torch.zeros(4))  # fmt: skip
    queries = torch.full((200, 4), 0.5)
    positives = embeddings[1].repeat(200, 1)
    features = {"id": torch.full((200,), 2), "data": positives}
    for exclude, left in ((None, {0, 1, 2, 3}), ("id", {0, 2}), (["data"], {0, 2, 3}),
                          (("id", "data"), {0, 2, 3})):  # fmt: skip
        for transform in (None, lambda scores: scores):
            result = make_loss(exclude=exclude, score_transform=transform)(
                identity, queries, positives, {"cache": cache}, pos_features=features
            )
            assert set(result.updated_item_indices["cache"].tolist()) == left
            exact = plain_cross_entropy(queries, positives, embeddings[sorted(left)])
            assert_close(result.interpretable_loss, exact)
    with pytest.raises(ValueError, match="pos_features must hold id for exclude, got None"):
        make_loss(exclude="id")(identity, queries, positives, {"cache": cache})


def test_several_negatives_without_replacement():
    queries, positives, cache = random_problem(queries=50, slots=6)
    result = make_loss(num_negatives=4)(identity, queries, positives, {"cache": cache})
    drawn = result.updated_item_indices["cache"].view(50, 4)
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    more = make_loss(num_negatives=9)(identity, queries, positives, {"cache": cache})
    drawn = more.updated_item_indices["cache"].view(50, 9)
    assert all(sorted(row) == [0, 1, 2, 3, 4, 5] for row in drawn[:, :6].tolist())
    assert not more.updated_item_mask["cache"].view(50, 9)[:, 6:].any()


def test_in_batch_negatives_join_the_same_softmax():
    queries, positives, cache = random_problem(queries=4, slots=3)
    positives[2] = positives[0]
    documents = cache.data["embeddings"]
    for exclude in (None, "data"):
        result = make_loss(in_batch=True, exclude=exclude)(
            identity, queries, positives, {"cache": cache}, pos_features={"data": positives}
        )
        for row in range(4):
            same = {row} if exclude is None or row in (1, 3) else {0, 2}
            others = [positives[other] for other in range(4) if other not in same]
            pool = torch.cat([documents, torch.stack(others)])
            exact = plain_cross_entropy(queries[row : row + 1], positives[row : row + 1], pool)
            assert_close(result.interpretable_loss[row : row + 1], exact)


def test_a_drawn_in_batch_negative_is_the_other_positive_itself():
    """Check that the gradient reaches that positive, and that no slot is refreshed."""
    queries, positives = torch.eye(2), torch.tensor([[0.0, 9.0], [9.0, 0.0]], requires_grad=True)
    cache = full_cache(torch.zeros(3, 2))
    result = make_loss(in_batch=True)(identity, queries, positives, {"cache": cache})
    assert not result.updated_item_mask["cache"].any()
    assert result.staleness.tolist() == [0, 0]
    result.training_loss.sum().backward()
    p = torch.exp(-result.interpretable_loss)
    assert_close(positives.grad, (1 - p)[:, None] * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    only = full_cache(torch.zeros(3, 2))
    only.valid[:] = False
    result = make_loss(in_batch=True)(identity, queries, positives.detach(), {"cache": only})
    assert_close(result.interpretable_loss, torch.tensor([9.000123, 9.000123]))


@pytest.mark.parametrize("in_batch", [False, True])
def test_hard_negatives_join_the_same_softmax(in_batch):
    queries, positives, cache = random_problem(queries=3, slots=4)
    hard = torch.randn(5, 6)
    hard[1] = positives[2]
    for exclude in (None, "data"):
        result = make_loss(in_batch=in_batch, exclude=exclude)(
            identity, queries, positives, {"cache": cache}, pos_features={"data": positives},
            hard_negatives=hard, hard_features={"data": hard},
        )  # fmt: skip
        for row in range(3):
            kept = [i for i in range(5) if (i, row, exclude) != (1, 2, "data")]
            others = [positives[i] for i in range(3) if in_batch and i != row]
            pool = torch.cat([cache.data["embeddings"], hard[kept], *(x[None] for x in others)])
            exact = plain_cross_entropy(queries[row : row + 1], positives[row : row + 1], pool)
            assert_close(result.interpretable_loss[row : row + 1], exact)


def test_a_drawn_hard_negative_gets_the_gradient():
    queries, positives = torch.eye(2), torch.zeros(2, 2)
    hard = torch.tensor([[9.0, 9.0], [-9.0, -9.0]], requires_grad=True)
    for options in ({}, {"in_batch": True}):
        cache = full_cache(torch.zeros(3, 2))
        result = make_loss(**options)(
            identity, queries, positives, {"cache": cache}, hard_negatives=hard
        )
        assert not result.updated_item_mask["cache"].any()
        (gradient,) = torch.autograd.grad(result.training_loss.sum(), hard)
        p = torch.exp(-result.interpretable_loss)
        assert_close(gradient, torch.stack([1 - p, torch.zeros(2)]))
    none = make_loss()(identity, queries, positives, {"cache": cache}, hard_negatives=hard[:0])
    assert_close(none.interpretable_loss, torch.full((2,), 4.0).log())


def test_hard_negatives_that_do_not_fit():
    queries, positives, cache = random_problem(queries=3, slots=4)
    arguments = (identity, queries, positives, {"cache": cache})
    with pytest.raises(ValueError, match=r"hard_negatives must be \(documents, 6\) .* \(5, 7\)"):
        make_loss()(*arguments, hard_negatives=torch.zeros(5, 7))
    features = {"pos_features": {"data": positives}, "hard_negatives": torch.zeros(5, 6)}
    with pytest.raises(ValueError, match="hard_features must hold data for exclude, got None"):
        make_loss(exclude="data")(*arguments, **features)
    with pytest.raises(ValueError, match=r"hard_features must be \(5, ...\), got \[2\] items"):
        make_loss(exclude="data")(*arguments, **features, hard_features={"data": torch.zeros(2, 6)})


@pytest.mark.parametrize("count", [1, 5, 7, 13])
@pytest.mark.parametrize("top_k", [1, 3, 5, 20])
def test_any_size_with_any_top_k(count, top_k):
    queries, positives, cache = random_problem(slots=count)
    for method in ("grouped", "exact"):
        for transform in (None, lambda scores: scores):
            result = make_loss(top_k=top_k, top_k_method=method, score_transform=transform)(
                identity, queries, positives, {"cache": cache}
            )
            assert result.interpretable_loss.isfinite().all()
            assert result.updated_item_mask["cache"].all()


def test_the_loss_does_not_underflow():
    queries, positives = column(1.0), column(-500.0)
    result = make_loss()(identity, queries, positives, {"cache": full_cache(column(500))})
    assert result.interpretable_loss.tolist() == [1000]
    positives = column(500.0)
    result = make_loss()(identity, queries, positives, {"cache": full_cache(column(-500))})
    assert result.interpretable_loss.tolist() == [0]


def test_equal_scores_keep_the_lowest_slot():
    queries, positives = torch.ones(300, 1), torch.ones(300, 1)
    cache = {"cache": full_cache(torch.ones(10, 1))}
    for transform in (None, lambda scores: scores):
        for method, kept in (("grouped", {0, 4, 7}), ("exact", {0, 1, 2})):
            result = make_loss(top_k=3, top_k_method=method, score_transform=transform)(
                identity, queries, positives, cache
            )
            assert set(result.updated_item_indices["cache"].tolist()) == kept


def test_sparse_cache_is_the_dense_one():
    """Compare a sparse cache with a dense cache of the entries that it keeps, all or pruned."""
    generator = torch.Generator().manual_seed(2)
    dense = torch.rand(30, 50, generator=generator)
    dense = dense.masked_fill(torch.rand(30, 50, generator=generator) < 0.8, 0)
    queries, positives = torch.rand(2, 6, 50, generator=generator)
    most = int((dense > 0).sum(1).max())
    for k in (most + 3, most, 4):
        keeper = CacheManager({"embeddings": SparseFeature(50, k), "data": dense_spec()}, 30)
        sparse = keeper.init_cache()
        keeper.update_cache(sparse, new_items={"embeddings": dense, "data": dense})
        kept = sparse.data["embeddings"].to_dense()
        assert torch.equal(kept, dense) == (k >= most)
        reference = NegativeCache({"embeddings": kept, "data": dense}, torch.zeros(30))
        for options in ({}, {"top_k": 7}, {"score_transform": lambda s: s / 2}, {"in_batch": True},
                        {"num_negatives": 3}):  # fmt: skip
            results = []
            for cache in (sparse, reference):
                loss = make_loss(retrieval=GumbelMaxRetrievalFn(seed=1), **options)
                result = loss(identity, queries, positives, {"cache": cache})
                results.append(result)
                keeper.update_cache(
                    sparse,
                    updated_item_data={"embeddings": kept[:1]},
                    updated_item_indices=torch.tensor([0]),
                )
            for name in ("training_loss", "interpretable_loss", "staleness"):
                assert_close(getattr(results[0], name), getattr(results[1], name))


def dense_spec():
    from splade_fast.negative_cache import FixedLenFeature

    return FixedLenFeature([50], torch.float32)


# Options of the published package ----------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("transform", [None, lambda scores: scores])
def test_return_topk(top_k, transform):
    queries, positives, cache = random_problem()
    documents = cache.data["embeddings"]
    loss = make_loss(top_k=top_k, score_transform=transform)
    scores = queries @ documents.t()
    if top_k:
        groups = scores.tensor_split(top_k, 1)
        kept = torch.cat([group == group.amax(1, keepdim=True) for group in groups], 1)
        scores = scores.masked_fill(~kept, -torch.inf)
    for count in (2, 3, 4, 30):
        result = loss(identity, queries, positives, {"cache": cache}, return_topk=count)
        expected = scores.topk(min(count, top_k or 40)).indices
        assert len(result.topk_features) == 5
        for features, slots in zip(result.topk_features, expected, strict=True):
            assert torch.equal(features["data"], documents[slots])
    assert loss(identity, queries, positives, {"cache": cache}).topk_features is None
    if top_k:
        result = loss(identity, queries, positives, {"cache": cache}, return_topk=1)
        drawn = documents[result.updated_item_indices["cache"]]
        assert [list(features) for features in result.topk_features] == [["data"]]
        assert torch.equal(result.topk_features[0]["data"], drawn)


def test_retrieval_functions():
    scores = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, -torch.inf]])
    assert MaxScoreRetrievalFn()(scores).tolist() == [[1], [0]]
    draw = GumbelMaxRetrievalFn(inv_temp=3.0, seed=0)
    drawn = torch.cat([draw(scores) for _ in range(2000)], 1)
    assert drawn.shape == (2, 2000)
    share = (drawn[0] == 1).float().mean().item()
    assert share == pytest.approx((3 * scores[0]).softmax(0)[1].item(), abs=0.02)
    assert not (drawn[1] == 2).any()


def test_a_replaced_retrieval_function_sees_all_scores():
    queries, positives, cache = random_problem()
    seen = []

    def highest(scores):
        seen.append(scores)
        return scores.argmax(1, keepdim=True)

    result = make_loss(retrieval=highest)(identity, queries, positives, {"cache": cache})
    scores = queries @ cache.data["embeddings"].t()
    assert_close(seen[0], scores)
    assert torch.equal(result.updated_item_indices["cache"], scores.argmax(1))
    two = make_loss(retrieval=lambda s: s.topk(2).indices, reducer=torch.sum)(
        identity, queries, positives, {"cache": cache}
    )
    assert torch.equal(two.updated_item_indices["cache"], scores.topk(2).indices.flatten())
    with pytest.raises(ValueError, match=r"retrieval_fn must return \(5, negatives\) indices, got"):
        make_loss(retrieval=lambda s: s.argmax(1))(identity, queries, positives, {"cache": cache})


def test_pickle():
    loss = make_loss(score_transform=sf.negative_cache.Scale(20.0), top_k=3)
    again = pickle.loads(pickle.dumps(loss))
    assert again.score_transform == Scale(20.0)
    assert torch.equal(again.retrieval_fn.rng.state, loss.retrieval_fn.rng.state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    queries, positives, cache = random_problem(dtype=torch.float64)
    exact = plain_cross_entropy(*(
        t.to(dtype).double() for t in (queries, positives, cache.data["embeddings"])
    ))  # fmt: skip
    cache.to(dtype)
    for options in ({}, {"score_transform": lambda s: s}, {"top_k": 40}, {"exclude": "data"}):
        result = make_loss(**options)(
            identity, queries.to(dtype), positives.to(dtype), {"cache": cache},
            pos_features={"data": positives},
        )  # fmt: skip
        # The inputs are rounded, but the results are not.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert_close(result.interpretable_loss.double(), exact, rtol=tolerance, atol=tolerance)
        assert result.training_loss.isfinite().all()


def test_autocast():
    queries, positives, cache = random_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_loss()(identity, queries, positives, {"cache": cache})
    exact = plain_cross_entropy(queries, positives, cache.data["embeddings"])
    assert_close(result.interpretable_loss, exact)


def test_bad_arguments():
    queries, positives, cache = random_problem()
    caches = {"cache": cache}
    with pytest.raises(ValueError, match="num_negatives must be at least 1, got 0"):
        make_loss(num_negatives=0)
    with pytest.raises(ValueError, match="top_k_method must be one of 'grouped', 'exact', got 'a'"):
        make_loss(top_k_method="a")
    with pytest.raises(ValueError, match="cache must hold at least one cache, got none"):
        make_loss()(identity, queries, positives, {})
    with pytest.raises(ValueError, match=r"must be \(queries, dim\) both, got"):
        make_loss()(identity, queries, positives[:2], caches)
    with pytest.raises(ValueError, match=r"query_embeddings must be \(queries, 6\) as the cached"):
        make_loss()(identity, queries[:, :3], positives[:, :3], caches)
    other = {**caches, "other": full_cache(torch.zeros(3, 5))}
    with pytest.raises(ValueError, match=r"query_embeddings must be \(queries, 5\) as the cached"):
        make_loss()(identity, queries, positives, other)
    for name, value, error in (
        ("top_k", 0, "top_k must be at least 1, got 0"),
        ("top_k", -3, "top_k must be at least 1, got -3"),
    ):
        with pytest.raises(ValueError, match=error):
            make_loss(**{name: value})
    with pytest.raises(KeyError, match="must have 'text'"):
        make_loss(data_keys=["text"])(identity, queries, positives, caches)
