"""The studies of training, on made numbers and on a tiny checkpoint."""

import pytest

from benchmarks import studies
from benchmarks.harness.timing import QUICK, Rounds
from benchmarks.studies import cache_training
from benchmarks.studies import training as study
from examples.docstrings.corpus import Pair
from examples.docstrings.training_cost import StepCost
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

COSTS = {
    "splade_fast": StepCost([1.0, 2.0, 3.0], [3.0, 2.0], 100.0),
    "pytorch": StepCost([5.0, 6.0, 7.0], [3.0, 2.5], 900.0),
}
BATCHES = {"splade_fast": 64, "pytorch": 8}


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")


def test_measurements_of_a_loss():
    found = study.to_measurements("in_batch", COSTS, BATCHES, 2048)
    values = {(m.contender, m.quantity, m.size): m for m in found}
    assert len(values) == len(found)
    seconds = values["splade_fast", "time per step", None]
    assert (seconds.p25, seconds.value, seconds.p75, seconds.rounds) == (1, 2, 3, 3)
    assert values["pytorch", "largest batch in 2 GiB", None].value == 8
    assert values["pytorch", "loss", 2].value == 2.5
    assert values["pytorch", "peak memory", None].value == 900
    ratio = values["splade_fast", "times faster", None]
    assert (ratio.value, ratio.verdict) == (3, ">= 3: met")
    assert values["splade_fast", "times smaller", None].value == 9
    assert values["splade_fast", "largest difference of a loss", None].value == 0.5


def test_the_whole_study_on_a_tiny_model(checkpoint, monkeypatch):
    """The trainings themselves run in tests/examples/test_training_cost.py."""
    pairs = [Pair(f"p.m{i}.f", word, " ".join(WORDS * 10)) for i, word in enumerate(WORDS)]
    settings = []

    def step_cost(setting, model, given):
        assert model == str(checkpoint)
        assert {*given} <= {*pairs}
        settings.append(setting)
        return COSTS[setting.contender]

    monkeypatch.setattr(study, "fetched", lambda demo: checkpoint)
    monkeypatch.setattr(study, "docstring_pairs", lambda: pairs)
    monkeypatch.setattr(study, "step_cost", step_cost)
    monkeypatch.setattr(
        study, "batch_within", lambda limit, setting, *_: BATCHES[setting.contender]
    )
    measurements = studies.load("training", QUICK)
    assert [*measurements] == [*study.LOSSES]
    for loss, measure in measurements.items():
        assert measure() == study.to_measurements(loss, COSTS, BATCHES, 4096)
    assert [(s.loss, s.contender) for s in settings] == [
        (loss, contender) for loss in study.LOSSES for contender in COSTS
    ]


def test_the_cache_share_of_a_training_step(checkpoint, monkeypatch):
    pairs = [Pair(f"{i}", " ".join(WORDS[i : i + 3]), " ".join(WORDS[i:])) for i in range(6)]
    monkeypatch.setattr(cache_training, "fetched", lambda demo: checkpoint)
    monkeypatch.setattr(cache_training, "docstring_pairs", lambda: pairs)
    for name, value in {"BATCH": 3, "SLOTS": 10, "ENCODED": 4}.items():
        monkeypatch.setattr(cache_training, name, value)
    (measure,) = studies.load("cache_training", Rounds(2, 0)).values()
    found = measure()
    parts = {m.subject: m.value for m in found if m.unit == "ms"}
    assert 0 < parts["update"] < parts["cache"] < parts["step"]
    shares = {m.subject: m.value for m in found if m.unit == "%"}
    assert set(shares) == {"cache", "update", "drawn documents"}
    assert 0 < shares["update"] < shares["cache"] < 100
