"""Tests of the objective and its arguments, against formulas in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import HfArgumentParser, TrainingArguments

import splade_fast as sf
from splade_fast.negative_cache import CacheManager, FixedLenFeature
from splade_fast.training import (
    Objective,
    ObjectiveArguments,
    TrainingCollator,
    TrainingModel,
    cached_encode,
)
from tests.tiny_models import VOCAB_SIZE, make_tokenizer
from tests.training.models import (
    assert_same_gradients,
    batch_of,
    encoder_of,
    gradients,
    plain_vectors,
    training_model,
)

B = 4
NO_PENALTY = {"query_regularizer": "none", "document_regularizer": "none"}


def plain_loss(loss, q, d, labels, temperature):
    """Return the loss of queries (B, V) and documents (m, B, V)."""
    scores = torch.stack([(q * one).sum(1) for one in d], 1)  # (B, m)
    if loss == "in_batch":
        everything = q @ d.flatten(0, 1).T / temperature
        return -everything.log_softmax(1).diagonal().mean()
    if loss == "pointwise":
        p = torch.sigmoid(scores[:, 0])
        return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    if loss == "pairwise":
        return torch.log1p(torch.exp(scores[:, 1:] - scores[:, :1])).mean()
    if loss == "margin_mse":
        student, teacher = (x[:, :1] - x[:, 1:] for x in (scores, labels))
        return ((student - teacher) ** 2).mean()
    p, t = ((x / temperature).softmax(1) for x in (scores, labels))
    return temperature**2 * (t * (t.log() - p.log())).sum(1).mean()


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize(
    ("loss", "count"),
    [("in_batch", 1), ("in_batch", 3), ("pointwise", 1), ("pairwise", 2), ("pairwise", 4),
     ("margin_mse", 2), ("margin_mse", 3), ("kl", 2), ("kl", 4)],
)  # fmt: skip
def test_losses_end_to_end(loss, count, mini_batch_size):
    model = training_model(
        loss=loss, temperature=3.0, mini_batch_size=mini_batch_size, **NO_PENALTY
    )
    batch = batch_of(model.encoder, B, 0, count)
    labels = None
    if loss in ("pointwise", "margin_mse", "kl"):
        labels = torch.rand((B,) if loss == "pointwise" else (B, count), dtype=torch.float64)
    result = model(**batch, labels=labels)
    plain = encoder_of().model
    q = plain_vectors(plain, batch["queries"])
    d = plain_vectors(plain, batch["documents"]).view(count, B, -1)
    expected = plain_loss(loss, q, d, labels, 3.0)
    torch.testing.assert_close(result["loss"], expected)
    assert_same_gradients(
        gradients(model.encoder.model, result["loss"]), gradients(plain, expected)
    )
    metrics = result["metrics"]
    assert not any(value.requires_grad or value.ndim for value in metrics.values())
    assert metrics["relevance_loss"] == result["loss"]
    assert metrics["query_regularizer"] == metrics["document_regularizer"] == 0
    assert metrics["query_active_dims"] == (q > 0).sum(1).float().mean()
    assert metrics["document_active_dims"] == (d > 0).sum(2).float().mean()


def test_several_losses_add_up():
    model = training_model(
        loss="kl + 0.05*margin_mse+ 2 * in_batch + pairwise", temperature=3.0, **NO_PENALTY
    )
    batch = batch_of(model.encoder, B, 0, 3)
    labels = torch.rand(B, 3, dtype=torch.float64)
    result = model(**batch, labels=labels)
    plain = encoder_of().model
    q = plain_vectors(plain, batch["queries"])
    d = plain_vectors(plain, batch["documents"]).view(3, B, -1)
    weights = {"kl": 1, "margin_mse": 0.05, "in_batch": 2, "pairwise": 1}
    values = {name: plain_loss(name, q, d, labels, 3.0) for name in weights}
    expected = sum(weights[name] * value for name, value in values.items())
    torch.testing.assert_close(result["loss"], expected)
    for name, value in values.items():
        torch.testing.assert_close(result["metrics"][f"{name}_loss"], value.detach())
    assert_same_gradients(
        gradients(model.encoder.model, result["loss"]), gradients(plain, expected)
    )


def test_distillation_beside_a_cache():
    """The second step, whose cache has documents, has the gradients of both losses."""
    options = NO_PENALTY | {"cache_size": 16, "cache_k": 30}
    trained = {}
    for loss in ("negative_cache", "kl", "negative_cache+0.5*kl"):
        model = training_model(loss=loss, **(NO_PENALTY if loss == "kl" else options))
        for seed in (0, 1):
            labels = None if loss == "negative_cache" else torch.rand(B, 2, dtype=torch.float64)
            if labels is not None:
                labels = torch.linspace(0, 1, 2 * B, dtype=torch.float64).view(B, 2)
            result = model(**batch_of(model.encoder, B, seed, 2), labels=labels)
        trained[loss] = gradients(model.encoder.model, result["loss"])
    expected = {
        name: gradient + 0.5 * trained["kl"][name]
        for name, gradient in trained["negative_cache"].items()
    }
    assert_same_gradients(trained["negative_cache+0.5*kl"], expected)
    metrics = result["metrics"]
    assert {"kl_loss", "cache/staleness"} <= metrics.keys()


def test_hardness_reaches_the_loss():
    model = training_model(loss="in_batch", hardness=0.2, temperature=2.0, **NO_PENALTY)
    batch = batch_of(model.encoder, B, 0, 2)
    q, d = (model.encoder(**batch[side]) for side in ("queries", "documents"))
    expected = sf.losses.in_batch_loss(q, d[:B], d[B:], temperature=2.0, hardness=0.2)
    torch.testing.assert_close(model(**batch)["loss"], expected)


FORMULAS = {
    "flops": lambda x: x.abs().mean(0).square().sum(),
    "l1": lambda x: x.abs().sum(1).mean(),
    "df_flops": lambda x: (
        (x.abs().mean(0) / (1 + ((x > 0).double().mean(0) ** math.log(2, 0.1) - 1) ** 10))
        .square()
        .sum()
    ),
}


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_copies_of_a_positive_are_no_negatives(side, mini_batch_size):
    """Positives 0 and 2 are one text, also a hard negative of both; queries 1 and 3 are one."""
    model = training_model(
        loss="in_batch", temperature=3.0, mini_batch_size=mini_batch_size, **NO_PENALTY
    )
    model.encoder.tokenizer.padding_side = side
    queries = model.encoder.tokenize(["fox", "lazy dog", "old tree", "lazy dog"])
    fox, dog, tree = "a quick brown fox jumps", "the lazy dog", "an old tree"
    documents = model.encoder.tokenize([fox, dog, fox, "dog", fox, fox, fox, tree])
    result = model(queries, documents)
    plain = encoder_of().model
    q, d = (plain_vectors(plain, inputs) for inputs in (queries, documents))
    scores = q @ d.T / 3
    lists = [
        scores[0, [0, 1, 3, 7]],
        scores[1, [1, 0, 2, 4, 5, 6, 7]],
        scores[2, [2, 1, 3, 7]],
        scores[3, [3, 0, 2, 4, 5, 6, 7]],
    ]
    expected = torch.stack([-one.log_softmax(0)[0] for one in lists]).mean()
    torch.testing.assert_close(result["loss"], expected)
    assert_same_gradients(
        gradients(model.encoder.model, result["loss"]), gradients(plain, expected)
    )


def test_a_batch_of_one_is_told_once(caplog):
    model = training_model(loss="in_batch", **NO_PENALTY)
    tokenize = model.encoder.tokenize
    model(tokenize(["fox"]), tokenize(["a fox", "a dog"]))
    model.eval()(tokenize(["fox"]), tokenize(["a fox"]))
    assert caplog.text == ""
    for _ in range(2):
        assert model.train()(tokenize(["fox"]), tokenize(["a fox"]))["loss"] == 0
    assert (
        caplog.text.count("a batch of one query without hard negatives has a relevance_loss") == 1
    )


def test_a_negative_that_is_the_positive_costs_nothing_in_pairwise():
    model = training_model(loss="pairwise", **NO_PENALTY)
    queries = model.encoder.tokenize(["fox", "lazy dog"])
    tokenize = model.encoder.tokenize
    result = model(
        queries, tokenize(["a fox", "the dog", "a fox", "an old tree", "dog", "the dog"])
    )
    q, d = model.encoder(**queries), model.encoder(**tokenize(["a fox", "the dog", "an old tree"]))
    margins = [(q[0] @ (d[0] - model.encoder(**tokenize(["dog"]))[0])), q[1] @ (d[1] - d[2])]
    expected = functional.softplus(-torch.stack(margins)).sum() / 4
    torch.testing.assert_close(result["loss"], expected)


@pytest.mark.parametrize("terms", ["flops", "l1", "df_flops", "l1+flops", "df_flops+anti_zero"])
@pytest.mark.parametrize("schedule", ["quadratic", "linear", "constant"])
def test_regularizers_and_schedules(terms, schedule):
    """Check separate regularisers of queries and documents at a quarter of the schedule."""
    for side, other in (("query", "document"), ("document", "query")):
        arguments = ObjectiveArguments(
            **{f"{side}_regularizer": terms, f"{other}_regularizer": "none"},
            **{f"lambda_{side}": 0.3, f"lambda_{other}": 0.1, "lambda_anti_zero": 7.0},
            regularizer_schedule=schedule, regularizer_steps=8, df_momentum=0.0,
        )  # fmt: skip
        queries, documents = torch.rand(2, B, 30, dtype=torch.float64) * (torch.rand(30) < 0.5)
        ours = {"query": queries, "document": documents}[side].requires_grad_()
        result = Objective(arguments, 30).double()(queries, documents, step=2)
        weight = 0.3 * {"quadratic": 1 / 16, "linear": 1 / 4, "constant": 1}[schedule]
        expected = sum(
            7.0 * ((ours.abs().sum(1) + 1e-2) ** -2).mean() if term == "anti_zero"
            else weight * FORMULAS[term](ours)
            for term in terms.split("+")
        )  # fmt: skip
        value = result["metrics"][f"{side}_regularizer"]
        torch.testing.assert_close(value, expected.detach())
        relevance = result["metrics"]["relevance_loss"]
        torch.testing.assert_close(result["loss"].detach(), value + relevance)
        relevant = sf.losses.in_batch_loss(queries, documents)
        actual, wanted = (
            torch.autograd.grad(loss, ours, retain_graph=True)[0]
            for loss in (result["loss"], relevant + expected)
        )
        torch.testing.assert_close(actual, wanted)


def test_thresholds_of_flops():
    x = torch.zeros(2, 30, dtype=torch.float64)
    x[0, :5], x[1, :6] = 1, 1
    arguments = ObjectiveArguments(
        flops_threshold_query=5, flops_threshold_document=6, lambda_query=1, lambda_document=1
    )
    metrics = Objective(arguments, 30)(x, x)["metrics"]
    assert metrics["query_regularizer"] == 6 * 0.5**2
    assert metrics["document_regularizer"] == 0


def test_running_document_frequencies():
    """Check that batches weigh by rows and momentum, and that evaluation is not included."""
    arguments = ObjectiveArguments(document_regularizer="df_flops", df_momentum=0.5)
    objective = Objective(arguments, 3)
    batches = [torch.tensor([[1.0, 0, 0], [1, 1, 0]]), torch.tensor([[0.0, 1, 0]] * 4)]
    running = objective.document_sparsity.frequencies
    assert running.estimate().tolist() == [0, 0, 0]
    for batch in batches:
        objective(batch, batch)
    expected = torch.tensor([0.5 * 2 + 0, 0.5 * 1 + 4, 0]) / (0.5 * 2 + 4)
    torch.testing.assert_close(running.estimate(), expected)
    objective.eval()(batches[0], batches[0])
    torch.testing.assert_close(running.estimate(), expected)
    again = Objective(arguments, 3)
    again.load_state_dict(objective.state_dict())
    torch.testing.assert_close(again.document_sparsity.frequencies.estimate(), expected)


def test_top_k_prunes_before_loss_and_regularizers():
    arguments = {"query_top_k": 2, "document_top_k": 3, "lambda_query": 1, "lambda_document": 1}
    model = training_model(**arguments)
    batch = batch_of(model.encoder, B, 0)
    plain = encoder_of().model
    q = sf.prune_topk(plain_vectors(plain, batch["queries"]), 2)
    d = sf.prune_topk(plain_vectors(plain, batch["documents"]), 3)
    expected = functional.cross_entropy(q @ d.T, torch.arange(B))
    expected = expected + FORMULAS["flops"](q) + FORMULAS["flops"](d)
    result = model(**batch)
    torch.testing.assert_close(result["loss"], expected)
    assert_same_gradients(
        gradients(model.encoder.model, result["loss"]), gradients(plain, expected)
    )
    assert result["metrics"]["document_active_dims"] <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_vectors_are_float32(dtype):
    queries, documents = torch.rand(2, B, 1000).to(dtype)
    expected = sf.losses.in_batch_loss(queries.float(), documents.float())
    result = Objective(ObjectiveArguments(), 1000)(queries, documents)
    torch.testing.assert_close(result["metrics"]["relevance_loss"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        result = Objective(ObjectiveArguments(), 1000)(queries, documents)
    torch.testing.assert_close(result["metrics"]["relevance_loss"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "bce"}, "loss must be one of in_batch, .*, got 'bce'"),
        ({"loss": "kl+kl"}, "joined by \\+, each once, got 'kl\\+kl'"),
        ({"loss": "kl+0*margin_mse"}, "loss must have weights above 0, got '0' in 'kl"),
        ({"loss": "x*kl"}, "loss must have weights above 0, got 'x'"),
        ({"loss": "kl+pointwise"}, "loss must not join pointwise, .*, got 'kl\\+pointwise'"),
        ({"loss": "in_batch+negative_cache"}, "loss must not join in_batch and negative_cache"),
        ({"loss": "kl", "hardness": 0.1}, "hardness must be 0 without in_batch .*, got 0.1"),
        ({"hardness": -1.0}, "hardness must be at least 0 and finite, got -1.0"),
        ({"mini_batch_tokens": 0}, "mini_batch_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be greater than 0, got nan"),
        ({"query_regularizer": "flop"}, "query_regularizer must be 'none' or some of .* 'flop'"),
        ({"document_regularizer": "l1+l1"}, "document_regularizer must .* 'l1\\+l1'"),
        ({"document_regularizer": ""}, "document_regularizer must .* got ''"),
        ({"document_regularizer": "flops+none"}, "document_regularizer must .* got 'flops.none'"),
        ({"lambda_query": -1.0}, "lambda_query must be at least 0 and finite, got -1.0"),
        ({"lambda_document": math.inf}, "lambda_document must be at least 0 and finite, got inf"),
        ({"regularizer_schedule": "cubic"}, "regularizer_schedule must be one of .* 'cubic'"),
        ({"regularizer_steps": -1}, "regularizer_steps must be at least 0, got -1"),
        ({"flops_threshold_query": 3, "query_regularizer": "l1"},
         "flops_threshold_query must be None without flops in query_regularizer, got 3"),
        ({"df_alpha": 1.0}, "df_alpha must be between 0 and 1, got 1.0"),
        ({"df_beta": 0.0}, "df_beta must be greater than 0, got 0.0"),
        ({"df_momentum": 1.0}, "df_momentum must be at least 0 and below 1, got 1.0"),
        ({"query_top_k": 0}, "query_top_k must be at least 1, got 0"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1, got 0"),
        ({"loss": "negative_cache"}, "cache_size must be at least 1 for .* negative_cache, got 0"),
        ({"cache_size": 8}, "cache_size must be 0 for the loss in_batch.*, got 8"),
        ({"cache_embeddings": "csr"}, "cache_embeddings must be one of sparse, dense, got 'csr'"),
        ({"cache_dtype": "int8"}, "cache_dtype must be one of .*, got 'int8'"),
        ({"cache_sharing": "all"}, "cache_sharing must be one of .*, got 'all'"),
        ({"cache_storage": "disk"}, "cache_storage must be one of device, pinned, got 'disk'"),
        ({"cache_top_k_method": "best"}, "cache_top_k_method must be one of .*, got 'best'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveArguments(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "0.5"}, "temperature must be a number, got str"),
        ({"lambda_query": None}, "lambda_query must be a number, got NoneType"),
        ({"lambda_document": True}, "lambda_document must be a number, got bool"),
        ({"query_regularizer": None}, "query_regularizer must be a str, got NoneType"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        ObjectiveArguments(**arguments)


def test_counts_are_integers_of_any_kind():
    arguments = ObjectiveArguments(
        loss="negative_cache", cache_size=np.int64(8), query_top_k=torch.tensor(3)
    )
    assert (type(arguments.cache_size), arguments.query_top_k) == (int, 3)
    for count in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="query_top_k must be an integer, got "):
            ObjectiveArguments(query_top_k=count)
    with pytest.raises(TypeError, match="cache_size must be an integer, got bool"):
        CacheManager({"id": FixedLenFeature([], torch.int64)}, cache_size=True)
    assert CacheManager({"id": FixedLenFeature([], torch.int64)}, np.int32(2)).cache_size == 2
    encoder = encoder_of()
    with pytest.raises(TypeError, match="max_query_length must be an integer, got float"):
        TrainingCollator(encoder, max_query_length=8.0)
    with pytest.raises(TypeError, match="mini_batch_size must be an integer, got bool"):
        cached_encode(encoder, encoder.tokenize(["fox"]), mini_batch_size=True)


@pytest.mark.parametrize(
    ("loss", "count", "labels", "message"),
    [
        ("pointwise", 1, None, r"labels must be \(batch,\), .*, \(4,\) for pointwise, got None"),
        ("pointwise", 2, (B,), "documents must be one for each query for pointwise, got 2"),
        ("pointwise", 1, (B, 1), r"labels must be .* got \(4, 1\)"),
        ("kl", 2, None, r"labels must be \(batch, documents\), .* \(4, 2\) for kl, got None"),
        ("kl", 1, (B, 1), "documents must be at least 2 for each query for kl, got 1"),
        ("margin_mse", 1, (B, 1), "documents must be at least 2 .* margin_mse, got 1"),
        ("margin_mse", 2, (B, 3), r"labels must be .* got \(4, 3\)"),
        ("pairwise", 1, None, "documents must be at least 2 for each query for pairwise, got 1"),
        ("pairwise", 2, (B, 2), r"labels must be None for the loss pairwise, .* got \(4, 2\)"),
        ("in_batch", 1, (B,), r"labels must be None for the loss in_batch, .* got \(4,\)"),
        ("in_batch", 0, None, "documents must be a multiple of the queries, got 0 and 4"),
    ],
)
def test_batches_that_do_not_fit_the_loss_are_refused(loss, count, labels, message):
    objective = Objective(ObjectiveArguments(loss=loss), 8)
    queries, documents = torch.rand(B, 8), torch.rand(B * count, 8)
    with pytest.raises(ValueError, match=message):
        objective(queries, documents, None if labels is None else torch.rand(labels))
    with pytest.raises(ValueError, match="must be a multiple of the queries, got 9 and 4"):
        objective(queries, torch.rand(9, 8))


def test_labels_out_of_range_are_refused():
    objective = Objective(ObjectiveArguments(loss="pointwise"), 8)
    with pytest.raises(ValueError, match="labels must be between 0 and 1"):
        objective(torch.rand(2, 8), torch.rand(2, 8), torch.tensor([0.0, 1.5]))


def test_arguments_make_flags_beside_those_of_transformers():
    mine = {field.name for field in dataclasses.fields(ObjectiveArguments)}
    assert not mine & {field.name for field in dataclasses.fields(TrainingArguments)}
    assert all(field.metadata["help"] for field in dataclasses.fields(ObjectiveArguments))
    flags = ["--loss", "kl", "--query_top_k", "3", "--no_cache_in_batch", "--temperature", "2"]
    (parsed,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(flags)
    assert parsed == ObjectiveArguments(
        loss="kl", query_top_k=3, cache_in_batch=False, temperature=2.0
    )


def test_vocabularies_of_the_encoders_must_agree():
    weight = torch.rand(VOCAB_SIZE - 1)
    other = sf.BagOfWordsQueryEncoder(make_tokenizer(), torch.cat([weight, weight]))
    with pytest.raises(ValueError, match="query_encoder must have the vocab_size of encoder"):
        TrainingModel(encoder_of(), ObjectiveArguments(), query_encoder=other)
