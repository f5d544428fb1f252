"""Trainings that would train nothing are refused, and those that collapse say so."""

import logging
import math

import pytest
import torch
from datasets import Dataset

from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.training import ObjectiveArguments, load_training_data
from splade_fast.training.symptoms import Symptoms
from tests.training.runs import checkpoint_in, make_trainer

LOGGER = "splade_fast.training.trainer"
PAIRS = {"query": ["fox", "dog", "tree"], "document": ["a fox", "a dog", "an old tree"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"), dropout=False)


@pytest.fixture(scope="module")
def pairs():
    return load_training_data(Dataset.from_dict(PAIRS))


def frozen(checkpoint):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    encoder.requires_grad_(False)
    return encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 .*, got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be greater than 0, got 0"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size must be at least 2 .*1"),
        (
            {"dataloader_drop_last": True},
            "dataloader_drop_last must be False for 3 examples, fewer than a batch of 4, got True",
        ),
    ],
)
def test_options_that_train_nothing_are_refused(checkpoint, pairs, tmp_path, options, message):
    trainer = make_trainer(checkpoint, pairs, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda data: data.filter(lambda _: False), "must have at least one example, got none"),
        (lambda data: [], "must have at least one example, got none"),
        (lambda data: data.select([1]), "must have at least 2 examples for in_batch .*, got 1"),
        (lambda data: [data[1]], "must have at least 2 examples for in_batch .*, got 1"),
    ],
    ids=["filtered", "empty list", "one", "list of one"],
)
def test_data_that_train_nothing_are_refused(checkpoint, pairs, tmp_path, take, message):
    trainer = make_trainer(checkpoint, take(pairs), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=f"train_dataset {message}"):
        trainer.train()


def test_a_stream_of_single_pairs_is_refused(checkpoint, pairs, tmp_path):
    stream = load_training_data(pairs, streaming=True)
    options = {"max_steps": 1, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 2"):
        make_trainer(checkpoint, stream, tmp_path, **options).train()


def test_frozen_models_are_refused(checkpoint, pairs, tmp_path):
    trainer = make_trainer(checkpoint, pairs, tmp_path, model=frozen(checkpoint), max_steps=1)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        trainer.train()


def test_one_pair_with_a_hard_negative_trains(checkpoint, tmp_path):
    rows = {"query": ["fox"], "document": ["a fox"], "negatives": [["a dog"]]}
    data = load_training_data(Dataset.from_dict(rows))
    trainer = make_trainer(checkpoint, data, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("bias", "messages"),
    [
        (
            -1e3,
            [
                "the vectors of queries have no active dims: lower lambda_query (now 0.001), or "
                "add anti_zero to query_regularizer",
                "the vectors of documents have no active dims: lower lambda_document (now 0.001), "
                "or add anti_zero to document_regularizer",
            ],
        ),
        (
            1e3,
            [
                "the vectors of queries have 20 of 20 dims active: raise lambda_query (now 0.001)",
                "the vectors of documents have 20 of 20 dims active: raise lambda_document "
                "(now 0.001)",
            ],
        ),
        (
            math.nan,
            [
                "document_regularizer is nan: the weights may be damaged; lower learning_rate or "
                "max_grad_norm, and prefer bf16 to fp16",
            ],
        ),
    ],
    ids=["empty", "full", "nan"],
)
def test_collapse_is_told_once(checkpoint, pairs, tmp_path, caplog, bias, messages):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    with torch.no_grad():
        encoder.model.get_output_embeddings().bias.fill_(bias)
    options = {"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-9}
    trainer = make_trainer(checkpoint, pairs, tmp_path, model=encoder, **options)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer.train()
    found = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert found == [f"step 1: {message}" for message in messages]


def test_copies_alone_are_told_at_the_end_of_a_run_without_log(checkpoint, tmp_path, caplog):
    data = load_training_data(Dataset.from_dict({"query": ["fox", "dog"], "document": ["old"] * 2}))
    options = {"max_steps": 1, "save_strategy": "no", "logging_steps": 500}
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(checkpoint, data, tmp_path, **options).train()
    assert "step 1: relevance_loss is 0: the batches have no negatives" in caplog.text


def test_a_rising_regulariser_may_take_its_time():
    symptoms = Symptoms(ObjectiveArguments(regularizer_steps=10), vocab_size=100)
    full = {"relevance_loss": 1.0, "document_active_dims": 100.0}
    assert symptoms.new_ones(full, step=9) == []
    [text] = symptoms.new_ones(full, step=10)
    assert "documents have 100 of 100 dims active: raise lambda_document" in text
    assert symptoms.new_ones(full, step=11) == []


def test_a_cache_of_copies_is_told_after_its_first_step():
    arguments = ObjectiveArguments(loss="negative_cache", cache_size=8)
    symptoms = Symptoms(arguments, vocab_size=100)
    metrics = {"relevance_loss": 0.0, "cache/interpretable_prediction_loss": 0.0}
    assert symptoms.new_ones(metrics, step=1) == []
    [text] = symptoms.new_ones(metrics, step=2)
    assert text.startswith("cache/interpretable_prediction_loss is 0: the batches have no")


def test_healthy_averages_have_no_symptoms():
    symptoms = Symptoms(ObjectiveArguments(), vocab_size=100)
    metrics = {"relevance_loss": 0.1, "query_active_dims": 1.0, "document_active_dims": 98.0}
    assert symptoms.new_ones(metrics, step=1) == []


def test_missing_regularisers_are_named():
    arguments = ObjectiveArguments(query_regularizer="none")
    [text] = Symptoms(arguments, vocab_size=100).new_ones({"query_active_dims": 99.5}, step=1)
    assert text.endswith("raise lambda_query (now 5e-05) and set query_regularizer")
