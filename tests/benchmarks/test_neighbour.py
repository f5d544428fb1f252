"""The study of a busy neighbour, with a tiny model."""

import pytest
import torch

import splade_fast as sf
from benchmarks.harness.timing import QUICK
from benchmarks.inputs.trained_states import random_inputs
from benchmarks.studies import neighbour
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint


def test_losses_are_ratios_of_the_times(monkeypatch, tmp_path):
    model = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    monkeypatch.setattr(
        neighbour, "load_encoder", lambda: sf.SpladeEncoder.from_pretrained(str(model))
    )
    monkeypatch.setattr(neighbour, "load_texts", lambda: [" ".join(WORDS[i:]) for i in range(4)])
    monkeypatch.setattr(neighbour, "load_inputs", lambda: random_inputs(64))
    threads = torch.get_num_threads()
    rows = neighbour.measurements(QUICK)["2 threads"]()
    assert torch.get_num_threads() == threads
    found = {(row.contender, row.quantity): row for row in rows}
    names = ("encode", "transformer", "head", "bare product")
    losses = {name: found[name, "loss"].value for name in names}
    for name in names:
        assert losses[name] == pytest.approx(
            found[name, "beside it"].value / found[name, "alone"].value
        )
    assert found["head", "loss"].at_most == pytest.approx(1.1 * losses["bare product"])
    assert found["encode", "loss"].at_most >= 1.1 * losses["bare product"]
    assert found["transformer", "loss"].at_most is None
