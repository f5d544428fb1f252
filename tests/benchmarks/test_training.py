"""The study of what the ops buy in training, on made numbers and on a tiny checkpoint."""

import pytest

from benchmarks.harness.facts import recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv, write_csv
from benchmarks.studies.training import __main__ as study
from benchmarks.studies.training.facts import Fact, findings_of, format_findings
from benchmarks.studies.training.plots import draw
from examples.docstrings.corpus import Pair
from examples.docstrings.training_cost import StepCost
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

COSTS = {
    "splade_fast": StepCost([1.0, 2.0, 3.0], [3.0, 2.0], 100.0),
    "pytorch": StepCost([5.0, 6.0, 7.0], [3.0, 2.5], 900.0),
}


def test_findings():
    found = findings_of("in_batch", COSTS, {"splade_fast": 64, "pytorch": 8}, 2048)
    values = {(f.contender, f.quantity, f.step): f for f in found}
    assert len(values) == len(found)
    assert values["splade_fast", "seconds per step", 0].value == 2
    assert values["pytorch", "largest batch in 2 GiB", 0].value == 8
    assert values["pytorch", "loss", 2].value == 2.5
    ratio = values["plain PyTorch over ours", "seconds per step", 0]
    assert (ratio.value, ratio.verdict) == (3, ">= 3: met")
    assert values["plain PyTorch over ours", "peak", 0].value == 9
    assert values["largest difference", "loss", 0].value == 0.5
    assert "nats" in format_findings(found)
    assert len(format_findings(found).splitlines()) == len(found) - 4  # the losses of the steps


def test_facts_come_back_and_are_drawn(tmp_path):
    facts = recorded(findings_of("in_batch", COSTS, {}, 0), Fact, Machine.current("cpu"))
    write_csv(facts, Fact, tmp_path / "training-cpu.csv")
    again = read_csv(Fact, tmp_path / "training-cpu.csv")
    assert format_findings(again) == format_findings(facts)
    draw(again, tmp_path / "training-cpu.csv")
    assert (tmp_path / "training-cpu.svg").stat().st_size > 0


def test_the_whole_study_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    model = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    pairs = [Pair(f"p.m{i}.f", word, " ".join(WORDS * 10)) for i, word in enumerate(WORDS)]
    monkeypatch.setattr(study, "docstring_pairs", lambda: pairs)
    options = ["--steps=3", "--batch-size=4", "--cache-size=8", "--memory=0"]
    assert study.main([f"--model={model}", f"--out={tmp_path}", *options]) == 0
    facts = read_csv(Fact, tmp_path / "training-cpu.csv")
    assert {fact.loss for fact in facts} == set(study.LOSSES)
    assert "plain PyTorch over ours" in capsys.readouterr().out
    assert study.main([f"--out={tmp_path}", "--report"]) == 0
