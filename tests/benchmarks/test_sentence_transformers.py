"""The study of the accelerated SparseEncoder on tiny models."""

import pytest
import torch

from benchmarks.harness.timing import QUICK
from benchmarks.studies import sentence_transformers as study
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
    # Here instead of in a process of its own, which would not see what is patched.
    threads = torch.get_num_threads()
    monkeypatch.setattr(study, "measure_peak", lambda load, *what: load.peak(*what, threads))


def test_all_works_are_measured(monkeypatch):
    monkeypatch.setattr(study, "SETTINGS", {"demo": TINY["demo"]})
    found = [m for measure in study.measurements(QUICK).values() for m in measure()]
    assert {(m.part, m.dtype) for m in found} == {
        (work, dtype) for work in study.WORKS for dtype in ("float32", "bfloat16")
    }
    exact = [m for m in found if m.quantity == "largest difference" and m.dtype == "float32"]
    assert len(exact) == 1
    assert exact[0].value < 1e-5
    faster = {(m.part, m.contender) for m in found if m.quantity == "times faster"}
    assert faster == {(w, v) for w in study.WORKS for v in (workloads.OURS, workloads.BODY)}


def test_random_model_is_as_sparse_as_a_trained_one():
    encoders = workloads.Workload(TINY["xlm-roberta"], torch.float32).encoders()
    vectors = encoders[workloads.OURS].encode([" ".join(WORDS[:4])], show_progress_bar=False)
    assert vectors.shape == (1, 250_002)
    assert 0 < vectors._nnz() < 0.2 * 250_002
