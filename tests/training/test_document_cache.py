"""Tests of the negative cache in training, against plain PyTorch with a list of documents."""

import copy

import pytest
import torch
from transformers import AutoModel

from splade_fast import BagOfWordsQueryEncoder, TermWeightEncoder, prune_topk
from splade_fast.negative_cache.retrieval_fns import MaxScoreRetrievalFn
from splade_fast.training import ObjectiveArguments, TrainingModel
from tests.tiny_models import VOCAB_SIZE, make_tokenizer
from tests.training.models import (
    FAMILIES,
    assert_same_gradients,
    batch_of,
    encoder_of,
    gradients,
    plain_vectors,
    training_model,
)

SIZE, BATCH = 8, 3
CACHE = {"loss": "negative_cache", "cache_size": SIZE, "cache_document_length": 16}
NO_PENALTY = {"query_regularizer": "none", "document_regularizer": "none"}


class PlainCache:
    """Cache as lists of token ids, dense float64 vectors and ages, updated by plain loops."""

    def __init__(self, size):
        self.slots = [None] * size
        self.ages = [0] * size

    def step(self, model, batch, temperature, in_batch):
        """Return the loss with the highest score as the negative, then update the cache."""
        queries = plain_vectors(model, batch["queries"])
        documents = plain_vectors(model, batch["documents"])
        ids = [self._ids(batch["documents"], i) for i in range(len(documents))]
        losses, entropies, refreshed = [], [], {}
        for i, query in enumerate(queries):
            own = query @ documents[i] / temperature
            scores, draws = [], []
            for slot, held in enumerate(self.slots):
                if held is not None and held[0] != ids[i]:
                    scores.append((query @ held[1]).detach() / temperature)
                    draws.append(slot)
            for j in range(0 if in_batch else len(queries), len(documents)):
                if ids[j] != ids[i]:
                    scores.append((query @ documents[j]).detach() / temperature)
                    draws.append(SIZE + j)
            if not scores:
                losses.append(own * 0)
                entropies.append(own.detach() * 0)
                continue
            log_p = torch.log_softmax(torch.stack([own.detach(), *scores]), 0)[0]
            best = draws[int(torch.stack(scores).argmax())]
            if best < SIZE:
                held = torch.tensor([self.slots[best][0]])
                fresh = plain_vectors(
                    model, {"input_ids": held, "attention_mask": torch.ones_like(held)}
                )[0]
                refreshed[best] = fresh.detach()
            else:
                fresh = documents[best - SIZE]
            losses.append((1 - log_p.exp()) * (query @ fresh / temperature - own))
            entropies.append(-log_p)
        for slot, vector in refreshed.items():
            self.slots[slot] = (self.slots[slot][0], vector)
            self.ages[slot] = -1
        oldest = sorted(range(len(self.slots)), key=lambda slot: (-self.ages[slot], slot))
        for slot, i in zip(oldest, range(len(queries)), strict=False):
            self.slots[slot] = (ids[i], documents[i].detach())
            self.ages[slot] = -1
        self.ages = [age + 1 for age in self.ages]
        return torch.stack(losses).mean(), torch.stack(entropies).mean()

    @staticmethod
    def _ids(inputs, row):
        return inputs["input_ids"][row][inputs["attention_mask"][row] != 0].tolist()


@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize(
    ("family", "embeddings", "documents"),
    [("bert", "sparse", 1), ("bert", "dense", 3), ("llama", "sparse", 2)],
)
def test_steps_of_training(family, embeddings, documents, in_batch, mini_batch_size):
    """Compare loss, gradient and cache over steps that fill the cache and replace documents."""
    encoder = encoder_of(family)
    encoder.tokenizer.padding_side = "left" if family == "llama" else "right"
    arguments = ObjectiveArguments(
        **CACHE, **NO_PENALTY, temperature=5.0, cache_in_batch=in_batch,
        cache_embeddings=embeddings, cache_k=VOCAB_SIZE, mini_batch_size=mini_batch_size,
    )  # fmt: skip
    model = TrainingModel(encoder, arguments)
    model.objective.double()
    model.objective.handler.cache_loss.retrieval_fn = MaxScoreRetrievalFn()
    plain, cache, stale = copy.deepcopy(encoder.model), PlainCache(SIZE), []
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (encoder.model, plain)]
    for step in range(7):
        # Documents occur repeatedly, so that a query's own positive is in the cache.
        batch = batch_of(encoder, BATCH, step % 4, documents)
        result = model(**batch)
        loss, entropy = cache.step(plain, batch, 5.0, in_batch)
        metrics = result["metrics"]
        torch.testing.assert_close(result["loss"], loss)
        torch.testing.assert_close(metrics["cache/interpretable_prediction_loss"], entropy)
        assert_same_gradients(gradients(encoder.model, result["loss"]), gradients(plain, loss))
        held = model.objective.handler.cache
        assert held.age.tolist() == cache.ages
        embeddings_now = held.data["embedding"]
        dense = embeddings_now if embeddings == "dense" else embeddings_now.to_dense()
        for slot, content in enumerate(cache.slots):
            assert bool(held.valid[slot]) == (content is not None)
            if content is not None:
                torch.testing.assert_close(dense[slot], content[1])
        for optimizer in optimizers:
            optimizer.step()
        stale.append(metrics["cache/staleness"].item())
    assert max(stale) > 0  # documents of the cache were drawn
    assert entropy > 0


