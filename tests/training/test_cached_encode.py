"""cached_encode against encoding the whole batch at once."""

import copy

import pytest
import torch
from transformers import AutoModel

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.training import cached_encode
from tests.adapters import WAYS, with_adapters
from tests.tiny_models import (
    VOCAB_SIZE,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
)
from tests.tolerances import assert_accurate, assert_accurate_gradients
from tests.training.models import texts

FAMILIES = {**masked_lm_configs(), **causal_lm_configs()}
TEXTS = ["fox", "the lazy dog sleeps under an old tree", "quick", "a quick dog", "", "over a dog",
         "an old fox jumps"]  # fmt: skip
UPSTREAM = torch.linspace(0.1, 1, len(TEXTS) * VOCAB_SIZE, dtype=torch.float64).view(len(TEXTS), -1)


def encoder_of(family="bert", dropout=0.0, dtype=torch.float64):
    config = copy.deepcopy(FAMILIES[family])
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, dropout)
    return SpladeEncoder(make_model(config).to(dtype), make_tokenizer())


def trained(encoder, vectors, upstream=UPSTREAM):
    encoder.zero_grad()
    vectors.backward(upstream.to(vectors.dtype))
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


class _Widths(torch.nn.Module):
    """An encoder that notes the shapes of its inputs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.shapes = encoder, []

    def forward(self, **inputs):
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return self.encoder(**inputs)


@pytest.mark.parametrize(("size", "tokens"), [(None, 12), (2, 12), (None, 1), (None, 1000)])
def test_mini_batches_by_tokens(size, tokens):
    """They are as large as the budget allows, and hold one text where it allows none."""
    encoder = encoder_of()
    inputs = encoder.tokenize(TEXTS)
    expected = trained(encoder, encoder(**inputs))
    seen = _Widths(encoder)
    vectors = cached_encode(seen, inputs, size, mini_batch_tokens=tokens)
    shapes = list(seen.shapes)
    for name, gradient in trained(encoder, vectors).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert sum(rows for rows, _ in shapes) == len(TEXTS)
    lengths = sorted(inputs["attention_mask"].sum(1).tolist(), reverse=True)
    for rows, width in shapes:
        assert width == lengths[0]
        assert rows == min(len(lengths), max(1, tokens // width), size or len(lengths))
        del lengths[:rows]


def test_float32_is_as_accurate_as_the_whole_batch():
    """Over many texts, because the largest rounding error of a few depends on luck."""
    encoder = encoder_of(dtype=torch.float32)
    inputs = encoder.tokenize(TEXTS + texts(33, seed=0))
    exact = copy.deepcopy(encoder).double()
    truth, plain = exact(**inputs), encoder(**inputs)
    upstream = torch.linspace(0.1, 1, truth.numel(), dtype=torch.float64).view_as(truth)
    baseline = trained(encoder, plain, upstream)
    vectors = cached_encode(encoder, inputs, 2)
    assert_accurate(vectors.detach(), truth.detach(), plain.detach())
    assert_accurate_gradients(
        trained(encoder, vectors, upstream), trained(exact, truth, upstream), baseline
    )


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


def test_frozen_parameters_get_what_they_get_without():
    encoder = encoder_of()
    encoder.model.bert.embeddings.requires_grad_(False)  # the tied decoder among it
    assert_same(encoder, 2)
    assert encoder.model.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_adapters_get_what_they_get_without(way):
    encoder = with_adapters(encoder_of(), way, init_lora_weights=False).eval()
    assert_same(encoder, 2)
    assert all("lora_" in name for name, p in encoder.named_parameters() if p.grad is not None)
    encoder.requires_grad_(False)
    assert not cached_encode(encoder, encoder.tokenize(TEXTS), 2).requires_grad


def test_gradients_add_up_and_hooks_run_once():
    """Two passes in one loss, as DistributedDataParallel and gradient accumulation need it."""
    encoder = encoder_of()
    inputs = encoder.tokenize(TEXTS)
    runs = []
    weight = encoder.model.get_input_embeddings().weight
    hook = weight.register_post_accumulate_grad_hook(lambda p: runs.append(p.grad.clone()))
    encoder.zero_grad()
    for _ in range(2):
        vectors = cached_encode(encoder, inputs, 2)
        more = cached_encode(encoder, {name: x[:4] for name, x in inputs.items()}, 3)
        (vectors.square().sum() + more.sum()).backward()
    hook.remove()
    assert len(runs) == 2
    torch.testing.assert_close(runs[1], 2 * runs[0])
    encoder.zero_grad()
    plain = encoder(**inputs)
    (plain.square().sum() + plain[:4].sum()).backward()
    torch.testing.assert_close(runs[0], weight.grad)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_inside(family):
    encoder = encoder_of(family).train()
    encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(encoder, 2)
    encoder.model.gradient_checkpointing_enable({"use_reentrant": True})
    vectors = cached_encode(encoder, encoder.tokenize(TEXTS), 2)
    with pytest.raises(RuntimeError, match="you can either set use_reentrant=False"):
        vectors.sum().backward()


def test_memory_is_that_of_a_mini_batch():
    """The tensors that autograd keeps do not grow with the number of mini-batches."""

    def most_kept(texts, encode):
        encoder = encoder_of().train()
        inputs = encoder.tokenize(texts)
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        kept, most = {}, 0

        def pack(tensor):
            nonlocal most
            if tensor.untyped_storage().data_ptr() not in own:
                kept[key := object()] = tensor.numel()
                most = max(most, sum(kept.values()))
                return _Packed(tensor, lambda: kept.pop(key))
            return _Packed(tensor, lambda: None)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            vectors = encode(encoder, inputs)
            vectors.backward(torch.ones_like(vectors))
        return most

    text = "the lazy dog sleeps under an old tree"
    one = most_kept([text] * 2, lambda encoder, inputs: encoder(**inputs))
    many = most_kept([text] * 16, lambda encoder, inputs: cached_encode(encoder, inputs, 2))
    whole = most_kept([text] * 16, lambda encoder, inputs: encoder(**inputs))
    assert one <= many <= 1.1 * one
    assert whole > 6 * one


class _Packed:
    """A tensor that autograd keeps; says when it is let go."""

    def __init__(self, tensor, let_go):
        self.tensor, self.let_go = tensor, let_go

    def __del__(self):
        self.let_go()


def test_what_cannot_be_is_refused():
    encoder = encoder_of()
    inputs = encoder.tokenize(TEXTS)
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, got 0"):
        cached_encode(encoder, inputs, 0)
    with pytest.raises(ValueError, match="inputs must have as many rows each, got .*: 7, "):
        cached_encode(encoder, {**inputs, "attention_mask": inputs["attention_mask"][:6]}, 2)
    with pytest.raises(ValueError, match="mini_batch_tokens must be at least 1, got 0"):
        cached_encode(encoder, inputs, mini_batch_tokens=0)
    vectors = cached_encode(encoder, inputs, 2)
    weight = encoder.model.get_input_embeddings().weight
    with pytest.raises(RuntimeError, match="differentiable once, got create_graph=True"):
        torch.autograd.grad(vectors.sum(), weight, create_graph=True)
    vectors = cached_encode(encoder, inputs, 2)
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vectors.sum().backward()


def test_no_gradient_wanted():
    encoder = encoder_of()
    inputs = encoder.tokenize(TEXTS)
    with torch.no_grad():
        vectors = cached_encode(encoder, inputs, 3)
    assert not vectors.requires_grad
    torch.testing.assert_close(vectors, encoder(**inputs))
