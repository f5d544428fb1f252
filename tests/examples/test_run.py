import subprocess
import sys

import pytest

from tests.tiny_models import masked_lm_configs, save_checkpoint


def run_demo(*arguments):
    command = [sys.executable, "-m", "examples.docstrings", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_corpus_of_ones_own_with_judgements(tmp_path):
    pytest.importorskip("bm25s")
    pytest.importorskip("sentence_transformers")
    model = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    (tmp_path / "corpus.tsv").write_text("d1\tquick brown fox\nd2\tlazy dog\nd3\told tree\n")
    (tmp_path / "queries.tsv").write_text("q1\tfox jumps\nq2\tthe dog\n")
    (tmp_path / "qrels.txt").write_text("q1 0 d1 1\nq2 0 d2 1\n")
    finished = run_demo(
        *("--model", model, "--corpus", tmp_path / "corpus.tsv"),
        *("--queries", tmp_path / "queries.tsv", "--qrels", tmp_path / "qrels.txt"),
        *("--plot", tmp_path / "plots" / "pruning.png"),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for shown in ("fox jumps", "MRR@10", "BM25", "sentence-transformers", "All vectors agree"):
        assert shown in finished.stdout
    assert (tmp_path / "plots" / "pruning.png").stat().st_size > 0


def test_bad_arguments_exit_with_2(tmp_path):
    finished = run_demo("--corpus", tmp_path / "missing.tsv")
    assert finished.returncode == 2
    assert "no such file" in finished.stderr
