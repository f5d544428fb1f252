"""Inputs of a trained model, and the study of screening on tiny ones."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.cases.head_trained import TrainedHeadCase
from benchmarks.harness.case import UnavailableError
from benchmarks.harness.facts import merged, recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv, write_csv
from benchmarks.inputs import trained
from benchmarks.inputs.trained import TrainedInputs, bias_for_share, largest_logits, random_inputs
from benchmarks.studies.screening import encode, prepare, sweep
from benchmarks.studies.screening.__main__ import main
from benchmarks.studies.screening.emulation import REMEDIES, rotated, rounded_inputs
from benchmarks.studies.screening.facts import Fact, Finding, in_order
from benchmarks.studies.screening.kernel import screened
from benchmarks.studies.screening.survivors import survivors
from examples.docstrings.checkpoint import CheckpointError, WheelCheckpoint
from splade_fast import splade_head
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

TEXTS = [" ".join(WORDS[: 2 + i]) for i in range(6)]
FINDING = Finding(
    study="sweep",
    model="m",
    dim=8,
    dtype="float32",
    variant="auto",
    quantity="overhead over dense",
    value=7.5,
    unit="%",
    at_most=5,
)


def biased(hidden: torch.Tensor, weight: torch.Tensor) -> TrainedInputs:
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    bias = torch.full((len(weight),), bias_for_share(largest_logits(hidden, mask, weight), 0.01))
    return TrainedInputs("random", hidden, mask, weight, bias)


def with_mean() -> TrainedInputs:
    return biased(torch.randn(4, 12, 96) + 5 * torch.randn(96), torch.randn(400, 96))


def with_outliers() -> TrainedInputs:
    hidden = torch.randn(4, 12, 96)
    hidden[..., 7] *= 30
    return biased(hidden, torch.randn(400, 96))


# Inputs ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")


def test_states_are_made_once_and_are_those_of_the_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = WheelCheckpoint("some==1", "model", "0")
    monkeypatch.setattr(WheelCheckpoint, "fetch", lambda self, cache: tiny_checkpoint)
    monkeypatch.setattr(trained, "sample_texts", lambda count, cache: TEXTS)
    monkeypatch.setitem(trained._MODELS, 16, (some, trained._splade))
    monkeypatch.setitem(trained._NAMES, 16, "tiny")
    inputs = trained.trained_inputs(16, tmp_path)
    assert inputs.hidden.shape == (6, 9, 16)
    assert inputs.mask.sum(1).tolist() == [4, 5, 6, 7, 8, 9]
    weights = load_file(tiny_checkpoint / "model.safetensors")
    assert inputs.bias.equal(weights["cls.predictions.bias"])
    monkeypatch.setitem(trained._MODELS, 16, (some, None))
    again = trained.trained_inputs(16, tmp_path)
    assert again.hidden.equal(inputs.hidden)


@pytest.mark.parametrize("make", [trained._minilm, trained._widened_minilm])
def test_decoders_of_word_embeddings_leave_few_entries_active(make, tiny_checkpoint: Path) -> None:
    tensors = make(tiny_checkpoint, TEXTS)
    wide = 2 if make is trained._widened_minilm else 1
    assert tensors["hidden"].shape == (6, 9, 16 * wide)
    assert tensors["weight"].shape[1] == 16 * wide
    pooled = largest_logits(tensors["hidden"], tensors["mask"], tensors["weight"])
    assert 0 <= (pooled + tensors["bias"] > 0).sum() <= 1


def test_a_checkpoint_that_cannot_be_fetched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self, cache):
        raise CheckpointError("no network")

    monkeypatch.setattr(WheelCheckpoint, "fetch", fail)
    with pytest.raises(UnavailableError, match="no network"):
        trained.trained_inputs(128, tmp_path)


def test_only_the_first_documents_and_their_positions() -> None:
    inputs = random_inputs(8)
    last = dataclasses.replace(inputs, hidden=inputs.hidden.flip(0), mask=inputs.mask.flip(0))
    first = last.first(2)
    assert first.hidden.shape == (2, 9, 8)
    assert first.tokens.equal(last.tokens[:14])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 1.0])
def test_the_bias_leaves_the_share_active(share: float) -> None:
    pooled = torch.randn(4, 5000)
    active = (pooled + bias_for_share(pooled, share) > 0).float().mean().item()
    assert active == pytest.approx(share, abs=1e-4)


def test_a_training_step_changes_the_weight() -> None:
    workload = TrainedHeadCase(direction="forward+backward", dtype=torch.float32, device="cpu")
    built = workload.tiny().build()
    weight = built.leaves["weight"]
    version, before = weight._version, weight.detach().clone()
    built.clear_gradients()
    assert weight._version > version
    assert weight.equal(before)


# Survivors ---------------------------------------------------------------------------------------


def test_rotation_keeps_products_and_spreads_outliers() -> None:
    inputs = with_outliers().to(torch.float64)
    tokens, weight = inputs.tokens, inputs.weight
    torch.testing.assert_close(rotated(tokens) @ rotated(weight).T, tokens @ weight.T)
    assert rotated(tokens).abs().amax(1).mean() < 0.5 * tokens.abs().amax(1).mean()


@pytest.mark.parametrize("remedy", REMEDIES)
def test_no_product_leaves_its_bound(remedy: str) -> None:
    for inputs in (with_mean().to(torch.float64), with_outliers().to(torch.float64)):
        tokens, weight, shift = rounded_inputs(inputs, remedy)
        error = tokens.rounded @ weight.rounded.T + shift
        error -= inputs.tokens @ inputs.weight.T + inputs.bias
        bound = tokens.residual[:, None] * weight.norm
        bound += tokens.norm_of_rounded[:, None] * weight.residual
        assert error.abs().max() > 0
        assert (error.abs() <= bound * (1 + 1e-9)).all()


def test_remedies_make_the_bound_tight_where_they_should() -> None:
    bounds = {
        remedy: (survivors(with_mean(), remedy)[0], survivors(with_outliers(), remedy)[0])
        for remedy in REMEDIES
    }
    assert bounds["centring"][0] < 0.7 * bounds["none"][0]
    assert bounds["rotation"][1] < 0.7 * bounds["none"][1]


@pytest.mark.parametrize("remedy", REMEDIES)
def test_every_active_entry_survives(remedy: str) -> None:
    inputs = with_mean()
    report = screened(inputs)
    assert report.pooled.equal(
        splade_head(inputs.hidden, inputs.weight, inputs.bias, algorithm="dense")
    )
    active = int((report.pooled > 0).sum())
    _, entries, pairs = survivors(inputs, remedy)
    assert active > 0
    assert active <= min(entries, pairs, report.pairs)
    assert report.compared >= report.pairs


# The studies -------------------------------------------------------------------------------------


def test_crossing_lies_between_the_points_where_the_ratio_passes_1() -> None:
    assert sweep.crossing([(0.01, 0.5), (0.04, 2.0), (0.5, 9.0)]) == pytest.approx(0.02)
    assert sweep.crossing([(0.01, 0.5), (1.0, 0.9)]) is None
    assert sweep.crossing([(0.01, 1.5), (1.0, 2.0)]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sweep_finds_times_and_survivors_at_every_share(dtype: torch.dtype) -> None:
    found = sweep.study(random_inputs(16), dtype, (0.01, 0.5), 3, 1.0)
    times = [f for f in found if f.quantity == "median"]
    assert [f.variant for f in times] == [*sweep.ALGORITHMS] * 2
    assert [f.active for f in times[::3]] == pytest.approx([0.01, 0.5], abs=0.005)
    pairs = [f.value for f in found if f.quantity == "surviving pairs"]
    assert 0 < pairs[0] < pairs[1] <= 100
    declines = sum(f.value for f in found if f.quantity == "declines")
    assert declines == sum(f.quantity == "overhead over dense" for f in found)


def test_preparation_is_measured_beside_a_training_step(tiny_checkpoint: Path) -> None:
    found = prepare.study_of_training(tiny_checkpoint, TEXTS, 16, 3, 1.0)
    step, alone, share = found
    assert (step.variant, alone.variant) == ("training step", "preparation")
    assert share.value == pytest.approx(100 * alone.value / step.value)


def test_encoding_stage_by_stage_and_beside_its_peer(tiny_checkpoint: Path) -> None:
    pytest.importorskip("sentence_transformers")
    found = encode.study(
        tiny_checkpoint, TEXTS, k=3, batch_size=4, max_length=16, rounds=3, seconds=1.0
    )
    values = {(f.variant, f.quantity): f.value for f in found}
    for variant in encode.ALGORITHMS:
        shares = [values[variant, f"{stage}, share"] for stage in encode.STAGES]
        assert min(shares) > 0
        assert sum(shares) == pytest.approx(100)
    for kept in ("all entries", "k=3"):
        assert values[f"splade_fast, {kept}", "max difference"] <= encode.MAX_DIFFERENCE
        assert values[f"sentence-transformers, {kept}", "documents/s"] > 0


def test_findings_say_whether_targets_are_met() -> None:
    assert FINDING.verdict == "<= 5: missed"
    assert dataclasses.replace(FINDING, value=5.0).verdict == "<= 5: met"
    assert dataclasses.replace(FINDING, at_most=None, at_least=8).verdict == ">= 8: missed"


def test_new_facts_replace_those_of_their_group(tmp_path: Path) -> None:
    machine = Machine.current("cpu")
    other = dataclasses.replace(FINDING, dtype="bfloat16", active=0.25)
    old = recorded([FINDING, other, other], Fact, machine)
    new = recorded([dataclasses.replace(FINDING, value=1.0)], Fact, machine)
    facts = merged(old, new, in_order)
    assert facts == [*new, *old[1:]]
    write_csv(facts, Fact, tmp_path / "facts.csv")
    assert read_csv(Fact, tmp_path / "facts.csv") == facts


def test_quick_run_keeps_numbers_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    common = ["--out", str(tmp_path), "--threads", str(torch.get_num_threads()), "--quick"]
    measuring = ["--repeats", "3", "--dtype", "float32"]
    assert main([*common, *measuring]) == 0
    studies = {fact.study for fact in read_csv(Fact, tmp_path / "screening-cpu-quick.csv")}
    assert studies == {"survivors", "sweep", "sizes", "prepare"}
    for study in ("survivors", "sweep"):
        assert (tmp_path / f"screening-{study}-cpu-quick.svg").stat().st_size > 0
    capsys.readouterr()
    assert main([*common, "--report"]) == 0
    assert "surviving pairs per document" in capsys.readouterr().out


def test_unknown_study_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nosuchstudy"])
    assert "nosuchstudy" in capsys.readouterr().err