def trained(model, steps=5, first=0):
    """Train for some steps, and return their losses and metrics."""
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=1e-3)
    losses = []
    for step in range(first, first + steps):
        model.step = step
        result = model(**batch_of(model.encoder, BATCH, seed=step))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(torch.stack([result["loss"].detach(), *result["metrics"].values()]))
    return torch.stack(losses)


def cache_model(seed=0, **arguments):
    model = training_model(seed=seed, **{**CACHE, "temperature": 5.0, **arguments})
    model.objective.double()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_negatives": 3},
        {"cache_top_k": 4},
        {"cache_top_k": 4, "cache_top_k_method": "exact", "cache_negatives": 2},
        {"cache_exclude": False},
        {"cache_in_batch": False, "mini_batch_size": 2},
        {"cache_storage": "pinned"},
        {"query_top_k": 4, "document_top_k": 5, "document_regularizer": "df_flops+anti_zero"},
    ],
)
def test_sparse_caches_train_as_dense_ones(options):
    sparse = cache_model(cache_k=VOCAB_SIZE, **options)
    dense = cache_model(cache_embeddings="dense", **options)
    torch.testing.assert_close(trained(sparse), trained(dense))
    for mine, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_positives_of_an_equal_query_are_no_negatives():
    """Neither those of the batch nor those of earlier steps; hard negatives always are."""
    queries = ["fox", "old tree", "fox"]
    earlier = ["a quick fox", "under an old tree", "brown fox jumps"]
    later = ["the quick brown fox", "tree", "fox jumps over", "dog", "dog sleeps", "dog and fox"]
    model = cache_model(cache_k=VOCAB_SIZE, **NO_PENALTY)
    name = "cache/interpretable_prediction_loss"
    encode = model.encoder.tokenize
    found = [model(encode(queries), encode(texts))["metrics"][name] for texts in (earlier, later)]
    with torch.no_grad():
        scores = model.encoder(**encode(queries)) @ model.encoder(**encode(earlier + later)).T / 5
    # Columns of the negatives of the three queries, in each of the two steps.
    columns = [[[1], [0, 2], [1]], [[1, 4, 6, 7, 8], [0, 2, 3, 5, 6, 7, 8], [1, 4, 6, 7, 8]]]
    for first, entropy, negatives in zip((0, 3), found, columns, strict=True):
        rows = [scores[i, [first + i, *others]] for i, others in enumerate(negatives)]
        expected = torch.stack([row.logsumexp(0) - row[0] for row in rows]).mean()
        torch.testing.assert_close(entropy, expected)


def test_draws_follow_the_seed():
    assert torch.equal(trained(cache_model(seed=1)), trained(cache_model(seed=1)))
    assert not torch.equal(trained(cache_model(seed=1)), trained(cache_model(seed=2)))


@pytest.mark.parametrize("embeddings", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_the_cache_stores(dtype, embeddings):
    model = training_model(
        **CACHE, **NO_PENALTY, cache_dtype=dtype, cache_embeddings=embeddings, cache_k=3
    )
    batch = batch_of(model.encoder, BATCH, seed=0)
    model(**batch)
    vectors = model.encoder(**batch["documents"]).detach()
    data = model.objective.handler.cache.data
    assert data["input_ids"].dtype == torch.int32
    assert data["attention_mask"].dtype == torch.bool
    width = batch["documents"]["input_ids"].shape[1]
    assert torch.equal(data["input_ids"][:BATCH, :width], batch["documents"]["input_ids"].int())
    assert not data["attention_mask"][:BATCH, width:].any()
    stored = data["embedding"]
    expected = prune_topk(vectors, 3) if embeddings == "sparse" else vectors
    dense = stored.to_dense() if embeddings == "sparse" else stored
    assert dense.dtype == getattr(torch, dtype)
    torch.testing.assert_close(dense[:BATCH], expected.to(dense.dtype), rtol=0.01, atol=0)


def test_drawn_documents_are_encoded_without_their_padding():
    model = cache_model(cache_in_batch=False)
    trained(model, 3)
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda module, arguments, inputs: seen.append(inputs), with_kwargs=True
    )
    trained(model, 1)
    drawn = seen[-1]
    assert drawn["input_ids"].dtype == torch.int64
    assert drawn["attention_mask"][:, -1].any()
    assert drawn["input_ids"].shape[1] < CACHE["cache_document_length"]


