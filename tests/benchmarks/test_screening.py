"""The study of screening on tiny inputs."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness.timing import QUICK
from benchmarks.inputs.trained_states import (
    TrainedInputs,
    bias_for_share,
    largest_logits,
    random_inputs,
)
from benchmarks.studies import screening
from splade_fast import splade_head
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

TEXTS = [" ".join(WORDS[: 2 + i]) for i in range(6)]


def biased(hidden: torch.Tensor, weight: torch.Tensor) -> TrainedInputs:
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    bias = torch.full((len(weight),), bias_for_share(largest_logits(hidden, mask, weight), 0.01))
    return TrainedInputs("random", hidden, mask, weight, bias)


def test_every_active_entry_survives() -> None:
    inputs = biased(torch.randn(4, 12, 96) + 5 * torch.randn(96), torch.randn(400, 96))
    report = screening.screened(inputs)
    assert report.pooled.equal(
        splade_head(inputs.hidden, inputs.weight, inputs.bias, algorithm="dense")
    )
    active = int((report.pooled > 0).sum())
    assert 0 < active <= report.pairs <= report.compared


def test_crossing_lies_between_the_points_where_the_ratio_passes_1() -> None:
    assert screening.crossing([(0.01, 0.5), (0.04, 2.0), (0.5, 9.0)]) == pytest.approx(0.02)
    assert screening.crossing([(0.01, 0.5), (1.0, 0.9)]) is None
    assert screening.crossing([(0.01, 1.5), (1.0, 2.0)]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sweep_finds_times_and_survivors_at_every_share(dtype: torch.dtype) -> None:
    found = screening.sweep(random_inputs(16), dtype, (0.01, 0.5), QUICK)
    times = [m for m in found if m.quantity == "time"]
    assert [m.contender for m in times] == [*screening.ALGORITHMS] * 2
    assert [m.size for m in times[::3]] == [0.01, 0.5]
    pairs = [m.value for m in found if m.quantity == "surviving pairs"]
    assert 0 < pairs[0] < pairs[1] <= 100
    declines = sum(m.value for m in found if m.quantity == "declines")
    assert declines == sum(m.quantity == "overhead over dense" for m in found)


def test_the_int8_weight_is_measured() -> None:
    time, memory = screening.prepare(random_inputs(16), torch.float32, QUICK)
    assert time.value > 0
    assert 0.25 < memory.value < 2.0


def test_preparation_is_measured_beside_a_training_step(tmp_path: Path) -> None:
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    alone, step, share = screening.prepare_in_training(folder, TEXTS, 16, QUICK)
    assert (alone.contender, step.contender) == ("preparation", "training step")
    assert share.value == pytest.approx(100 * alone.value / step.value)


def test_all_measurements_have_a_name() -> None:
    names = list(screening.measurements(QUICK))
    assert names[:2] == ["sweep, D 128, float32", "prepare, D 128, float32"]
    assert len(names) == 2 * len(screening.DIMS) * len(screening.DTYPES) + 1
