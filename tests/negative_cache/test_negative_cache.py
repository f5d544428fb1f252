"""Tests of the cache and its updates: replaced slots, refreshed items and ages."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import splade_fast as sf
from splade_fast.negative_cache.filter_fns import IsInCacheFilterFn
from splade_fast.negative_cache.negative_cache import (
    CacheManager,
    FixedLenFeature,
    NegativeCache,
    SparseFeature,
)
from splade_fast.negative_cache.util import approximate_top_k_with_indices


def manager(size: int = 4, **options) -> CacheManager:
    specs = {
        "data": FixedLenFeature(shape=[], dtype=torch.int32),
        "embedding": FixedLenFeature(shape=[2], dtype=torch.float32),
    }
    return CacheManager(specs, size, **options)


def items(*values: int) -> dict[str, Tensor]:
    data = torch.tensor(values)
    return {"data": data, "embedding": data[:, None].float().expand(-1, 2)}


def state(cache: NegativeCache) -> tuple[list[int], list[int]]:
    assert torch.equal(cache.data["embedding"][:, 0], cache.data["data"].float())
    return cache.data["data"].tolist(), cache.age.tolist()


def test_the_numbers_to_meet(device):
    """Insert the pairs 1, 2 and 3 into a cache of 4 slots."""
    keeper = manager()
    cache = keeper.init_cache().to(device)
    assert state(cache) == ([0, 0, 0, 0], [0, 0, 0, 0])
    for value, expected in (
        (1, ([1, 1, 0, 0], [0, 0, 1, 1])),
        (2, ([1, 1, 2, 2], [1, 1, 0, 0])),
        (3, ([3, 3, 2, 2], [0, 0, 1, 1])),
    ):
        assert keeper.update_cache(cache, new_items=items(value, value)) is cache
        assert state(cache) == expected
    assert cache.valid.all()


def test_slots_are_valid_once_they_hold_an_item():
    keeper = manager()
    cache = keeper.init_cache()
    assert not cache.valid.any()
    keeper.update_cache(cache, new_items=items(7))
    assert cache.valid.tolist() == [True, False, False, False]
    refreshed = {"embedding": torch.ones(1, 2)}
    keeper.update_cache(cache, updated_item_data=refreshed, updated_item_indices=torch.tensor([2]))
    assert cache.valid.tolist() == [True, False, False, False]


@pytest.mark.parametrize(("use_lru", "ages", "data"), [
    (True, [1, 0, 2, 3], [4, 2, 3, 9]),
    (False, [2, 1, 0, 3], [9, 2, 3, 9]),
])  # fmt: skip
def test_lru_and_fifo(use_lru, ages, data):
    keeper = manager(use_lru=use_lru)
    cache = keeper.init_cache()
    for value in (4, 2, 3, 9):
        keeper.update_cache(cache, new_items=items(value))
    assert state(cache) == ([4, 2, 3, 9], [3, 2, 1, 0])
    keeper.update_cache(
        cache,
        updated_item_data={"embedding": torch.full((2, 2), 5.0)},
        updated_item_indices=torch.tensor([0, 1]),
        updated_item_mask=torch.tensor([True, False]),
    )
    assert cache.data["embedding"][:, 0].tolist() == [5, 2, 3, 9]
    assert cache.age.tolist() == ([0, 3, 2, 1] if use_lru else [4, 3, 2, 1])
    keeper.update_cache(cache, new_items=items(1))
    replaced = 1 if use_lru else 0
    assert cache.data["data"][replaced] == 1
    assert cache.age[replaced] == 0


def test_refreshed_first_then_replaced():
    """Check that a refreshed item is kept with LRU, and may be replaced at once without it."""
    for use_lru, data in ((True, [4, 1]), (False, [1, 2])):
        keeper = manager(2, use_lru=use_lru)
        cache = keeper.init_cache()
        for value in (4, 2):
            keeper.update_cache(cache, new_items=items(value))
        keeper.update_cache(
            cache,
            new_items=items(1),
            updated_item_data={"embedding": torch.full((1, 2), 4.0)},
            updated_item_indices=torch.tensor([0]),
        )
        assert cache.data["data"].tolist() == data
        assert cache.age.tolist() == ([0, 0] if use_lru else [0, 1])


def test_masked_new_items_take_no_slot():
    keeper = manager()
    cache = keeper.init_cache()
    for value in (1, 2, 3, 4):
        keeper.update_cache(cache, new_items=items(value))
    mask = torch.tensor([False, True, False, True])
    keeper.update_cache(cache, new_items=items(6, 7, 8, 9), new_items_mask=mask)
    assert state(cache) == ([7, 9, 3, 4], [0, 0, 2, 1])
    keeper.update_cache(cache, new_items=items(5, 5), new_items_mask=torch.zeros(2).bool())
    assert state(cache) == ([7, 9, 3, 4], [1, 1, 3, 2])


def test_an_update_of_nothing_ages():
    keeper = manager()
    cache = keeper.init_cache()
    keeper.update_cache(cache)
    keeper.update_cache(cache, new_items=items())
    assert cache.age.tolist() == [2, 2, 2, 2]


def test_more_new_items_than_slots():
    keeper = manager(2)
    cache = keeper.init_cache()
    with pytest.raises(ValueError, match="new_items must be at most the 2 slots of the cache, got"):
        keeper.update_cache(cache, new_items=items(1, 2, 3))
    mask = torch.tensor([True, False, True])
    keeper.update_cache(cache, new_items=items(1, 2, 3), new_items_mask=mask)
    assert state(cache) == ([1, 3], [0, 0])


def test_items_are_padded_and_cast():
    specs = {
        "ids": FixedLenFeature([4], torch.int32, default_value=9),
        "mask": FixedLenFeature([4], torch.bool),
        "grid": FixedLenFeature([2, 3], torch.bfloat16),
    }
    keeper = CacheManager(specs, 3)
    cache = keeper.init_cache()
    new = {"ids": torch.ones(1, 2).long(), "mask": torch.ones(1, 2), "grid": torch.ones(1, 1, 2)}
    keeper.update_cache(cache, new_items=new)
    assert cache.data["ids"][0].tolist() == [1, 1, 9, 9]
    assert cache.data["mask"][0].tolist() == [True, True, False, False]
    assert cache.data["grid"][0].tolist() == [[1, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"new_items\['ids'\] must be \(items, up to 4\), got"):
        keeper.update_cache(cache, new_items={**new, "ids": torch.ones(1, 5)})


def test_a_bad_argument_changes_nothing():
    keeper = manager()
    cache = keeper.init_cache()
    keeper.update_cache(cache, new_items=items(1, 2))
    before = copy.deepcopy(cache.state_dict())
    fresh = {"embedding": torch.ones(1, 2)}
    one = torch.tensor([0])
    wrong = [
        (ValueError, "new_items must have the keys", {"new_items": {"data": one}}),
        (ValueError, "equally many items", {"new_items": {**items(1, 2), "data": one}}),
        (ValueError, "equally many items", {"new_items": {**items(1, 2), "data": one.long()}}),
        (ValueError, r"new_items\['data'\] must be \(items, no more dimensions\), got \(\)",
         {"new_items": {**items(1, 2), "data": torch.tensor(1)}}),
        (ValueError, r"new_items_mask must be \(1,\)",
         {"new_items": items(1), "new_items_mask": torch.ones(2)}),
        (ValueError, "updated_item_data must have keys of the cache",
         {"updated_item_data": {"other": one}, "updated_item_indices": one}),
        (ValueError, "updated_item_indices must be given", {"updated_item_data": fresh}),
        (ValueError, r"updated_item_indices must be \(1,\)",
         {"updated_item_data": fresh, "updated_item_indices": torch.tensor([0, 1])}),
        (RuntimeError, "indices must be between 0 and 3",
         {"updated_item_data": fresh, "updated_item_indices": torch.tensor([4]),
          "new_items": items(3)}),
        (ValueError, r"updated_item_mask must be \(1,\)",
         {"updated_item_data": fresh, "updated_item_indices": one,
          "updated_item_mask": torch.ones(2), "new_items": items(3)}),
    ]  # fmt: skip
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            keeper.update_cache(cache, **arguments)
    after = cache.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_gradients_stay_out():
    keeper = manager()
    cache = keeper.init_cache()
    new = items(1, 2)
    new["embedding"] = new["embedding"].clone().requires_grad_()
    keeper.update_cache(cache, new_items=new)
    assert not cache.data["embedding"].requires_grad


def test_module_of_buffers():
    cache = manager().init_cache()
    assert set(cache.state_dict()) == {"age", "valid", "data.data", "data.embedding"}
    cache.to(torch.float64)
    assert cache.data["embedding"].dtype == torch.float64
    assert cache.data["data"].dtype == torch.int32
    clone = pickle.loads(pickle.dumps(cache))
    assert torch.equal(clone.data["embedding"], cache.data["embedding"])
    assert list(cache.data) == ["data", "embedding"]
    cache.data["embedding"] = torch.ones(4, 2)
    assert cache.state_dict()["data.embedding"].sum() == 8
    names = CacheManager({"type": FixedLenFeature([], torch.bool)}, 2).init_cache()
    assert names.data["type"].tolist() == [False, False]
    with pytest.raises(ValueError, match="keys must be strings without dots, got 'a.b'"):
        NegativeCache({"a.b": torch.zeros(2)}, torch.zeros(2))
    with pytest.raises(ValueError, match="storage must be one of device, pinned, got 'disk'"):
        manager(storage="disk").init_cache()
    with pytest.raises(ValueError, match="cache_size must be at least 1, got 0"):
        manager(0)


def test_sparse_features():
    """Check that the k largest positive entries are stored."""
    keeper = CacheManager({"terms": SparseFeature(num_cols=10, k=3, dtype=torch.bfloat16)}, 4)
    cache = keeper.init_cache()
    dense = torch.tensor([[0, 5, 0, 1, 2, 0, 0, 3, 0, -4], [0.5] + [0] * 9])
    keeper.update_cache(cache, new_items={"terms": dense})
    stored = cache.data["terms"]
    assert isinstance(stored, sf.SparseRows)
    stored.check_contents()
    assert stored.to_dicts() == [{1: 5, 4: 2, 7: 3}, {0: 0.5}, {}, {}]
    rows = sf.SparseRows.from_dense(dense)
    keeper.update_cache(cache, new_items={"terms": rows})
    assert cache.data["terms"].to_dicts()[2:] == cache.data["terms"].to_dicts()[:2]
    with pytest.raises(ValueError, match=r"new_items\['terms'\] must be \(items, 10\), got"):
        keeper.update_cache(cache, new_items={"terms": dense[:, :9]})


def test_tables_of_many_pages():
    """Create tables of several memory pages, and tables without memory on fake devices."""
    specs = {"embedding": FixedLenFeature([1000], torch.float32), "terms": SparseFeature(50, 900)}
    data = CacheManager(specs, 2000).init_cache().data
    assert data["embedding"].shape == (2000, 1000)
    assert not data["embedding"].any()
    assert (data["terms"].indices == -1).all()
    assert not data["terms"].values.any()
    for nowhere in (torch.device("meta"), FakeTensorMode()):
        with nowhere:
            assert CacheManager(specs, 2000).init_cache().data["embedding"].shape == (2000, 1000)


def test_memory_of_a_sparse_cache():
    spec = SparseFeature(num_cols=30522, k=256, dtype=torch.bfloat16)
    tables = CacheManager({"terms": spec}, 131_072).init_cache().data.tables().values()
    assert sum(table.nbytes for table in tables) <= 260e6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_storage():
    keeper = manager(storage="pinned")
    cache = keeper.init_cache().to("cuda")
    assert cache.device.type == "cuda"
    for value in (1, 2, 3):
        keeper.update_cache(cache, new_items=items(value, value))
    torch.cuda.synchronize()
    assert all(table.is_pinned() for table in cache.data.tables().values())
    assert state(cache) == ([3, 3, 2, 2], [0, 0, 1, 1])


def test_pinned_storage_without_a_gpu():
    keeper = manager(storage="pinned")
    cache = keeper.init_cache().to(torch.float64)
    keeper.update_cache(cache, new_items=items(1, 2))
    assert cache.data["embedding"].dtype == torch.float64
    assert state(cache) == ([1, 2, 0, 0], [0, 0, 1, 1])


@pytest.mark.parametrize(("keys", "expected"), [
    (("1", "2"), [False, True, False, True, True]),
    (("1",), [False, False, False, True, True]),
    (("2",), [False, False, False, True, True]),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_filter(device, keys, expected, dtype):
    """Check that only items equal in all keys to a valid slot are filtered out."""
    first = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [8, 8]])
    second = torch.tensor([[4, 4], [5, 5], [6, 6], [7, 7], [10, 10]])
    data = {"1": first.to(device, dtype), "2": second.to(device, dtype)}
    valid = torch.tensor([True, True, True, True, False], device=device)
    cache = NegativeCache(data, torch.zeros(5, device=device), valid)
    new = {
        "1": torch.tensor([[0, 0], [1, 1], [3, 3], [8, 8], [9, 9]], device=device),
        "2": torch.tensor([[4, 4], [7, 7], [7, 7], [10, 10], [11, 11]], device=device),
    }
    assert IsInCacheFilterFn(keys=keys)(cache, new).tolist() == expected


def test_filter_by_id():
    cache = manager().init_cache()
    manager().update_cache(cache, new_items=items(3, 4))
    assert IsInCacheFilterFn(["data"])(cache, items(0, 3, 5, 4)).tolist() == [
        True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(("columns", "k"), [(12, 3), (13, 3), (7, 5), (5, 5), (3, 5), (9, 1)])
def test_approximate_top_k(device, columns, k):
    scores = torch.randint(0, 4, (6, columns), device=device).float()
    values, indices = approximate_top_k_with_indices(scores, k)
    groups = torch.arange(columns).tensor_split(min(k, columns))
    for row, (found, places) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        for group, value, place in zip(groups, found, places, strict=True):
            of_group = scores[row, group].tolist()
            assert value == max(of_group)
            assert place == group[of_group.index(value)]
