import pytest
import torch
import typer
from typer.testing import CliRunner

from examples.docstrings.__main__ import demo
from tests.tiny_models import masked_lm_configs, save_checkpoint


@pytest.fixture
def run_demo():
    """Return a function that runs the demo in this process, with its number of threads."""
    app = typer.Typer()
    app.command()(demo)
    threads = torch.get_num_threads()
    yield lambda *arguments: CliRunner().invoke(app, [f"--threads={threads}", *map(str, arguments)])
    torch.set_num_threads(threads)


def test_a_corpus_of_ones_own_with_judgements(run_demo, tmp_path):
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
    assert finished.exit_code == 0, finished.output
    for shown in ("fox jumps", "MRR@10", "BM25", "sentence-transformers", "All vectors agree"):
        assert shown in finished.stdout
    assert (tmp_path / "plots" / "pruning.png").stat().st_size > 0


def test_bad_arguments_exit_with_2(run_demo, tmp_path):
    finished = run_demo("--corpus", tmp_path / "missing.tsv")
    assert finished.exit_code == 2
    assert "no such file" in finished.stderr
