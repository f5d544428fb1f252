"""TrainingModel against plain PyTorch."""

import copy

import pytest
import torch

from splade_fast import reference
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.training import ObjectiveArguments, TrainingModel
from tests.tiny_models import make_model, make_tokenizer, masked_lm_configs

QUERIES = ["quick fox", "lazy dog", "an old tree"]
DOCUMENTS = ["a quick brown fox jumps", "the lazy dog sleeps", "under an old tree"]
NEGATIVES = ["the fox", "a dog and a fox", "over the tree"]


def encoder_of(family="bert", dtype=torch.float64):
    return SpladeEncoder(make_model(masked_lm_configs()[family]).to(dtype), make_tokenizer())


def tokens(encoder, texts):
    return encoder.tokenize(texts)


def plain_vectors(model, inputs):
    return reference.splade_pool(model(**inputs).logits, inputs["attention_mask"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("hard", [False, True])
def test_step_in_batch(hard):
    encoder = encoder_of()
    plain = copy.deepcopy(encoder.model)
    arguments = ObjectiveArguments(
        temperature=0.5, lambda_query=0.1, lambda_document=0.2, regularizer_steps=4
    )
    model = TrainingModel(encoder, arguments)
    model.step = 2
    queries = tokens(encoder, QUERIES)
    documents = tokens(encoder, DOCUMENTS + (NEGATIVES if hard else []))
    result = model(queries=queries, documents=documents)
    q, d = plain_vectors(plain, queries), plain_vectors(plain, documents)
    relevance = torch.nn.functional.cross_entropy(q @ d.T / 0.5, torch.arange(3))
    query_penalty, document_penalty = q.mean(0).square().sum(), d.mean(0).square().sum()
    loss = relevance + 0.25 * (0.1 * query_penalty + 0.2 * document_penalty)
    torch.testing.assert_close(result["loss"], loss)
    expected = gradients(plain, loss)
    actual = gradients(encoder.model, result["loss"])
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
