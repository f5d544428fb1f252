"""cached_encode against encoding the whole batch at once."""

import copy

import pytest
import torch
from transformers import AutoModel

from splade_fast.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.model import SpladeEncoder
from splade_fast.term_weights import TermWeightEncoder
from splade_fast.training import cached_encode
from tests.tiny_models import (
    VOCAB_SIZE,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
)
from tests.tolerances import assert_accurate, assert_accurate_gradients

FAMILIES = {**masked_lm_configs(), **causal_lm_configs()}
TEXTS = ["fox", "the lazy dog sleeps under an old tree", "quick", "a quick dog", "", "over a dog",
         "an old fox jumps"]  # fmt: skip
UPSTREAM = torch.linspace(0.1, 1, len(TEXTS) * VOCAB_SIZE, dtype=torch.float64).view(len(TEXTS), -1)


def encoder_of(family="bert", dropout=0.0, dtype=torch.float64):
    config = copy.deepcopy(FAMILIES[family])
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, dropout)
    return SpladeEncoder(make_model(config).to(dtype), make_tokenizer())


def trained(encoder, vectors):
    encoder.zero_grad()
    vectors.backward(UPSTREAM.to(vectors.dtype))
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def assert_same(encoder, size, **tolerances):
    inputs = encoder.tokenize(TEXTS)
    plain = encoder(**inputs)
    expected = trained(encoder, plain)
    vectors = cached_encode(encoder, inputs, size)
    actual = trained(encoder, vectors)
    torch.testing.assert_close(vectors, plain, **tolerances)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **tolerances)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3", "llama", "qwen2"])
def test_equals_the_whole_batch(family, size):
    encoder = encoder_of(family)
    if family in ("llama", "qwen2"):
        encoder.tokenizer.padding_side = "left"
    assert_same(encoder, size)


def test_float32_is_as_accurate_as_the_whole_batch():
    encoder = encoder_of(dtype=torch.float32)
    inputs = encoder.tokenize(TEXTS)
    exact = copy.deepcopy(encoder).double()
    truth, plain = exact(**inputs), encoder(**inputs)
    baseline = trained(encoder, plain)
    vectors = cached_encode(encoder, inputs, 2)
    assert_accurate(vectors.detach(), truth.detach(), plain.detach())
    assert_accurate_gradients(trained(encoder, vectors), trained(exact, truth), baseline)


def test_other_encoders():
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES["bert"], add_pooling_layer=False).double().eval()
    encoder = TermWeightEncoder(model, make_tokenizer())
    encoder.projection.double()
    assert_same(encoder, 2)
    weight = torch.rand(VOCAB_SIZE, dtype=torch.float64)
    assert_same(BagOfWordsQueryEncoder(make_tokenizer(), weight, frozen=False), 3)
    frozen = BagOfWordsQueryEncoder(make_tokenizer(), weight, frozen=True)
    inputs = frozen.tokenize(TEXTS)
    vectors = cached_encode(frozen, inputs, 2)
    assert not vectors.requires_grad
    assert torch.equal(vectors, frozen(**inputs))


def test_inputs_without_a_mask_keep_their_columns():
    encoder = encoder_of()
    inputs = encoder.tokenize(["a quick fox", "the lazy dog", "over an old"])
    del inputs["attention_mask"]
    torch.testing.assert_close(cached_encode(encoder, inputs, 2), encoder(**inputs))


def test_dropout_draws_the_same_again():
    """A mini-batch is a plain pass with the generator where it was."""
    encoder = encoder_of(dropout=0.3).train()
    inputs = encoder.tokenize(["a quick fox", "the lazy dog", "over a tree", "under an old"])
    parts = [{name: x[rows] for name, x in inputs.items()} for rows in (slice(2), slice(2, 4))]
    upstream = UPSTREAM[:4]
    torch.manual_seed(1)
    plain = torch.cat([encoder(**part) for part in parts])
    after = torch.get_rng_state()
    expected = torch.autograd.grad(plain, list(encoder.parameters()), upstream)
    torch.manual_seed(1)
    vectors = cached_encode(encoder, inputs, 2)
    assert torch.equal(torch.get_rng_state(), after)
    torch.rand(3)  # as a loss may
    between = torch.get_rng_state()
    actual = torch.autograd.grad(vectors, list(encoder.parameters()), upstream)
    assert torch.equal(torch.get_rng_state(), between)
    torch.testing.assert_close(vectors, plain)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    encoder.eval()
    assert not torch.allclose(vectors, encoder(**inputs))


def test_autocast_in_all_passes():
    """Also where the gradient is asked for outside, and where a plain pass follows within."""
    encoder = encoder_of(dtype=torch.float32)
    inputs = encoder.tokenize(["a quick fox", "the lazy dog", "over a tree", "under an old"])
    parts = [{name: x[rows] for name, x in inputs.items()} for rows in (slice(2), slice(2, 4))]
    parameters = list(encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.cat([encoder(**part) for part in parts])
        whole = encoder(**inputs)
    expected = torch.autograd.grad(plain, parameters, UPSTREAM[:4].float())
    expected_whole = torch.autograd.grad(whole, parameters, UPSTREAM[:4].float())
    with torch.autocast("cpu", torch.bfloat16):
        vectors = cached_encode(encoder, inputs, 2)
        afterwards = encoder(**inputs)
    torch.testing.assert_close(vectors, plain)
    actual = torch.autograd.grad(vectors, parameters, UPSTREAM[:4].float())
    actual_whole = torch.autograd.grad(afterwards, parameters, UPSTREAM[:4].float())
    tolerance = {"rtol": 0.02, "atol": 0.02}  # mini-batches add bfloat16 gradients up otherwise
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    for mine, theirs in zip(actual_whole, expected_whole, strict=True):
        torch.testing.assert_close(mine, theirs)
