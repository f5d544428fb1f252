"""The negative cache in training, against plain PyTorch with a list of documents."""

import copy

import pytest
import torch

from splade_fast.negative_cache.retrieval_fns import MaxScoreRetrievalFn
from splade_fast.training import ObjectiveArguments, TrainingModel
from tests.tiny_models import VOCAB_SIZE
from tests.training.models import (
    assert_same_gradients,
    batch_of,
    encoder_of,
    gradients,
    plain_vectors,
)

SIZE, BATCH = 8, 3
CACHE = {"loss": "negative_cache", "cache_size": SIZE, "cache_document_length": 16}
NO_PENALTY = {"query_regularizer": "none", "document_regularizer": "none"}


class PlainCache:
    """Slots with the ids and the vector of a document, and an age; of float64, dense, by loops."""

    def __init__(self, size):
        self.slots = [None] * size
        self.ages = [0] * size

    def step(self, model, batch, temperature, in_batch):
        """The loss with the highest score as the negative; then the update."""
        queries = plain_vectors(model, batch["queries"])
        documents = plain_vectors(model, batch["documents"])
        ids = [self._ids(batch["documents"], i) for i in range(len(queries))]
        losses, entropies, refreshed = [], [], {}
        for i, query in enumerate(queries):
            own = query @ documents[i] / temperature
            scores, draws = [], []
            for slot, held in enumerate(self.slots):
                if held is not None and held[0] != ids[i]:
                    scores.append((query @ held[1]).detach() / temperature)
                    draws.append(slot)
            for j in range(len(queries)) if in_batch else ():
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
@pytest.mark.parametrize("embeddings", ["sparse", "dense"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_steps_of_training(family, embeddings, in_batch, mini_batch_size):
    """Loss, gradient and cache over steps that fill the cache, draw from it and replace."""
    encoder = encoder_of(family)
    encoder.tokenizer.padding_side = "left" if family == "llama" else "right"
    arguments = ObjectiveArguments(
        **CACHE, **NO_PENALTY, temperature=5.0, cache_in_batch=in_batch,
        cache_embeddings=embeddings, cache_k=VOCAB_SIZE, mini_batch_size=mini_batch_size,
    )  # fmt: skip
    model = TrainingModel(encoder, arguments)
    model.objective.double()
    model.objective.handler.cache_loss.retrieval_fn = MaxScoreRetrievalFn()
    plain, cache = copy.deepcopy(encoder.model), PlainCache(SIZE)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (encoder.model, plain)]
    for step in range(7):
        # Documents come back, so that a query's own is in the cache.
        batch = batch_of(encoder, BATCH, seed=step % 4)
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
    assert metrics["cache/staleness"] > 0
    assert entropy > 0
