import pytest

from examples.docstrings.corpus import Pair
from examples.docstrings.training_cost import (
    CONTENDERS,
    LENGTH,
    Setting,
    StepCost,
    largest_batch,
    long_pairs,
    loss_difference,
    step_cost,
)
from tests.tiny_models import WORDS, make_tokenizer, masked_lm_configs, save_checkpoint

TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
PAIRS = [Pair(f"m{i}", WORDS[i], text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    return str(save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("m") / "bert"))


@pytest.mark.parametrize(
    "loss", ["negative_cache", pytest.param("in_batch", marks=pytest.mark.exhaustive)]
)
def test_both_contenders_compute_the_same_losses(checkpoint, loss):
    costs = {
        contender: step_cost(
            Setting(contender, loss, batch_size=4, steps=4, cache_size=16), checkpoint, PAIRS
        )
        for contender in CONTENDERS
    }
    assert loss_difference(costs) < 1e-4
    for cost in costs.values():
        assert len(cost.losses) == 4
        assert len(cost.seconds) == 3
        assert min(cost.seconds) <= cost.median_seconds <= max(cost.seconds)
        assert cost.peak_mib > 0


def test_failures_carry_the_error(checkpoint):
    with pytest.raises(RuntimeError, match="splade_fast failed"):
        step_cost(Setting("splade_fast", "no such loss"), checkpoint, PAIRS)


def test_loss_difference():
    costs = {
        name: StepCost([1.0], losses, 1.0) for name, losses in {"a": [1, 2], "b": [1, 5]}.items()
    }
    assert loss_difference(costs) == 3


@pytest.mark.parametrize("limit", [50, 100, 777, 4096, 10**6])
@pytest.mark.parametrize("curve", [lambda b: 30 + 7 * b, lambda b: 30 + 0.02 * b * b])
def test_largest_batch(limit, curve):
    tried = []

    def measured(batch):
        tried.append(batch)
        return curve(batch)

    found = largest_batch(measured, limit, {8: curve(8), 32: curve(32)}, largest=1000)
    assert found in {*tried, 8, 32, 0}
    assert found == 0 or curve(found) <= limit
    assert found + max(1, found // 8) >= 1000 or curve(found + max(1, found // 8)) > limit
    assert len(tried) == len(set(tried)) <= 8


def test_no_batch_fits():
    assert largest_batch(lambda batch: 100.0 + batch, 50, {1: 101.0, 2: 102.0}, largest=9) == 0


def test_documents_that_fill_a_row():
    pairs = [Pair("a", "q", "fox " * (LENGTH - 2)), Pair("b", "q", "fox " * (LENGTH - 3))]
    assert long_pairs(pairs, make_tokenizer()) == pairs[:1]
