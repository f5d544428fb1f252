"""The study of inference engines measures all contenders that are installed."""

import multiprocessing

import pytest

from benchmarks.harness.timing import QUICK
from benchmarks.studies import engines
from benchmarks.studies.engines import processes
from examples.docstrings.corpus import Pair
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A tiny model and a few texts in place of the real ones."""
    model = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    pairs = [
        Pair(f"m{number}.f", word, " ".join(WORDS[number:])) for number, word in enumerate(WORDS)
    ]
    monkeypatch.setattr(engines, "_model", lambda: str(model))
    monkeypatch.setattr(engines, "docstring_pairs", lambda: pairs)
    monkeypatch.setattr(engines, "held_out_pairs", lambda: pairs)
    # A forked process need not import torch again, and has the tiny model and few contenders.
    monkeypatch.setattr(processes, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(engines, "_folder", lambda: tmp_path)
    for name in ("splade_fast, compiled", *(n for n in engines.CONTENDERS if "OpenVINO" in n)):
        monkeypatch.delitem(engines.CONTENDERS, name)


def test_all_installed_engines_are_measured(small, capsys):
    measurements = engines.measurements(QUICK)
    found = [row for measure in measurements.values() for row in measure()]
    contenders = {row.contender for row in found}
    assert {"splade_fast", "SparseEncoder", "accelerate(SparseEncoder)"} <= contenders
    quantities = {row.quantity for row in found if row.contender == "splade_fast"}
    assert quantities == {"largest difference", "MRR@10", "documents/s", "p50", "p99"}
    for row in found:
        if row.quantity == "largest difference" and "int8" not in row.contender:
            assert row.value < 1e-4, row
    missing = set(engines.CONTENDERS) - contenders
    shown = capsys.readouterr().out
    assert all(f"without {name}: " in shown for name in missing)
