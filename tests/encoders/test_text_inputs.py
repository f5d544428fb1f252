"""Texts and counts that callers give to encoders."""

import numpy as np
import pytest
import torch

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from tests.tiny_models import make_model, make_tokenizer, masked_lm_configs

TEXTS = ["quick fox", "the lazy dog sleeps under an old tree", "a"]


@pytest.fixture
def encoder():
    return SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())


def test_a_single_string_is_one_text(encoder):
    assert encoder.tokenize("quick fox")["input_ids"].tolist() == [[2, 6, 8, 3]]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "texts must hold at least one text, got none"),
        (["fox", None], TypeError, r"texts\[1\] must be a str, got NoneType"),
        ([("a", "fox")], TypeError, r"texts\[0\] must be a str, got tuple"),
        (["fox", "\ud800"], ValueError, r"texts\[1\] must be Unicode text, got the lone surrogate"),
    ],
)
def test_other_texts_are_refused_before_the_tokenizer(encoder, texts, error, message):
    with pytest.raises(error, match=message):
        encoder.tokenize(texts)


@pytest.mark.parametrize("length", [2.5, True, "5", None])
def test_a_length_is_an_integer(encoder, length):
    with pytest.raises(TypeError, match="max_length must be an integer, got"):
        encoder.tokenize(TEXTS, max_length=length)


def test_counts_of_numpy_are_integers(encoder):
    counts = {"batch_size": np.int32(2), "k": np.int32(3), "max_length": np.int16(5)}
    rows = encoder.encode(TEXTS, **counts, show_progress=False)
    assert rows.equal(encoder.encode(TEXTS, batch_size=2, k=3, max_length=5, show_progress=False))


def test_other_texts_of_a_batch_do_not_change_a_vector_where_the_tokenizer_pads_left(encoder):
    encoder.tokenizer.padding_side = "left"
    alone = [encoder.encode([text], show_progress=False).to_dense() for text in TEXTS]
    together = encoder.encode(TEXTS, show_progress=False).to_dense()
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("kind", ["splade", "terms", "bag"])
def test_a_token_that_the_model_lacks_is_named(encoder, kind):
    if kind == "terms":
        encoder = TermWeightEncoder(encoder.model.bert, encoder.tokenizer)
    if kind == "bag":
        encoder = BagOfWordsQueryEncoder(encoder.tokenizer)
    encoder.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="the 20 tokens of the model, got the token 'zebra' with"):
        encoder.encode(["a zebra"], show_progress=False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_length": "12"}, TypeError, "max_length must be an integer, got str"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"prompts": ["a"]}, TypeError, r"prompts must be texts by name, got \['a'\]"),
        ({"prompts": {"q": None}}, TypeError, "prompts must be texts by name, got {'q': None}"),
        ({"default_prompt_name": "q"}, ValueError, r"default_prompt_name .* one of \[\], got 'q'"),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        EncoderSettings(**settings)


def test_functional_derivatives_name_the_op(encoder):
    inputs = encoder.tokenize(TEXTS)
    weights = {name: weight.detach() for name, weight in encoder.named_parameters()}

    def total(weights):
        return torch.func.functional_call(encoder, weights, kwargs=inputs).sum()

    with pytest.raises(RuntimeError, match="splade_head has no derivative under torch.func.grad"):
        torch.func.grad(total)(weights)
