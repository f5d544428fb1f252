"""Sharded and replicated caches in several processes, against one process with all data."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from splade_fast.negative_cache import Scale, load_sharded, save_sharded, sources
from splade_fast.negative_cache.handlers import CacheLossHandler
from splade_fast.negative_cache.losses import (
    CacheClassificationLoss,
    DistributedCacheClassificationLoss,
)
from splade_fast.negative_cache.negative_cache import NegativeCache
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from splade_fast.negative_cache.util import cross_replica_concat
from tests.negative_cache.models import Tower, column, full_cache, identity, tower_manager
from tests.ranks import run_ranks

KEYS = {"embedding_key": "embedding", "data_keys": ("ids",)}


def words(rows: int, seed: int) -> Tensor:
    return torch.randint(50, (rows, 4), generator=torch.Generator().manual_seed(seed)).int()


def shard(size: int, seed: int) -> NegativeCache:
    """Return a cache of stale embeddings, with two slots that are not valid."""
    generator = torch.Generator().manual_seed(seed)
    data = {"ids": words(size, seed), "embedding": torch.randn(size, 8, generator=generator)}
    cache = NegativeCache(data, torch.arange(size))
    cache.valid[1:3] = False
    return cache


def joined(caches: list[NegativeCache]) -> NegativeCache:
    def concatenate(name):
        return torch.cat([cache.state_dict()[name] for cache in caches])

    data = {key: concatenate(f"data.{key}") for key in caches[0].data}
    return NegativeCache(data, concatenate("age"), concatenate("valid"))


def tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower()


# Scenarios: each runs on all ranks ---------------------------------------------------------------


def sharded_numbers_to_meet(rank: int, count: int) -> None:
    if count != 2:
        return
    cache = {"cache": full_cache(column(*((1, 2), (-1, -2))[rank]))}
    queries, positives = column(*((-1, 1), (1, 1))[rank]), column(2, 2)
    options = {"embedding_key": "embeddings", "data_keys": ("data",)}
    for transform in (None, Scale(1.0), lambda scores: scores):
        loss = DistributedCacheClassificationLoss(
            **options, score_transform=transform, reducer=None
        )
        result = loss(identity, queries, positives, cache)
        expected = torch.tensor(((4.37452, 0.890350), (0.890350, 0.890350))[rank])
        assert_close(result.interpretable_loss, expected, rtol=1e-5, atol=1e-5)
    loss.reducer = torch.mean
    assert_close(loss(identity, queries, positives, cache).interpretable_loss, expected.mean(),
                 rtol=1e-5, atol=1e-5)  # fmt: skip

    def chosen(scores):
        return column(0, 1, 0, 1).long() if len(scores) == 4 else column(0, 1).long()

    loss._retrieval_fn, loss.reducer = chosen, None
    training = loss(identity, queries, positives, cache).training_loss
    expected = torch.tensor(((0.9874058, -2.35795), (-0.589488, -2.35795))[rank])
    assert_close(training, expected, rtol=1e-5, atol=1e-5)


def sharded_is_one_large_cache(rank: int, count: int) -> None:
    """Check loss, gradient, draws and refreshed embeddings, with batches and shards of any size."""
    sources._QUERIES_PER_RANK = 0  # as in the single process of the comparison
    batches, sizes = [3, 0, 5][:count], [11, 6, 9][:count]
    for options in (
        {},
        {"score_transform": Scale(0.5)},
        {"score_transform": lambda scores: scores / 2},
        {"top_k": 3},
        {"top_k": 7},
        {"top_k": 100},
        {"top_k": 5, "top_k_method": "exact"},
        {"top_k": 15, "top_k_method": "exact", "num_negatives": 2},
        {"num_negatives": 3},
        {"num_negatives": 40},
        {"exclude": "ids"},
        {"exclude": ("ids", "embedding"), "top_k": 4},
        {"count_empty_slots": True},
    ):
        shards = [shard(size, seed).double() for seed, size in enumerate(sizes)]
        whole = joined(shards)
        network = tower().double()
        query_ids = words(sum(batches), 100)
        # The positive of every query is a document of the whole cache.
        positive_ids = whole.data["ids"][words(sum(batches), 101)[:, 0].long() % len(whole.age)]
        mine = slice(sum(batches[:rank]), sum(batches[: rank + 1]))

        def run(
            loss,
            cache,
            rows,
            network=network,
            queries=query_ids,
            positives=positive_ids,
            stored=whole.data["embedding"],
        ):
            network.zero_grad()
            ids = positives[rows]
            positive = network({"ids": ids})
            features = {"ids": ids, "embedding": stored[: len(positives)][rows]}
            result = loss(network, network({"ids": queries[rows]}), positive, {"cache": cache},
                          pos_features=features)  # fmt: skip
            result.training_loss.sum().backward()
            return result, network.words.weight.grad.clone()

        seeded = {**KEYS, "reducer": None, **options}
        sharded = DistributedCacheClassificationLoss(
            **seeded, retrieval_fn=GumbelMaxRetrievalFn(seed=5 if rank == 0 else rank)
        )
        local = CacheClassificationLoss(**seeded, retrieval_fn=GumbelMaxRetrievalFn(seed=5))
        for _ in range(2):
            ours, gradient = run(sharded, shards[rank], mine)
            expected, whole_gradient = run(local, whole, slice(None))
            for name in ("training_loss", "interpretable_loss", "staleness"):
                assert_close(
                    getattr(ours, name), getattr(expected, name)[mine],
                    msg=lambda text, name=name, options=options: f"{name} {options}: {text}",
                )  # fmt: skip
            dist.all_reduce(gradient)
            assert_close(gradient, whole_gradient)
            for cache, result in ((shards[rank], ours), (whole, expected)):
                tower_manager(cache.size).update_cache(
                    cache,
                    updated_item_data=result.updated_item_data["cache"],
                    updated_item_indices=result.updated_item_indices["cache"],
                    updated_item_mask=result.updated_item_mask["cache"],
                )
            slots = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            assert_close(shards[rank].data["embedding"], whole.data["embedding"][slots])
            assert torch.equal(shards[rank].age, whole.age[slots])
        assert (whole.age == 0).any()
    sources._QUERIES_PER_RANK = 1 << 20


def sharded_with_other_options(rank: int, count: int) -> None:
    """Check in-batch negatives, another retrieval function, and the top features."""
    cache = shard(9, rank)
    network = tower()
    ids = words(2 + rank, rank)
    queries, positives = network({"ids": ids}), network({"ids": ids.flip(0)})
    whole = torch.cat([shard(9, other).data["embedding"][[0, *range(3, 9)]]
                       for other in range(count)])  # fmt: skip
    scores = torch.cat(
        [queries @ whole.t(), (queries @ positives.t()).masked_fill(torch.eye(len(ids)) > 0, -9e9)],
        1,
    )
    own = (queries * positives).sum(1, keepdim=True)
    exact = -torch.cat([own, scores], 1).log_softmax(1)[:, 0]
    for fn in (None, MaxScoreRetrievalFn(), lambda scores: scores.argmax(1, keepdim=True)):
        loss = DistributedCacheClassificationLoss(
            **KEYS, reducer=None, in_batch=True, retrieval_fn=fn
        )
        result = loss(network, queries, positives, {"cache": cache})
        assert_close(result.interpretable_loss, exact, rtol=1e-4, atol=1e-4)
    for options in ({}, {"top_k": 5}):
        loss = DistributedCacheClassificationLoss(**KEYS, **options)
        result = loss(network, queries, positives, {"cache": cache}, return_topk=3)
        assert len(result.topk_features) == len(ids)
        best = torch.cat([features["ids"] for features in result.topk_features])
        assert best.shape == (3 * len(ids), 4)
    all_ids = torch.cat([shard(9, other).data["ids"][[0, *range(3, 9)]] for other in range(count)])
    loss = DistributedCacheClassificationLoss(**KEYS)
    result = loss(network, queries, positives, {"cache": cache}, return_topk=3)
    best = (queries @ whole.t()).topk(3).indices
    for features, slots in zip(result.topk_features, best, strict=True):
        assert torch.equal(features["ids"], all_ids[slots])
    # A function of scores chooses among the best document of each rank, whatever the groups are.
    of_ranks = (queries @ whole.t()).view(len(ids), count, -1).argmax(2)
    candidates = all_ids.view(count, -1, 4)[torch.arange(count), of_ranks]
    seen = []

    def watched(features):
        seen.append(features["ids"])
        return network(features)

    for method in ("grouped", "exact"):
        loss = DistributedCacheClassificationLoss(
            **KEYS,
            top_k=2 * count + 1,
            top_k_method=method,
            retrieval_fn=lambda scores: scores.argmax(1, keepdim=True),
        )
        loss(watched, queries, positives, {"cache": cache})
        assert (seen.pop().unsqueeze(1) == candidates).all(2).any(1).all()


def wrong_arguments_raise_on_all_ranks(rank: int, count: int) -> None:
    cache = {"cache": shard(5, rank)}
    network = tower()
    queries = network({"ids": words(2, rank)})
    loss = DistributedCacheClassificationLoss(**KEYS)
    positives = queries[:1] if rank == count - 1 else queries
    error, message = (
        (ValueError, "query_embeddings and pos_doc_embeddings must be")
        if rank == count - 1
        else (RuntimeError, f"checking the arguments of the loss failed on rank {count - 1}; see")
    )
    with pytest.raises(error, match=message):
        loss(network, queries, positives, cache)
    other = DistributedCacheClassificationLoss(**KEYS, num_negatives=1 + (rank == 1))
    with pytest.raises(RuntimeError, match="must be the same on all ranks, but rank 1 differs"):
        other(network, queries, queries, cache)
    loss.retrieval_fn = lambda scores: scores.topk(2).indices
    with pytest.raises(
        ValueError, match="must choose one negative of a query if ranks share a cache, got 2"
    ):
        loss(network, queries, queries, cache)
    loss.retrieval_fn = GumbelMaxRetrievalFn()
    with pytest.raises(RuntimeError, match="must be the same on all ranks, but rank 1 differs"):
        loss(network, queries, queries, cache, return_topk=2 if rank == 1 else 0)
    few = DistributedCacheClassificationLoss(**KEYS, top_k=1)
    with pytest.raises(ValueError, match=f"top_k must be at least the number of ranks, {count}"):
        few(network, queries, queries, cache)
    loss(network, queries, queries, cache)  # The group still works.


def a_failing_network_fails_on_all_ranks(rank: int, count: int) -> None:
    """Check that all ranks fail at once, without waiting for the timeout of the group."""
    cache = {"cache": shard(9, rank)}
    network = tower()
    queries = network({"ids": words(2, rank)})
    last = rank == count - 1

    def raising(features):
        raise LookupError("on purpose")

    for broken, error, message in (
        (raising, LookupError, "on purpose"),
        (lambda features: torch.zeros(2, 7), ValueError, r"doc_network must be \(2, 8\), got"),
        (lambda features: torch.zeros(1, 8), ValueError, r"doc_network must be \(2, 8\), got"),
    ):
        if not last:
            error, message = RuntimeError, f"failed on rank {count - 1}; see the error of that rank"
        for loss in (DistributedCacheClassificationLoss(**KEYS), CacheClassificationLoss(**KEYS)):
            handler = CacheLossHandler(
                tower_manager(9),
                loss,
                **KEYS,
                use_cross_replica=isinstance(loss, CacheClassificationLoss),
            )
            handler.cache.load_state_dict(cache["cache"].state_dict())
            before = copy.deepcopy(handler.cache.state_dict())
            features = {"ids": words(2, rank)}
            with pytest.raises(error, match=message):
                handler.update_cache_and_compute_loss(
                    broken if last else network, queries, queries, features
                )
            for name, tensor in handler.cache.state_dict().items():
                assert torch.equal(tensor, before[name]), name
            # The group still works.
            handler.update_cache_and_compute_loss(network, queries, queries, features)


def failing_scores_fail_on_all_ranks(rank: int, count: int) -> None:
    cache = {"cache": shard(9, rank)}
    network = tower()
    queries = network({"ids": words(2, rank)})
    last = rank == count - 1
    error, message = (
        (LookupError, "on purpose") if last else (RuntimeError, f"failed on rank {count - 1}")
    )

    class Failing:
        """Function of scores that fails on the last rank at a given call."""

        def __init__(self, call, chooses):
            self.call, self.chooses, self.calls = call, chooses, 0

        def __call__(self, scores):
            self.calls += 1
            if last and self.calls == self.call:
                raise LookupError("on purpose")
            return scores.topk(1).indices if self.chooses else scores

    for argument, call, options in (
        ("score_transform", 1, {}),
        ("score_transform", 1, {"in_batch": True}),
        ("score_transform", 2, {"in_batch": True}),
        ("score_transform", 1, {"top_k": count}),
        ("score_transform", 1, {"top_k": count, "top_k_method": "exact"}),
        ("retrieval_fn", 1, {}),
        ("retrieval_fn", 2, {}),
        ("retrieval_fn", 3, {"in_batch": True}),
        ("retrieval_fn", 1, {"top_k": count}),
    ):
        options[argument] = Failing(call, argument == "retrieval_fn")
        loss = DistributedCacheClassificationLoss(**KEYS, **options)
        with pytest.raises(error, match=message):
            loss(network, queries, queries, cache)
        loss(network, queries, queries, cache)  # The group still works.


def replicas_stay_the_same(rank: int, count: int) -> None:
    """Check that every rank stores the items of all ranks, with batches of unequal size."""
    batches = [2, 3, 0][:count]
    handler = CacheLossHandler(
        tower_manager(12), CacheClassificationLoss(**KEYS), **KEYS, use_cross_replica=True
    )
    expected = tower_manager(12).init_cache()
    network = tower()
    for step in range(4):
        ids = [words(batch, 10 * step + other) for other, batch in enumerate(batches)]
        embeddings = network({"ids": ids[rank]})
        if batches[rank]:
            handler.update_cache_and_compute_loss(
                network, embeddings, embeddings, {"ids": ids[rank]}
            )
        else:
            loss = handler.update_cache_and_compute_loss(
                network, embeddings, embeddings, {"ids": ids[rank]}
            )
            assert loss.isnan()  # the mean of an empty batch
        new = {"ids": torch.cat(ids)}
        tower_manager(12).update_cache(
            expected, new_items={**new, "embedding": network(new).detach()}
        )
        if step < 2:
            # A network that does not learn refreshes embeddings to the same values.
            assert torch.equal(handler.cache.data["ids"], expected.data["ids"])
            assert_close(handler.cache.data["embedding"], expected.data["embedding"])
    for name, tensor in handler.cache.state_dict().items():
        of_all = cross_replica_concat(tensor).view(count, *tensor.shape)
        assert all(torch.equal(one, of_all[0]) for one in of_all), name
    assert (handler.cache.age == 0).sum() >= sum(batches)
    bad = {"ids": words(2, 0)[:, :2].repeat(1, 4 if rank == 0 else 1)}
    embeddings = network({"ids": words(2, 0)})
    error, message = (
        (ValueError, "must be")
        if rank == 0
        else (RuntimeError, "the step of the cache failed on rank 0; see the error of that rank")
    )
    handler.cache_loss = CacheClassificationLoss("embedding", ())
    with pytest.raises(error, match=message):
        handler.update_cache_and_compute_loss(
            lambda features: torch.zeros(2, 8), embeddings, embeddings, bad
        )


def queries_of_ranks_draw_independently(rank: int, count: int) -> None:
    """Check that the same query on two ranks, with replicas and one seed, draws differently."""
    loss = CacheClassificationLoss(**KEYS, retrieval_fn=GumbelMaxRetrievalFn(seed=1))
    queries = torch.zeros(20, 8)
    result = loss(tower(), queries, queries, {"cache": shard(40, 0)})
    drawn = cross_replica_concat(result.updated_item_indices["cache"]).view(count, 20)
    assert (drawn[0] != drawn[1]).any()


def encoder_in_ddp(rank: int, count: int) -> None:
    """Check that a step may call forward twice, for the batch and for the drawn documents."""
    for static in (False, True):
        for loss_class in (CacheClassificationLoss, DistributedCacheClassificationLoss):
            encoder = DistributedDataParallel(tower(), static_graph=static)
            optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
            handler = CacheLossHandler(
                tower_manager(8), loss_class(**KEYS, score_transform=Scale(2.0)), **KEYS
            )
            for step in range(4):
                optimizer.zero_grad()
                ids = words(3, 7 * step + rank)
                both = encoder({"ids": torch.cat([ids, ids.flip(0)])})
                loss = handler.update_cache_and_compute_loss(
                    encoder, both[:3], both[3:], {"ids": ids.flip(0)}
                )
                loss.backward()
                optimizer.step()
            weight = encoder.module.words.weight.detach()
            assert not torch.equal(weight, tower().words.weight)
            of_all = cross_replica_concat(weight).view(count, *weight.shape)
            assert all(torch.equal(one, of_all[0]) for one in of_all)


def sharded_checkpoint(rank: int, count: int, folder: str) -> None:
    """Check the slots and the generator that fewer ranks read from a checkpoint of all ranks."""

    def handler(size, **options):
        loss = DistributedCacheClassificationLoss(**KEYS, **options)
        return CacheLossHandler(tower_manager(size), loss, **KEYS)

    sizes = [4, 8, 6][:count]
    mine = handler(sizes[rank])
    network = tower()
    for step in range(3):
        ids = words(2, 10 * step + rank)
        embeddings = network({"ids": ids})
        mine.update_cache_and_compute_loss(network, embeddings, embeddings, {"ids": ids})
    save_sharded(mine, f"{folder}/{count}")
    dist.barrier()
    whole = {
        name: torch.cat([t[: sizes[r]] for r, t in enumerate(cross_replica_concat(
            torch.cat([tensor, tensor.new_zeros(8 - len(tensor), *tensor.shape[1:])])
        ).view(count, 8, *tensor.shape[1:]))])
        for name, tensor in mine.cache.state_dict().items()
    }  # fmt: skip
    total = sum(sizes)
    for readers in range(1, count + 1):
        group = dist.new_group(list(range(readers)))
        if rank >= readers:
            continue
        each = [total // readers + (r < total % readers) for r in range(readers)]
        reader = handler(each[rank], process_group=group)
        load_sharded(reader, f"{folder}/{count}", group)
        start = sum(each[:rank])
        for name, tensor in reader.cache.state_dict().items():
            assert torch.equal(tensor, whole[name][start : start + each[rank]]), name
        state = reader.cache_loss.retrieval_fn.rng.state
        assert state[1] == 3
        assert torch.equal(state, mine.cache_loss.retrieval_fn.rng.state)
        with pytest.raises(ValueError, match=f"the shards must have {total + readers} slots"):
            load_sharded(handler(each[rank] + 1), f"{folder}/{count}", group)
        with pytest.raises(FileNotFoundError):
            load_sharded(reader, f"{folder}/nothing", group)
        if readers < count:
            with pytest.raises(ValueError, match="folder must hold no checkpoint of other ranks"):
                save_sharded(reader, f"{folder}/{count}", group)


SCENARIOS = (
    sharded_numbers_to_meet,
    sharded_is_one_large_cache,
    sharded_with_other_options,
    wrong_arguments_raise_on_all_ranks,
    a_failing_network_fails_on_all_ranks,
    failing_scores_fail_on_all_ranks,
    replicas_stay_the_same,
    queries_of_ranks_draw_independently,
    encoder_in_ddp,
)


def all_scenarios(rank: int, count: int, folder: str) -> None:
    for scenario in SCENARIOS:
        scenario(rank, count)
    sharded_checkpoint(rank, count, folder)


@pytest.mark.parametrize("count", [2, 3])
def test_all_scenarios(count, tmp_path):
    """Start the processes once for all scenarios, because the start takes longer than they do."""
    run_ranks(count, all_scenarios, tmp_path, str(tmp_path))


def one_fails(rank: int, count: int) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()


def one_hangs(rank: int, count: int) -> None:
    if rank == 1:
        time.sleep(100)


def test_a_failing_rank_fails_the_test(tmp_path):
    with pytest.raises(AssertionError, match="ValueError: on purpose"):
        run_ranks(2, one_fails, tmp_path)


def test_a_hanging_rank_fails_the_test(tmp_path):
    with pytest.raises(AssertionError, match="the ranks took longer than 3 s"):
        run_ranks(2, one_hangs, tmp_path, seconds=3)


def test_without_a_process_group():
    loss = DistributedCacheClassificationLoss(**KEYS)
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        loss(tower(), torch.zeros(1, 8), torch.zeros(1, 8), {"cache": shard(5, 0)})
