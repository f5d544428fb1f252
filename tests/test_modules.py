"""SpladeHead and SpladePool equal the ops, and share parameters with a decoder."""

import copy

import pytest
import torch
from torch import nn

import splade_fast as sf
from splade_fast import reference
from tests.tiny_models import make_model, make_tokenizer, masked_lm_configs

B, L, D, V = 3, 5, 8, 20
OPTIONS = [("max", "log1p_relu"), ("sum", "log1p_log1p_relu"), ("max", "relu")]


@pytest.fixture
def decoder():
    return nn.Linear(D, V)


@pytest.fixture
def hidden():
    return torch.randn(B, L, D, requires_grad=True)


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 0, 0], [1] * L, [0, 1, 0, 1, 0]])


@pytest.mark.parametrize(("pooling", "activation"), OPTIONS)
def test_head_pools_the_decoders_logits(decoder, hidden, mask, pooling, activation):
    head = sf.SpladeHead(decoder, pooling=pooling, activation=activation)
    expected = reference.splade_pool(decoder(hidden), mask, pooling=pooling, activation=activation)
    actual = head(hidden, mask)
    torch.testing.assert_close(actual, expected)
    inputs = (hidden, decoder.weight, decoder.bias)
    for mine, theirs in zip(
        torch.autograd.grad(actual.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_packed_sequences(decoder, hidden):
    head = sf.SpladeHead(decoder)
    starts = torch.tensor([0, L, L, 3 * L], dtype=torch.int32)
    packed = head(hidden.flatten(0, 1), cu_seqlens=starts)
    assert torch.equal(packed[0], head(hidden)[0])
    assert not packed[1].any()
    assert torch.equal(packed[2], head(hidden)[1:].amax(0))


def test_parameters_are_those_of_the_decoder(decoder):
    head = sf.SpladeHead(decoder)
    assert head.weight is decoder.weight
    assert head.bias is decoder.bias
    embedding = nn.Embedding(V, D)
    tied = sf.SpladeHead(embedding.weight, decoder.bias)
    assert tied.weight is embedding.weight
    assert sf.SpladeHead(embedding.weight).bias is None
    assert sf.SpladeHead(nn.Linear(D, V, bias=False)).bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_states_go_from_decoder_to_head_and_back(bias):
    decoder, other = nn.Linear(D, V, bias=bias), nn.Linear(D, V, bias=bias)
    head = sf.SpladeHead(other)
    head.load_state_dict(decoder.state_dict())
    assert torch.equal(other.weight, decoder.weight)
    third = nn.Linear(D, V, bias=bias)
    third.load_state_dict(head.state_dict())
    assert torch.equal(third.weight, decoder.weight)


def test_a_head_in_the_decoders_place_keeps_names_and_ties():
    model = make_model(masked_lm_configs()["bert"])
    names = list(model.state_dict())
    inputs = make_tokenizer()(["quick fox", "a dog sleeps"], padding=True, return_tensors="pt")
    hidden = model.cls.predictions.transform(model.bert(**inputs).last_hidden_state)
    expected = reference.splade_pool(model(**inputs).logits, inputs["attention_mask"])
    head = sf.SpladeHead(model.get_output_embeddings())
    torch.testing.assert_close(head(hidden, inputs["attention_mask"]), expected)
    model.cls.predictions.decoder = head
    assert list(model.state_dict()) == names
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    twin = copy.deepcopy(model)
    assert twin.cls.predictions.decoder.weight is twin.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["head", "pool"])
def test_modules_compile_whole(decoder, hidden, mask, kind):
    module = sf.SpladeHead(decoder) if kind == "head" else sf.SpladePool()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, mask), module(hidden, mask))


@pytest.mark.parametrize(("pooling", "activation"), OPTIONS)
def test_pool(hidden, mask, pooling, activation):
    pool = sf.SpladePool(pooling, activation)
    options = {"pooling": pooling, "activation": activation}
    assert torch.equal(pool(hidden, mask), sf.splade_pool(hidden, mask, **options))
    assert torch.equal(pool(hidden), sf.splade_pool(hidden, **options))
    assert not pool.state_dict()


def test_modules_say_what_they_are(decoder):
    assert repr(sf.SpladeHead(decoder, pooling="sum")) == (
        f"SpladeHead({D}, {V}, bias=True, pooling='sum', activation='log1p_relu', logit_scale=1, "
        "algorithm='auto')"
    )
    assert repr(sf.SpladePool()) == "SpladePool(pooling='max', activation='log1p_relu')"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: sf.SpladeHead(torch.ones(V, D)),
            TypeError,
            "decoder must be a torch.nn.Linear or its weight as a torch.nn.Parameter, got Tensor",
        ),
        (
            lambda: sf.SpladeHead(nn.Parameter(torch.ones(V, D)), torch.ones(V)),
            TypeError,
            "bias must be a torch.nn.Parameter or None, got Tensor",
        ),
        (
            lambda: sf.SpladeHead(nn.Linear(D, V), nn.Parameter(torch.ones(V))),
            ValueError,
            "bias must be None with a torch.nn.Linear",
        ),
        (
            lambda: sf.SpladeHead(nn.Parameter(torch.ones(V, D)), nn.Parameter(torch.ones(D))),
            ValueError,
            r"bias must be \(vocabulary,\) = \(20,\), got \(8,\)",
        ),
        (
            lambda: sf.SpladeHead(nn.Parameter(torch.ones(V))),
            ValueError,
            r"decoder must be \(vocabulary, dim\), got \(20,\)",
        ),
        (lambda: sf.SpladePool("min"), ValueError, "pooling must be one of 'max', 'sum', 'mean'"),
        (lambda: sf.SpladePool(activation="gelu"), ValueError, "activation must be one of"),
        (
            lambda: sf.SpladeHead(nn.Linear(D, V), algorithm="fast"),
            ValueError,
            "algorithm must be one of",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