def test_evaluation_leaves_the_cache_alone_and_is_in_batch():
    model = cache_model(**NO_PENALTY)
    trained(model, 3)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.cache_state().items()}
    batch = batch_of(model.encoder, BATCH, seed=9, documents=2)
    result = model(**batch)
    plain = training_model(**NO_PENALTY, temperature=5.0).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(result["loss"], plain(**batch)["loss"])
    assert "cache/staleness" not in result["metrics"]
    after = model.cache_state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("by_file", [True, False])
def test_training_goes_on_from_what_was_saved(by_file, tmp_path):
    """Check that cache, draws and document frequencies resume bit for bit."""
    options = {"document_regularizer": "df_flops"}
    model = cache_model(seed=1, **options)
    trained(model, 3)
    weights = copy.deepcopy(model.encoder.state_dict())
    assert not set(weights) & set(model.cache_state())
    if by_file:
        model.save_cache(tmp_path / "cache")
    else:
        state = copy.deepcopy(model.cache_state())
    expected = trained(model, 3, first=3)
    again = cache_model(seed=2, **options)
    again.encoder.load_state_dict(weights)
    if by_file:
        again.load_cache(tmp_path / "cache")
    else:
        again.load_cache_state(state)
    assert torch.equal(trained(again, 3, first=3), expected)
    assert all(
        torch.equal(tensor, again.cache_state()[name])
        for name, tensor in model.cache_state().items()
    )


def test_copies_train_alike_and_apart():
    model = cache_model()
    trained(model, 2)
    copied = copy.deepcopy(model)
    expected = trained(model, 2, first=2)
    assert torch.equal(trained(copied, 2, first=2), expected)


def test_nothing_to_remember_is_no_file(tmp_path):
    model = training_model()
    assert model.cache_state() == {}
    model.save_cache(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    model.load_cache(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="shard-00000-of-00001"):
        cache_model().load_cache(tmp_path / "cache")


def test_further_inputs_of_the_tokenizer_are_stored():
    """Check that the cache stores the token types of BERT's tokenizer."""
    model_of_type = {}
    without = ["input_ids", "attention_mask"]
    for names in (without, [*without, "token_type_ids"]):
        encoder = encoder_of()
        encoder.tokenizer.model_input_names = names
        arguments = ObjectiveArguments(**CACHE, temperature=5.0)
        model = TrainingModel(encoder, arguments)
        assert set(model.objective.handler.cache.data) == {*names, "query", "embedding"}
        model_of_type[len(names)] = trained(model)
    torch.testing.assert_close(model_of_type[3], model_of_type[2])  # all of type 0


def test_other_encoders_and_autocast():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    bert = AutoModel.from_config(FAMILIES["bert"], add_pooling_layer=False).train()
    queries = BagOfWordsQueryEncoder(tokenizer, torch.rand(VOCAB_SIZE), frozen=False)
    arguments = ObjectiveArguments(**CACHE, mini_batch_size=2)
    model = TrainingModel(TermWeightEncoder(bert, tokenizer), arguments, query_encoder=queries)
    assert model.query_encoder is queries
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 2):
            result = model(**batch_of(model.encoder, BATCH, seed=step))
        model.zero_grad()
        result["loss"].backward()
        assert result["loss"].dtype == torch.float32
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
    assert queries.weight.grad.any()
    assert model.encoder.projection.weight.grad.any()


def test_one_encoder_is_in_the_state_once():
    model = training_model()
    assert model.query_encoder is model.encoder
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder"}
    same = TrainingModel(model.encoder, ObjectiveArguments(), query_encoder=model.encoder)
    assert same.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, e: b["documents"].update(extra=b["documents"]["input_ids"]),
         r"documents must have \['attention_mask', 'input_ids'\], .* got .*'extra'"),
        (lambda b, e: b.update(documents=e.tokenize(["a fox " * 9] * BATCH)),
         "documents must be at most cache_document_length = 16 tokens long, got 20"),
        (lambda b, e: b.update(labels=torch.rand(BATCH)),
         r"labels must be None for the loss negative_cache, .* got \(3,\)"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_the_cache_are_refused(change, message):
    model = cache_model()
    before = copy.deepcopy(model.cache_state())
    batch = batch_of(model.encoder, BATCH, seed=0)
    change(batch, model.encoder)
    with pytest.raises(ValueError, match=message):
        model(**batch)
    assert all(torch.equal(model.cache_state()[name], x) for name, x in before.items())
