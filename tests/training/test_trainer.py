"""SpladeTrainer: logs, accumulation, evaluation and saved models."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM, EarlyStoppingCallback, TrainerCallback
from transformers.integrations import integration_utils

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.search.texts import DataError, Texts
from splade_fast.training import (
    ObjectiveArguments,
    RetrievalEvaluator,
    SpladeTrainer,
    SpladeTrainingArguments,
    TrainingModel,
    load_training_data,
)
from tests.adapters import WAYS, with_adapters
from tests.tiny_models import WORDS
from tests.training.runs import CACHE, checkpoint_in, make_trainer, write_pairs

METRICS = {
    "relevance_loss",
    "query_regularizer",
    "document_regularizer",
    "query_active_dims",
    "document_active_dims",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """A checkpoint without dropout."""
    return checkpoint_in(tmp_path_factory.mktemp("steady"), dropout=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return load_training_data(write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", 24))


@pytest.fixture(scope="module")
def labelled():
    rows = [
        {"query": WORDS[i % 9], "document": " ".join(WORDS[i % 5 : i % 5 + 4]), "label": i % 2}
        for i in range(20)
    ]
    from datasets import Dataset

    return load_training_data(Dataset.from_list(rows))


@pytest.fixture(scope="module")
def evaluator():
    documents = Texts([f"d{i}" for i in range(8)], [" ".join(WORDS[i : i + 4]) for i in range(8)])
    queries = Texts(["q0", "q5"], [WORDS[1], WORDS[6]])
    return RetrievalEvaluator(queries, documents, {"q0": {"d0": 1}, "q5": {"d5": 1}})


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("options", [{}, CACHE], ids=["in_batch", "negative_cache"])
def test_logs_the_loss_and_the_metrics_of_the_model(checkpoint, pairs, tmp_path, options):
    parts = []

    class Recorded(TrainingModel):
        def forward(self, *arguments, **named):
            result = super().forward(*arguments, **named)
            parts.append({"loss": result["loss"].detach(), **result["metrics"]})
            return result

    arguments = ObjectiveArguments(lambda_query=1e-3, lambda_document=1e-3, **options)
    model = Recorded(SpladeEncoder.from_pretrained(checkpoint), arguments)
    trainer = make_trainer(
        checkpoint,
        pairs,
        tmp_path,
        model=model,
        max_steps=4,
        gradient_accumulation_steps=2,
        logging_steps=2,
        report_to="tensorboard",
    )
    trainer.train()
    expected = METRICS | (
        {"cache/interpretable_prediction_loss", "cache/staleness"} if options else set()
    )
    assert len(parts) == 8
    for name in {"loss"} | expected:
        means = [sum(float(p[name]) for p in part) / 4 for part in (parts[:4], parts[4:])]
        assert logged(trainer, name) == pytest.approx(means, rel=1e-5), name
    [events] = tmp_path.rglob("events.out.tfevents*")
    scalars = EventAccumulator(str(events.parent)).Reload()
    for name in {"loss"} | expected:
        values = [event.value for event in scalars.Scalars(f"train/{name}")]
        assert values == pytest.approx(logged(trainer, name), rel=1e-5)


def test_schedules_count_optimizer_steps(checkpoint, pairs, tmp_path):
    steps = []

    class Recorded(TrainingModel):
        def forward(self, *arguments, **named):
            steps.append((self.training, self.step))
            return super().forward(*arguments, **named)

    model = Recorded(SpladeEncoder.from_pretrained(checkpoint), ObjectiveArguments())
    trainer = make_trainer(
        checkpoint, pairs, tmp_path, model=model, max_steps=3, gradient_accumulation_steps=2
    )
    trainer.train()
    assert steps == [(True, step) for step in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("count", [20, 18], ids=["full", "with a smaller last step"])
def test_accumulated_batches_are_one_large_batch(steady, labelled, tmp_path, count):
    # Means over examples, so that equally large parts average to the whole.
    options = {
        "loss": "pointwise",
        "query_regularizer": "l1",
        "document_regularizer": "l1",
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 1e-2,
    }
    data = labelled.select(range(count))
    large = make_trainer(steady, data, tmp_path / "large", per_device_train_batch_size=8, **options)
    large.train()
    small = make_trainer(
        steady,
        data,
        tmp_path / "small",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    small.train()
    assert small.state.global_step == large.state.global_step == 6
    assert logged(small, "loss") == pytest.approx(logged(large, "loss"), rel=1e-4)
    before = dict(SpladeEncoder.from_pretrained(steady).named_parameters())
    for name, weight in weights(small).items():
        torch.testing.assert_close(weight, weights(large)[name], rtol=1e-4, atol=1e-6)
    assert any(
        not torch.equal(weight, before[name.removeprefix("encoder.")])
        for name, weight in weights(small).items()
    )


def test_trains_in_bfloat16_on_the_cpu(checkpoint, pairs, tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(checkpoint, pairs, tmp_path / str(bf16), max_steps=2, bf16=bf16)
        trainer.train()
        losses[bf16] = logged(trainer, "loss")
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


def test_gradient_checkpointing_changes_nothing(checkpoint, pairs, tmp_path):
    results = []
    for checkpointed in (False, True):
        trainer = make_trainer(
            checkpoint, pairs, tmp_path, max_steps=2, activation_checkpointing=checkpointed
        )
        assert not trainer.model.encoder.model.is_activation_checkpointing
        trainer.train()
        assert trainer.model.encoder.model.is_activation_checkpointing == checkpointed
        results.append(weights(trainer))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name])


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_reaches_adapters(checkpoint, pairs, way, tmp_path):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        encoder = with_adapters(SpladeEncoder.from_pretrained(checkpoint), way)
        trainer = make_trainer(
            checkpoint,
            pairs,
            tmp_path,
            model=encoder,
            max_steps=2,
            activation_checkpointing=checkpointed,
        )
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed
        assert all("lora_" in name for name in changed)
        results.append(after)
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name])


def test_evaluation_gives_loss_metrics_and_retrieval(checkpoint, pairs, tmp_path, evaluator):
    examples = pairs.select(range(10))  # batches of 4, 4 and 2
    trainer = make_trainer(
        checkpoint,
        pairs,
        tmp_path,
        eval_dataset=examples,
        evaluator=evaluator,
        lambda_query=0.0,
        lambda_document=0.0,
    )
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= metrics.keys()
    assert metrics["eval_relevance_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    model = trainer.model.eval()
    rows = [examples[i] for i in range(10)]
    parts = [rows[:4], rows[4:8], rows[8:]]
    trainer.evaluator = None
    without = trainer.evaluate()
    for name in METRICS:
        means = [float(model(**trainer.data_collator(part))["metrics"][name]) for part in parts]
        by_examples = (4 * means[0] + 4 * means[1] + 2 * means[2]) / 10
        assert without[f"eval_{name}"] == pytest.approx(by_examples, rel=1e-5), name
    for name, value in evaluator(model.encoder).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value), name


def test_evaluation_leaves_the_training_alone(checkpoint, pairs, tmp_path, evaluator):
    plain = make_trainer(checkpoint, pairs, tmp_path / "plain", max_steps=4, **CACHE)
    plain.train()
    evaluated = make_trainer(
        checkpoint,
        pairs,
        tmp_path / "evaluated",
        eval_dataset=pairs.select(range(8)),
        evaluator=evaluator,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
        **CACHE,
    )
    evaluated.train()
    assert len(logged(evaluated, "eval_loss")) == 4
    assert_equal(dict(evaluated.model.state_dict()), dict(plain.model.state_dict()))


@pytest.mark.parametrize("metric", ["loss", "eval_MRR@10", "relevance_loss"])
def test_the_best_checkpoint_comes_back(checkpoint, pairs, tmp_path, evaluator, metric):
    examples = pairs.select(range(8))
    trainer = make_trainer(
        checkpoint,
        pairs,
        tmp_path,
        eval_dataset=examples,
        evaluator=evaluator,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        max_steps=4,
        learning_rate=0.05,  # too large, so that the last one is not the best
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better="MRR" in metric,
    )
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = logged(trainer, name)
    best = max(values) if "MRR" in metric else min(values)
    step = values.index(best) + 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    kept = SpladeEncoder.from_pretrained(tmp_path / f"checkpoint-{step}")
    assert_equal(
        {n: p.detach() for n, p in trainer.model.encoder.named_parameters()},
        {n: p.detach() for n, p in kept.named_parameters()},
    )
    trainer.eval_dataset = examples
    assert trainer.evaluate()[name] == pytest.approx(best, rel=1e-6)


def test_unknown_metrics_are_named(checkpoint, pairs, tmp_path):
    trainer = make_trainer(
        checkpoint,
        pairs,
        tmp_path,
        eval_dataset=pairs.select([0]),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        metric_for_best_model="MRR",
    )
    with pytest.raises(ValueError, match="metric_for_best_model must be one of .*eval_loss.*'MRR'"):
        trainer.train()


def test_an_evaluator_alone_is_enough(checkpoint, pairs, tmp_path, evaluator):
    trainer = make_trainer(
        checkpoint,
        pairs,
        tmp_path,
        evaluator=evaluator,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=20,
        learning_rate=1e-30,
        load_best_model_at_end=True,
        metric_for_best_model="MRR@10",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(logged(trainer, "eval_MRR@10")) == 3


def test_saved_models_load_everywhere(checkpoint, pairs, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    queries = BagOfWordsQueryEncoder(encoder.tokenizer, torch.ones(encoder.vocab_size))
    trainer = make_trainer(
        checkpoint, pairs, tmp_path, model=encoder, query_encoder=queries, max_steps=2
    )
    trainer.train()
    trainer.save_model()
    again = SpladeEncoder.from_pretrained(tmp_path)
    assert_equal(dict(again.named_parameters()), dict(encoder.named_parameters()))
    assert not torch.equal(
        again.model.get_output_embeddings().weight,
        AutoModelForMaskedLM.from_pretrained(checkpoint).get_output_embeddings().weight,
    )
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_equal(dict(plain.named_parameters()), dict(encoder.model.named_parameters()))
    learned = BagOfWordsQueryEncoder.from_pretrained(tmp_path / "query")
    assert torch.equal(learned.weight, queries.weight)
    assert not torch.equal(learned.weight, torch.ones_like(learned.weight))
    texts = ["a quick brown fox", "lazy dog"]
    expected = again.encode(texts, show_progress=False).to_dense()
    for folder, ours in ((tmp_path, expected), (tmp_path / "query", None)):
        theirs = sentence_transformers.SparseEncoder(str(folder), device="cpu")
        vectors = theirs.encode(texts, show_progress_bar=False).to_dense()
        if ours is not None:
            torch.testing.assert_close(vectors, ours)
    assert not list(tmp_path.rglob("*.bin"))


def test_saving_again_replaces_what_was_there(checkpoint, tmp_path):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    encoder.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("of before")
    with torch.no_grad():
        encoder.model.get_output_embeddings().weight.add_(1)
    encoder.save_pretrained(tmp_path / "model")
    again = SpladeEncoder.from_pretrained(tmp_path / "model")
    assert_equal(dict(again.named_parameters()), dict(encoder.named_parameters()))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "notes.txt" in names
    assert "model-00001-of-00002.safetensors" not in names
    assert not [name for name in names if name.startswith(".")]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("exists", [False, True])
def test_saves_that_fail_leave_a_folder_as_it_was(checkpoint, tmp_path, monkeypatch, exists):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    folder = tmp_path / "model"
    if exists:
        encoder.save_pretrained(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoder.tokenizer, "save_pretrained", fails)
    with torch.no_grad():
        encoder.model.get_output_embeddings().weight.add_(1)
    with pytest.raises(OSError, match="No space left"):
        encoder.save_pretrained(folder)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_term_weights_train_through_it(checkpoint, pairs, tmp_path):
    encoder = TermWeightEncoder.from_pretrained(checkpoint)
    trainer = make_trainer(checkpoint, pairs, tmp_path, model=encoder, max_steps=2, save_steps=2)
    trainer.train()
    again = TermWeightEncoder.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(dict(again.named_parameters()), dict(encoder.named_parameters()))


def test_streams_start_over(checkpoint, tmp_path):
    seen = []

    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **_):
            collate = train_dataloader.collate_fn

            def recording(examples):
                seen.extend(example["document"] for example in examples)
                return collate(examples)

            train_dataloader.base_dataloader.collate_fn = recording

    data = load_training_data(write_pairs(tmp_path / "p.tsv", 6), streaming=True)
    trainer = make_trainer(checkpoint, data, tmp_path / "run", max_steps=3, callbacks=[Seen()])
    trainer.train()
    first = [example["document"] for example in data]
    assert trainer.state.global_step == 3
    assert seen[:12] == first * 2
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(checkpoint, data, tmp_path / "run")
    with pytest.raises(DataError, match="must have at least one example, got none"):
        make_trainer(checkpoint, data.take(0), tmp_path / "run", max_steps=1).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0 here, got 0.1"),
        ({"ddp_broadcast_buffers": True}, "ddp_broadcast_buffers must be False"),
        ({"loss": "bm25"}, "loss must be one of in_batch"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False"),
        (
            {
                "save_only_model": True,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
            },
            "save_only_model must be False with load_best_model_at_end",
        ),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SpladeTrainingArguments(output_dir=str(tmp_path), **options)


def test_query_encoders_belong_to_training_models(checkpoint, pairs, tmp_path):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    model = TrainingModel(encoder, ObjectiveArguments())
    arguments = SpladeTrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="query_encoder must be None beside a TrainingModel"):
        SpladeTrainer(model, arguments, train_dataset=pairs, query_encoder=encoder)


def test_encoders_that_cannot_be_saved_are_refused_before_they_are_trained(
    checkpoint, pairs, tmp_path
):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    encoder.settings.activation = "relu"
    with pytest.raises(ValueError, match="activation must be one of .* to be saved"):
        make_trainer(checkpoint, pairs, tmp_path, model=encoder)


def test_arguments_write_themselves_down(tmp_path):
    arguments = SpladeTrainingArguments(output_dir=str(tmp_path), loss="kl", temperature=2.0)
    assert json.loads(arguments.to_json_string())["loss"] == "kl"
    assert arguments.objective_arguments() == ObjectiveArguments(loss="kl", temperature=2.0)


def test_other_reporters(checkpoint, pairs, tmp_path, monkeypatch):
    """Weights & Biases, in whose place a recorder stands, gets all arguments and metrics."""
    wandb = MagicMock()
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, wandb)
    wandb.ConfigError = RuntimeError
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    trainer = make_trainer(checkpoint, pairs, tmp_path, report_to="wandb", max_steps=2)
    trainer.train()
    (arguments,), _ = wandb.config.update.call_args
    assert json.loads(json.dumps(arguments))["lambda_document"] == 1e-3
    logs = [call.args[0] for call in wandb.log.call_args_list]
    steps = [log for log in logs if "train/loss" in log]
    assert [log["train/global_step"] for log in steps] == [1, 2]
    assert all({f"train/{name}" for name in METRICS} <= log.keys() for log in steps)
