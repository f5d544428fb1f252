"""The study of the accelerated SparseEncoder on tiny models."""

import pytest
import torch

from benchmarks.harness.results import read_csv
from benchmarks.studies.screening.facts import Fact
from benchmarks.studies.sentence_transformers import __main__ as study
from benchmarks.studies.sentence_transformers import workloads
from benchmarks.studies.sentence_transformers.workloads import Setting
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

TINY = {
    "demo": Setting("tiny", 16, None, 6, 2, 2, 16),
    "xlm-roberta": Setting("random", 64, 1, 2, 2, 2, 8),
}


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    texts = [" ".join(WORDS[: 2 + i]) for i in range(6)]
    monkeypatch.setattr(workloads, "fetched", lambda checkpoint: folder)
    monkeypatch.setattr(workloads, "sample_texts", lambda count: texts[:count])
    monkeypatch.setattr(study, "SETTINGS", TINY)
    # Here instead of in a process of its own, which would not see what is patched.
    threads = torch.get_num_threads()
    monkeypatch.setattr(study, "_peak", lambda load, *what: load.peak(*what, threads))


def test_all_works_are_measured(tmp_path):
    threads = torch.get_num_threads()
    arguments = ["--models", "demo", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert study.main([*arguments, "--threads", str(threads)]) == 0
    facts = read_csv(Fact, tmp_path / "sentence_transformers-cpu.csv")
    assert {(fact.study, fact.dtype) for fact in facts} == {
        (work, dtype) for work in study.WORKS for dtype in study.DTYPES
    }
    exact = [f for f in facts if f.quantity == "largest difference" and f.dtype == "float32"]
    assert len(exact) == 1
    assert exact[0].value < 1e-5
    faster = {(f.study, f.variant) for f in facts if f.quantity == "times faster"}
    assert faster == {(w, v) for w in study.WORKS for v in (workloads.OURS, workloads.BODY)}


def test_random_model_is_as_sparse_as_a_trained_one():
    encoders = workloads.Workload(TINY["xlm-roberta"], torch.float32).encoders()
    vectors = encoders[workloads.OURS].encode([" ".join(WORDS[:4])], show_progress_bar=False)
    assert vectors.shape == (1, 250_002)
    assert 0 < vectors._nnz() < 0.2 * 250_002
