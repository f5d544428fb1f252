import math

import pytest

from examples.docstrings import scratch
from examples.docstrings.corpus import Pair, docstring_pairs
from examples.docstrings.task import Task, docstring_task, held_out_evaluator
from examples.docstrings.training import (
    FINE_TUNING,
    Progress,
    module_name,
    plot,
    split_pairs,
    train,
)
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.texts import Texts
from splade_fast.training import RetrievalEvaluator
from tests.tiny_models import WORDS, make_model, make_tokenizer, masked_lm_configs, save_checkpoint

PAIRS = [
    Pair(f"package.module{i % 30}.function{i}", f"query {i}", f"document {i}") for i in range(300)
]


def word_pairs():
    """Return pairs whose query is the only word of their document."""
    return [Pair(f"package.{word}.f", word, f"{word} {word}") for word in WORDS]


def make_encoder():
    config = masked_lm_configs()["bert"]
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.initializer_range = 0.1
    return SpladeEncoder(make_model(config), make_tokenizer())


def test_no_module_is_on_both_sides():
    split = split_pairs(PAIRS, share=0.3)
    modules = [{module_name(pair) for pair in side} for side in (split.training, split.held_out)]
    assert not modules[0] & modules[1]
    assert all(modules)
    assert sorted(split.training + split.held_out, key=PAIRS.index) == PAIRS
    assert module_name(Pair("torch.nn.modules.linear.Linear", "q", "d")) == "torch.nn"


def test_the_split_does_not_depend_on_other_modules():
    whole, part = split_pairs(PAIRS, share=0.3), split_pairs(PAIRS[::7], share=0.3)
    assert set(part.held_out) <= set(whole.held_out)
    assert set(part.training) <= set(whole.training)


def test_real_pairs_share_no_document_across_the_split():
    split = split_pairs(docstring_pairs(("numpy", "networkx")), share=0.3)
    assert len(split.held_out) > 20
    assert len(split.training) > 20
    for text in ("query", "document"):
        sides = [
            {getattr(pair, text) for pair in side} for side in (split.training, split.held_out)
        ]
        assert not sides[0] & sides[1]


def test_the_task_asks_for_held_out_modules_only():
    task = docstring_task(PAIRS, None, num_queries=10)
    assert len(task.queries) == 10
    assert len(task.documents) == len(PAIRS)  # training documents are searched as well
    trained = {module_name(pair) for pair in task.training}
    for query_id, judged in task.qrels.items():
        [name] = judged
        number = int(name.partition("#")[2])
        assert task.queries.texts[task.queries.ids.index(query_id)] == PAIRS[number].query
        assert task.documents.texts[number] == PAIRS[number].document
        assert module_name(PAIRS[number]) not in trained


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    model = make_encoder()
    settings = FINE_TUNING | {
        "cache_size": 8,
        "cache_document_length": 16,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 5,
        "lambda_query": 0.0,
        "lambda_document": 0.0,
        "disable_tqdm": True,
    }
    return train(model, word_pairs(), 200, settings)


def test_training_lowers_the_loss(trained):
    assert [point.step for point in trained] == list(range(10, 201, 10))
    assert trained[-1].loss < 0.3 < 1 < trained[1].loss
    for point in trained:
        assert math.isfinite(point.loss)
        assert point.staleness is not None
        assert 0 < point.document_active_dims <= make_tokenizer().vocab_size


def test_progress_without_a_cache_has_no_staleness(tmp_path):
    pytest.importorskip("datasets")
    settings = FINE_TUNING | {"loss": "in_batch", "cache_size": 0, "disable_tqdm": True}
    progress = train(make_encoder(), word_pairs(), 2, settings | {"per_device_train_batch_size": 4})
    assert [point.staleness for point in progress] == [None]
    plot(progress, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 0


def test_plot(tmp_path):
    points = [Progress(step, 1 / step, 30.0, 100.0, 0.1) for step in (10, 20)]
    plot(points, tmp_path / "plots" / "training.png")
    assert (tmp_path / "plots" / "training.png").stat().st_size > 0


def test_scratch_starts_from_random_weights(tmp_path, monkeypatch, capsys):
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    made = scratch.random_encoder(folder)
    assert made.vocab_size == len(make_tokenizer())
    assert made.model.config.num_hidden_layers == 1
    monkeypatch.setattr(scratch, "docstring_pairs", lambda: PAIRS)
    monkeypatch.setattr(scratch, "demo_checkpoint", lambda: folder)
    scratch.demo(steps=2, num_queries=5, limit=None, threads=2, plot_file=tmp_path / "scratch.png")
    shown = capsys.readouterr().out
    assert "random weights" in shown
    assert "trained" in shown
    assert "BM25" in shown
    assert (tmp_path / "scratch.png").stat().st_size > 0


def test_held_out_queries_are_ranked_during_the_training():
    task = docstring_task(PAIRS, None, num_queries=10)
    evaluator = held_out_evaluator(task, 32)
    assert set(evaluator.corpus.ids) == {name for judged in task.qrels.values() for name in judged}
    assert all(
        evaluator.corpus.texts[evaluator.corpus.ids.index(name)]
        == task.documents.texts[task.documents.ids.index(name)]
        for name in evaluator.corpus.ids
    )
    model = make_encoder()
    settings = FINE_TUNING | {"loss": "in_batch", "cache_size": 0, "disable_tqdm": True}
    settings["per_device_train_batch_size"] = 4
    progress = train(model, word_pairs(), 20, settings, evaluator=evaluator)
    assert [point.step for point in progress if point.mrr is not None] == [10, 20]
    assert progress[-1].mrr == evaluator(model)["MRR@10"]


def test_the_demo_shows_what_training_changed(tmp_path, capsys):
    pytest.importorskip("datasets")
    main = pytest.importorskip("examples.docstrings.__main__")
    pairs = word_pairs()[: len(WORDS)]
    documents = Texts([pair.name for pair in pairs], [pair.document for pair in pairs])
    queries = Texts(["q"], [pairs[0].query])
    evaluator = RetrievalEvaluator(queries, documents, {"q": {pairs[0].name: 1}})
    task = Task(documents, queries, evaluator.qrels, [], pairs)
    before = {"BM25": {"MRR@10": 0.5}}
    main._fine_tune(make_encoder(), task, evaluator, before, 2, tmp_path / "training.png")
    shown = capsys.readouterr().out
    assert "BM25" in shown
    assert "SPLADE, after" in shown
    assert (tmp_path / "training.png").stat().st_size > 0
