"""Tests of training an accelerated model, and of the loss over a negative cache."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch.nn.parallel import DistributedDataParallel

from splade_fast.integrations.sentence_transformers import (
    NegativeCacheCallback,
    NegativeCacheLoss,
    accelerate,
)
from splade_fast.integrations.sentence_transformers.negative_cache_loss import _unflatten
from tests.integrations.sparse_encoders import inference_free, sentences, splade
from tests.ranks import run_ranks
from tests.tiny_models import VOCAB_SIZE

COUNT = 32
WEIGHTS = {"document_regularizer_weight": 0.01, "query_regularizer_weight": 0.02}


def data(*columns, label=None):
    texts = sentences(COUNT + len(columns))
    rows = {name: texts[i : i + COUNT] for i, name in enumerate(columns)}
    return Dataset.from_dict(rows | ({} if label is None else {"label": [label] * COUNT}))


PAIRS = data("query", "document")
TRIPLES = data("query", "document", "negative")


def make_trainer(model, dataset, loss, folder, steps=4, callbacks=(), **options):
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        **{"save_strategy": "no"} | options,
    )
    return SparseEncoderTrainer(
        model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=list(callbacks)
    )


def cache_loss(model, cache_size, **options):
    return NegativeCacheLoss(model, cache_size, cache_document_length=16, **options)


def curve(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model, dataset, make_loss, folder):
    trainer = make_trainer(model, dataset, make_loss(model), folder)
    trainer.train()
    return curve(trainer), model.state_dict()


LOSSES = {
    "ranking": (
        TRIPLES,
        lambda m: SpladeLoss(m, SparseMultipleNegativesRankingLoss(m), **WEIGHTS),
    ),
    "cached": (
        TRIPLES,
        lambda m: CachedSpladeLoss(
            m, SparseMultipleNegativesRankingLoss(m), mini_batch_size=2, **WEIGHTS
        ),
    ),
    "margin": (
        data("query", "document", "negative", label=0.5),
        lambda m: SpladeLoss(m, SparseMarginMSELoss(m), **WEIGHTS),
    ),
    "distilled": (
        data("query", "document", "negative", label=[2.0, 0.5]),
        lambda m: SpladeLoss(m, SparseDistillKLDivLoss(m), **WEIGHTS),
    ),
    "negative cache": (
        PAIRS,
        lambda m: SpladeLoss(m, cache_loss(m, 8, seed=1), **WEIGHTS),
    ),
    "negative cache alone": (
        PAIRS,
        lambda m: cache_loss(m, 8, cache_negatives=2, seed=1),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_same_loss_curve_and_weights(name, tmp_path):
    """Compare training in float64 with dropout, of which the head needs no random numbers."""
    dataset, make_loss = LOSSES[name]
    model = splade(tmp_path / "model").double()
    before, weights = trained(copy.deepcopy(model), dataset, make_loss, tmp_path / "a")
    after, ours = trained(accelerate(copy.deepcopy(model)), dataset, make_loss, tmp_path / "b")
    assert len(set(before)) == len(before) == 4
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-6, atol=0)
    assert weights.keys() == ours.keys()
    assert any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    for key, value in weights.items():
        torch.testing.assert_close(ours[key], value)


def preprocess(model, texts, **options):
    return dict(model.preprocess(texts, **options))


def preprocess_pairs(model, queries, documents):
    return [preprocess(model, queries), preprocess(model, documents)]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def test_one_cached_document_against_the_formula(tmp_path):
    """Compare loss and gradient with the formula for one slot, whose draw is certain."""
    model = without_dropout(accelerate(splade(tmp_path).double()))
    loss = NegativeCacheLoss(
        model, 1, cache_k=VOCAB_SIZE, cache_dtype=torch.float64, temperature=2.0
    )
    first = preprocess_pairs(model, ["quick fox"], ["the lazy dog sleeps"])
    second = preprocess_pairs(model, ["brown"], ["an old tree"])
    assert loss(copy.deepcopy(first)) == 0  # the cache is empty
    assert loss.metrics["cache/interpretable_prediction_loss"] == 0
    stale = model(copy.deepcopy(first[1]))["sentence_embedding"].detach()
    model.zero_grad()
    value = loss(copy.deepcopy(second))
    value.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    query, positive, negative = (
        model(copy.deepcopy(f))["sentence_embedding"] for f in (*second, first[1])
    )
    positive_score, negative_score = 0.5 * query @ positive[0], 0.5 * query @ negative[0]
    both = torch.stack([positive_score, 0.5 * query @ stale[0]]).detach()
    p = both.softmax(0)[0]
    expected = ((1 - p) * (negative_score - positive_score)).mean()
    expected.backward()
    torch.testing.assert_close(value, expected)
    metric = torch.tensor(loss.metrics["cache/interpretable_prediction_loss"]).double()
    torch.testing.assert_close(metric, -p.log().mean(), check_dtype=False, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("merged", [True, False])
def test_in_splade_loss_as_alone(merged, tmp_path):
    """Check both orders of SpladeLoss, which encodes columns together or one after the other."""
    model = without_dropout(accelerate(splade(tmp_path).double()))
    alone, inner = (cache_loss(model, 8, seed=3) for _ in range(2))
    weights = {"document_regularizer_weight": 0.1}
    if not merged:
        weights["query_regularizer_weight"] = 0.1
    wrapped = SpladeLoss(model, inner, use_document_regularizer_only=merged, **weights)
    texts = sentences(17)
    for start in range(0, 16, 4):
        batch = preprocess_pairs(model, texts[start : start + 4], texts[start + 1 : start + 5])
        expected = alone(copy.deepcopy(batch))
        torch.testing.assert_close(wrapped(copy.deepcopy(batch))["base_loss"], expected)
    ours, theirs = inner.handler.state_dict(), alone.handler.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_long_documents_keep_their_first_tokens(tmp_path):
    model = without_dropout(accelerate(splade(tmp_path)))
    loss = NegativeCacheLoss(model, 4, cache_document_length=3)
    batch = preprocess_pairs(model, ["quick"] * 2, ["the lazy dog sleeps under an old tree", "fox"])
    tokens = batch[1]["input_ids"][:, :3].clone()
    loss(batch)
    assert torch.equal(loss.handler.cache.data["input_ids"][:2], tokens.int())


def test_evaluation_leaves_the_cache(tmp_path):
    model = accelerate(splade(tmp_path)).double()
    loss = cache_loss(model, 4, temperature=0.5)
    batch = preprocess_pairs(model, ["quick", "old"], ["fox", "tree"])
    queries, documents = (model(copy.deepcopy(f))["sentence_embedding"] for f in batch)
    with torch.no_grad():
        value = loss(batch)
    scores = 2 * queries @ documents.T
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(scores, torch.arange(2)))
    assert not loss.handler.cache.valid.any()


@pytest.mark.parametrize("wraps", [False, True])
def test_copies_of_a_positive_are_no_negatives(tmp_path, wraps):
    """Neither in the batch and the cache of a training, nor in an evaluation."""
    model = splade(tmp_path).double()
    loss = cache = cache_loss(model, 4)
    if wraps:
        loss = SpladeLoss(model, cache, document_regularizer_weight=0.0)
    batch = preprocess_pairs(model, ["quick", "old", "lazy"], ["fox", "tree", "fox"])
    queries, documents = (model(copy.deepcopy(f))["sentence_embedding"] for f in batch)
    lists = [[0, 1], [1, 0, 2], [2, 1]]
    scores = [query @ documents[own].T for query, own in zip(queries, lists, strict=True)]
    expected = torch.stack([-row.log_softmax(0)[0] for row in scores]).mean()
    with torch.no_grad():
        value = loss(copy.deepcopy(batch))
    torch.testing.assert_close(sum(value.values()) if wraps else value, expected)
    alike = preprocess_pairs(model, ["quick", "old"], ["fox", "fox"])
    model.train()
    for _ in range(2):
        loss(copy.deepcopy(alike))
        assert cache.metrics["cache/interpretable_prediction_loss"] == 0


def test_inference_free_queries(tmp_path):
    model = without_dropout(accelerate(inference_free(tmp_path)))
    loss = SpladeLoss(
        model,
        cache_loss(model, 8),
        document_regularizer_weight=0.1,
    )
    for texts in (sentences(4), sentences(9)[5:]):
        batch = [preprocess(model, texts, task=task) for task in ("query", "document")]
        for column, task in zip(batch, ("query", "document"), strict=True):
            column["task"] = task
        sum(loss(batch).values()).backward()
    assert int(loss.loss.handler.cache.valid.sum()) == 8
    assert model[0].sub_modules["query"][0].weight.grad.abs().sum() > 0


def test_flattened_documents_are_stored_padded():
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    padded = _unflatten(
        {
            "input_ids": torch.tensor([[7, 8, 4, 5, 6]]),
            "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
            "cu_seq_lens_q": bounds,
            "max_length_q": 3,
            "modality": "text",
        }
    )
    assert padded["input_ids"].tolist() == [[7, 8, 0], [4, 5, 6]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded.keys() == {"input_ids", "attention_mask", "modality"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_training_resumes_to_the_bit(wrapped, tmp_path):
    """Check that the callback restores cache and draws, and that runs differ without it."""
    folder = tmp_path / "run"

    def run(resume=None, with_callback=True):
        model = accelerate(splade(tmp_path / "model"))
        inner = cache_loss(model, 16, cache_in_batch=False, seed=1)
        loss = SpladeLoss(model, inner, **WEIGHTS) if wrapped else inner
        callbacks = [NegativeCacheCallback(inner)] if with_callback else []
        options = {"save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(model, PAIRS, loss, folder, 6, callbacks, **options)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict(), inner.handler.state_dict(), trainer

    weights, cache, trainer = run()
    assert all("cache/staleness" in entry for entry in trainer.state.log_history[:6])
    again, its_cache, _ = run(str(folder / "checkpoint-3"))
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert all(torch.equal(its_cache[key], cache[key]) for key in cache)
    without, _, _ = run(str(folder / "checkpoint-3"), with_callback=False)
    assert any(not torch.equal(without[key], weights[key]) for key in weights)


def test_a_checkpoint_without_a_cache_is_refused(tmp_path):
    model = accelerate(splade(tmp_path))
    loss = cache_loss(model, 8)
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(model, PAIRS, loss, tmp_path / "run", 1, **options).train()
    callback = NegativeCacheCallback(loss)
    trainer = make_trainer(model, PAIRS, loss, tmp_path / "run", 2, [callback], **options)
    with pytest.raises(
        FileNotFoundError, match="checkpoint-1/negative_cache holds no negative cache"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_what_the_loss_refuses(tmp_path):
    model = accelerate(splade(tmp_path)).train()
    with pytest.raises(ValueError, match="cache_sharing must be one of replicas, .* 'all'"):
        NegativeCacheLoss(model, 8, cache_sharing="all")
    with pytest.raises(ValueError, match="cache_document_length must be at least 1, got 0"):
        NegativeCacheLoss(model, 8, cache_document_length=0)
    with pytest.raises(ValueError, match=r"temperature must be greater than 0, got 0\.0"):
        NegativeCacheLoss(model, 8, temperature=0.0)
    with pytest.raises(TypeError, match="model must be a SparseEncoder, got Linear"):
        NegativeCacheLoss(torch.nn.Linear(2, 2), 8)
    loss = cache_loss(model, 8)
    batch = preprocess_pairs(model, ["a"], ["fox"])
    with pytest.raises(ValueError, match="must be two columns, queries and their positives, got 3"):
        loss([*batch, preprocess(model, ["dog"])])
    with pytest.raises(RuntimeError, match="not in CachedSpladeLoss"):
        CachedSpladeLoss(model, loss, **WEIGHTS)(batch)


def test_compiled_model(tmp_path):
    model = without_dropout(accelerate(splade(tmp_path).double()))
    losses = [cache_loss(model, 8, seed=3) for _ in range(2)]
    texts = sentences(9)
    results = []
    for loss in losses:
        values = [
            loss(preprocess_pairs(model, texts[start : start + 4], texts[start + 1 : start + 5]))
            for start in (0, 4)
        ]
        results.append(torch.stack(values))
        model.compile(backend="aot_eager", dynamic=True)
    torch.testing.assert_close(results[1], results[0])


def train_on_rank(rank, count, folder):
    """Train two steps with each kind of sharing, and check gradients and caches."""
    for sharing in ("replicas", "shards", "own"):
        model = without_dropout(accelerate(splade(Path(folder)).double()))
        loss = NegativeCacheLoss(
            model, 16, cache_document_length=16, cache_sharing=sharing, seed=rank
        )
        loss.model = DistributedDataParallel(model)  # as trainers do
        whole = SpladeLoss(loss.model, loss, **WEIGHTS)
        for step in range(2):
            texts = sentences(8 * count + 1)[8 * rank + 4 * step :][:5]
            sum(whole(preprocess_pairs(model, texts[:4], texts[1:])).values()).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                mean = parameter.grad.clone()
                dist.all_reduce(mean)
                torch.testing.assert_close(mean / count, parameter.grad)
        added = 8 * count if sharing == "replicas" else 8
        assert int(loss.handler.cache.valid.sum()) == added
        assert loss.metrics["cache/interpretable_prediction_loss"] > 0
        if sharing == "replicas":
            mine = loss.handler.cache.data["input_ids"]
            theirs = [torch.empty_like(mine) for _ in range(count)]
            dist.all_gather(theirs, mine)
            assert all(torch.equal(tokens, mine) for tokens in theirs)


def test_two_processes(tmp_path):
    splade(tmp_path)  # saves the checkpoint for both processes
    run_ranks(2, train_on_rank, tmp_path, str(tmp_path))


def test_the_model_goes_to_other_processes_without_the_cache(tmp_path):
    model = accelerate(splade(tmp_path))
    size = len(pickle.dumps(model))
    loss = NegativeCacheLoss(model, 4096, cache_document_length=64)
    assert len(pickle.dumps(model)) < size + 10_000
    assert sum(b.nbytes for b in loss.handler.buffers()) > 1_000_000
