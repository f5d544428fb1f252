"""Tests of the handlers: steps, updates of the cache, and saved state."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splade_fast.negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    FixedLenFeature,
    MultiCacheLossHandler,
    Scale,
    load_sharded,
    losses,
    save_sharded,
)
from splade_fast.negative_cache.negative_cache import CacheManager
from tests.negative_cache.models import Tower, tower_manager

KEYS = {"embedding_key": "embedding", "data_keys": ("ids",)}


class StubLoss:
    """Loss with the signature of the published package, without any further argument."""

    def __init__(self, *updates):
        self.updates = updates

    def __call__(self, doc_network, query_embeddings, pos_doc_embeddings, cache):
        data, indices, mask = self.updates
        return losses.CacheLossReturn(
            training_loss=0.0,
            interpretable_loss=0.0,
            updated_item_data=data,
            updated_item_indices=indices,
            updated_item_mask=mask,
            staleness=0.0,
        )


def stub_handler(*updates):
    specs = {
        "data": FixedLenFeature(shape=[2], dtype=torch.int32),
        "embedding": FixedLenFeature(shape=[3], dtype=torch.float32),
    }
    return CacheLossHandler(
        CacheManager(specs, cache_size=4),
        StubLoss(*updates),
        embedding_key="embedding",
        data_keys=("data",),
    )


def tower_handler(size: int = 20, seed: int = 3, **options) -> tuple[CacheLossHandler, Tower]:
    torch.manual_seed(seed)
    loss = CacheClassificationLoss(**KEYS, score_transform=Scale(2.0), **options)
    return CacheLossHandler(tower_manager(size), loss, **KEYS), Tower()


def step(handler, network, number: int, **options):
    generator = torch.Generator().manual_seed(number)
    queries, positives = torch.randint(50, (2, 5, 4), generator=generator)
    return handler.update_cache_and_compute_loss(
        network, network({"ids": queries}), network({"ids": positives}), {"ids": positives},
        **options,
    )  # fmt: skip


def test_a_new_cache_is_zero():
    handler = stub_handler(None, None, None)
    assert set(handler.cache.data) == {"data", "embedding"}
    assert torch.equal(handler.cache.data["data"], torch.zeros(4, 2, dtype=torch.int32))
    assert torch.equal(handler.cache.data["embedding"], torch.zeros(4, 3))
    assert torch.equal(handler.cache.age, torch.zeros(4, dtype=torch.int32))


def test_refreshed_and_new_items():
    handler = stub_handler(
        {"cache": {"embedding": torch.ones(1, 3)}},
        {"cache": torch.tensor([0])},
        {"cache": torch.tensor([True])},
    )
    loss = handler.update_cache_and_compute_loss(
        item_network=None,
        query_embeddings=torch.zeros(1, 3),
        pos_item_embeddings=torch.full((1, 3), 2.0),
        features={"data": torch.tensor([[2, 2]]), "more": torch.zeros(1)},
    )
    assert loss == 0
    assert handler.cache.data["data"].tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]
    assert handler.cache.data["embedding"][:, 0].tolist() == [1, 2, 0, 0]
    assert handler.cache.age.tolist() == [0, 0, 1, 1]


def test_the_known_signature_returns_the_loss_of_a_step():
    handler, network = tower_handler(top_k=4)
    other = copy.deepcopy(handler)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        queries, positives = torch.randint(50, (2, 5, 4), generator=generator)
        embeddings = network({"ids": queries}), network({"ids": positives})
        result = handler.step(network, *embeddings, {"ids": positives}, return_topk=2)
        loss, features = step(other, network, number, return_topk=2)
        assert torch.equal(loss, result.training_loss)
        assert len(features) == len(result.topk_features) == 5
        for mine, expected in zip(features, result.topk_features, strict=True):
            assert torch.equal(mine["ids"], expected["ids"])
    assert result.interpretable_loss > 0
    assert all(
        torch.equal(mine, expected)
        for mine, expected in zip(handler.buffers(), other.buffers(), strict=True)
    )


def test_a_step_refreshes_and_adds():
    handler, network = tower_handler()
    losses_seen = []
    for number in range(6):
        with torch.no_grad():
            network.words.weight.mul_(1.1)  # the network changes
        loss = step(handler, network, number)
        losses_seen.append(loss.item())
        loss.backward()
        fresh = network({"ids": handler.cache.data["ids"]}).detach()
        current = (handler.cache.data["embedding"] - fresh).abs().amax(1) < 1e-5
        young = handler.cache.age == 0
        assert torch.equal(current & handler.cache.valid, young & handler.cache.valid)
        assert handler.cache.valid.sum() == min(5 * (number + 1), 20)
        assert young.sum() >= 5
    assert losses_seen[0] == 0
    assert all(value != 0 for value in losses_seen[1:])


def test_writer_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    for reducer in (torch.mean, None):
        handler, network = tower_handler(reducer=reducer)
        folder = tmp_path / str(reducer is None)
        with SummaryWriter(str(folder)) as writer:
            for number in range(3):
                step(handler, network, number, writer=(writer, number))
        events = EventAccumulator(str(folder)).Reload()
        for tag in ("cache/interpretable_prediction_loss", "cache/staleness"):
            assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]
        found = [event.value for event in events.Scalars("cache/interpretable_prediction_loss")]
        assert found[0] == 0
        assert found[2] > 0


def test_return_topk():
    handler, network = tower_handler(top_k=4)
    step(handler, network, 0)
    loss, features = step(handler, network, 1, return_topk=3)
    assert loss.ndim == 0
    assert [one["ids"].shape for one in features] == [(3, 4)] * 5
    loss, features = step(handler, network, 2, return_topk=1)
    assert [one["ids"].shape for one in features] == [(5, 4)]


def test_several_caches():
    torch.manual_seed(0)
    network = Tower()
    managers = {"web": tower_manager(6), "books": tower_manager(9)}
    handler = MultiCacheLossHandler(managers, CacheClassificationLoss(**KEYS), **KEYS)
    for _ in range(4):
        ids = {name: torch.randint(50, (2, 4)) for name in managers}
        embeddings = {name: network({"ids": of_name}) for name, of_name in ids.items()}
        loss = handler.update_cache_and_compute_loss(
            network, torch.randn(2, 8), embeddings["web"], embeddings,
            {name: {"ids": of_name} for name, of_name in ids.items()},
            features={"ids": ids["web"]},
        )  # fmt: skip
    with pytest.raises(KeyError, match=r"new_item_features must have 'books', got \['web'\]"):
        handler.update_cache_and_compute_loss(
            network, torch.randn(2, 8), embeddings["web"], embeddings, {"web": {"ids": ids["web"]}}
        )
    with pytest.raises(KeyError, match=r"new_item_features\['web'\] must have 'ids', got \[\]"):
        handler.update_cache_and_compute_loss(
            network, torch.randn(2, 8), embeddings["web"], embeddings, {"web": {}, "books": {}}
        )
    loss.backward()
    assert {name: int(cache.valid.sum()) for name, cache in handler.cache.items()} == {
        "web": 6,
        "books": 8,
    }


@pytest.mark.parametrize("way", ["state_dict", "safetensors", "sharded"])
def test_resume_bit_for_bit(way, tmp_path):
    """Check that a restored cache and generator give the steps of an uninterrupted run."""
    handler, network = tower_handler()
    for number in range(3):
        step(handler, network, number)
    resumed, _ = tower_handler(seed=99)
    if way == "state_dict":
        resumed.load_state_dict(copy.deepcopy(handler.state_dict()))
    elif way == "safetensors":
        save_file(handler.state_dict(), tmp_path / "handler.safetensors")
        resumed.load_state_dict(load_file(tmp_path / "handler.safetensors"))
    else:
        save_sharded(handler, tmp_path)
        load_sharded(resumed, tmp_path)
    for number in range(3, 7):
        assert torch.equal(step(resumed, network, number), step(handler, network, number))
    ours, theirs = resumed.state_dict(), handler.state_dict()
    assert "cache_loss.retrieval_fn.rng.state" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_handler_in_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.handler, self.network = tower_handler()

    model = Model()
    assert "handler.caches.cache.data.embedding" in model.state_dict()
    assert [name for name, _ in model.named_parameters()] == ["network.words.weight"]
    model.double()
    assert model.handler.cache.data["embedding"].dtype == torch.float64
    step(model.handler, model.network, 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("storage", ["device", "pinned"])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"num_negatives": 2}, {"exclude": "ids"}])
def test_gpu_steps_are_those_of_the_cpu(storage, options):
    """Check that the handler moves to the queries' device, and draws as on the CPU."""
    both = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        loss = CacheClassificationLoss(**KEYS, **options)
        handler = CacheLossHandler(tower_manager(20, storage=storage), loss, **KEYS)
        network = Tower().to(device)
        torch.manual_seed(4)
        results = []
        for _ in range(5):
            queries, positives = torch.randint(50, (2, 5, 4)).to(device)
            results.append(
                handler.update_cache_and_compute_loss(
                    network, network({"ids": queries}), network({"ids": positives}),
                    {"ids": positives},
                ).item()
            )  # fmt: skip
        both.append((results, handler.cache.data["ids"].cpu(), handler.cache.age.cpu()))
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-4, abs=1e-5)
    assert torch.equal(both[0][1], both[1][1])
    assert torch.equal(both[0][2], both[1][2])


def test_pinned_storage_gives_the_same_steps():
    """Check that tiles of pinned embeddings give the steps of whole embeddings, also on a CPU."""
    results = []
    for storage in ("device", "pinned"):
        torch.manual_seed(3)
        handler = CacheLossHandler(
            tower_manager(20, storage=storage), CacheClassificationLoss(**KEYS), **KEYS
        )
        network = Tower()
        results.append([step(handler, network, number).item() for number in range(5)])
    assert results[0] == results[1]


def test_missing_features():
    handler, network = tower_handler()
    embeddings = torch.zeros(2, 8)
    with pytest.raises(KeyError, match=r"features must have 'ids', got \['id'\]"):
        handler.update_cache_and_compute_loss(network, embeddings, embeddings, {"id": embeddings})
    assert not handler.cache.valid.any()
