"""SpladeEncoder in training: model families, autocast, torch.compile and threads."""

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from splade_fast import reference
from splade_fast.encoders.splade import SpladeEncoder
from tests.adapters import WAYS, with_adapters
from tests.selection import ALL
from tests.tiny_models import (
    VOCAB_SIZE,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
    tied_weights,
)
from tests.tolerances import assert_accurate, assert_accurate_gradients

MASKED, CAUSAL = masked_lm_configs(), causal_lm_configs()
FAMILIES = {**MASKED, **CAUSAL}
COMPILED = ["bert"]  # tests/integrations/test_transformers.py compiles a llama
if os.environ.get(ALL):
    COMPILED += ["llama", "modernbert", "deberta-v3", "qwen3"]
TEXTS = ["quick fox", "the lazy dog sleeps under an old tree", "unknownword", "a quick dog"]
UPSTREAM = torch.linspace(0.1, 1, len(TEXTS) * VOCAB_SIZE, dtype=torch.float64).view(len(TEXTS), -1)


def make_encoder(config, dtype=torch.float32):
    return SpladeEncoder(make_model(config).to(dtype), make_tokenizer())


def by_reference(model, inputs, pooling_mask=None):
    """Pool the model's own logits in plain PyTorch."""
    mask = inputs["attention_mask"]
    logits = model(**inputs).logits
    return reference.splade_pool(logits, mask if pooling_mask is None else mask * pooling_mask)


def gradients(vectors, model):
    """Return the gradients of all parameters that have one, by name."""
    model.zero_grad()
    vectors.backward(UPSTREAM.to(vectors.dtype))
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert named
    return named


def assert_same_training(ours, baseline, truth):
    """Compare (vectors, gradients) of ours and of PyTorch in the same dtype with float64."""
    vectors, parameters = truth
    assert (vectors > 0).any()
    assert (vectors == 0).any()
    assert_accurate(ours[0].detach(), vectors.detach(), baseline[0].detach())
    assert_accurate_gradients(ours[1], parameters, baseline[1])


def trained(model, forward):
    vectors = forward()
    return vectors, gradients(vectors, model)


@pytest.mark.parametrize("masked_positions", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_gradients_are_those_of_the_models_own_logits(family, masked_positions):
    encoder = make_encoder(FAMILIES[family])
    inputs = encoder.tokenize(TEXTS)
    pooling_mask = None
    if masked_positions:
        pooling_mask = torch.ones_like(inputs["input_ids"])
        pooling_mask[:, :2] = 0  # a prompt
    plain, exact = copy.deepcopy(encoder.model), copy.deepcopy(encoder.model).double()
    truth = trained(exact, lambda: by_reference(exact, inputs, pooling_mask))
    assert_same_training(
        trained(encoder.model, lambda: encoder(**inputs, pooling_mask=pooling_mask)),
        trained(plain, lambda: by_reference(plain, inputs, pooling_mask)),
        truth,
    )
    encoder.double()  # rounding is small enough to compare each parameter
    vectors, parameters = trained(
        encoder.model, lambda: encoder(**inputs, pooling_mask=pooling_mask)
    )
    torch.testing.assert_close(vectors, truth[0])
    for name, gradient in parameters.items():
        torch.testing.assert_close(gradient, truth[1][name], msg=name)


def test_masks_of_any_kind_leave_positions_out():
    encoder = make_encoder(CAUSAL["llama"])
    inputs = encoder.tokenize(TEXTS)
    kept = torch.zeros_like(inputs["input_ids"])
    kept[:, 1] = 1
    expected = by_reference(encoder.model, inputs, kept)
    for mask in (kept, kept.bool(), kept.float() * -0.5):
        torch.testing.assert_close(encoder(**inputs, pooling_mask=mask), expected)
    assert not encoder(**inputs, pooling_mask=torch.zeros_like(kept)).any()
    with pytest.raises(ValueError, match=r"pooling_mask must be \(batch, length\) = \(4, "):
        encoder(**inputs, pooling_mask=kept[:, 1:])
    with pytest.raises(TypeError, match="pooling_mask must be a tensor, got list"):
        encoder(**inputs, pooling_mask=kept.tolist())


@pytest.mark.parametrize("family", [*MASKED, "qwen2"])
def test_tied_decoders_stay_tied(family, tmp_path):
    auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    folder = save_checkpoint(FAMILIES[family], tmp_path / "start")
    encoder = SpladeEncoder.from_pretrained(folder)
    assert tied_weights(encoder.model)
    inputs = encoder.tokenize(TEXTS)

    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
    before = encoder.model.get_input_embeddings().weight.detach().clone()
    encoder(**inputs).sum().backward()
    gradient = encoder.model.get_input_embeddings().weight.grad
    absent = sorted(set(range(VOCAB_SIZE)) - set(inputs["input_ids"].flatten().tolist()))
    assert gradient[absent].any()  # these rows get their gradient from the decoder alone
    untied = copy.deepcopy(encoder.model)
    decoder = untied.get_output_embeddings()
    decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
    untied.zero_grad()
    by_reference(untied, inputs).sum().backward()
    both = untied.get_input_embeddings().weight.grad + decoder.weight.grad
    assert untied.get_input_embeddings().weight.grad.any()
    torch.testing.assert_close(gradient, both, rtol=1e-4, atol=1e-4)
    optimizer.step()
    assert not torch.equal(before, encoder.model.get_input_embeddings().weight)

    encoder.save_pretrained(tmp_path / "saved")
    again = SpladeEncoder.from_pretrained(tmp_path / "saved")
    plain = auto.from_pretrained(tmp_path / "saved").eval()
    assert tied_weights(again.model)
    assert tied_weights(plain)
    assert torch.equal(again(**inputs), encoder(**inputs))
    torch.testing.assert_close(by_reference(plain, inputs), encoder(**inputs))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    encoder = make_encoder(FAMILIES[family])
    inputs = encoder.tokenize(TEXTS)
    for module in encoder.modules():  # train mode, but without dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = encoder.model.config
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    encoder.train()
    runs = []
    layer = next(
        m
        for name, m in encoder.model.named_modules()
        if name.endswith("layers.0.mlp" if family != "bert" else "layer.0.intermediate")
    )
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    expected = trained(encoder.model, lambda: encoder(**inputs))
    assert len(runs) == 1
    encoder.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = trained(encoder.model, lambda: encoder(**inputs))
    assert len(runs) == 3  # the backward runs the layer again
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, expected[1][name]), name


# transformers' own DeBERTa (not v2, v3) overflows: it fills bfloat16 scores with float32's lowest.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deberta"])
def test_autocast(family):
    encoder = make_encoder(FAMILIES[family])
    inputs = encoder.tokenize(TEXTS)
    exact, plain = copy.deepcopy(encoder.model).double(), copy.deepcopy(encoder.model)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = encoder(**inputs)
        baseline = by_reference(plain, inputs).float()
    assert vectors.dtype == torch.float32
    assert_same_training(
        (vectors, gradients(vectors, encoder.model)),
        (baseline, gradients(baseline, plain)),
        trained(exact, lambda: by_reference(exact, inputs)),
    )


@pytest.mark.parametrize("family", COMPILED)
def test_compiles_whole(family):
    torch.compiler.reset()
    encoder = make_encoder(FAMILIES[family])
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for texts in (TEXTS, [*TEXTS[2:], "quick", "under the old tree"]):
        inputs = encoder.tokenize(texts)
        expected = trained(encoder.model, lambda inputs=inputs: encoder(**inputs))
        actual = trained(encoder.model, lambda inputs=inputs: compiled(**inputs))
        torch.testing.assert_close(actual[0], expected[0])
        for name, gradient in actual[1].items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-4)
    logits = encoder.model(**inputs).logits  # the model itself still has its decoder
    assert logits.shape[-1] == VOCAB_SIZE


def test_compiles_where_the_model_breaks_the_graph():
    torch.compiler.reset()
    encoder = make_encoder(MASKED["deberta"])
    inputs = encoder.tokenize(TEXTS)
    expected = trained(encoder.model, lambda: encoder(**inputs))
    compiled = torch.compile(encoder, backend="aot_eager")
    actual = trained(encoder.model, lambda: compiled(**inputs))
    torch.testing.assert_close(actual[0], expected[0])
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder(**inputs), expected[0])


def test_threads_share_an_encoder():
    encoder = make_encoder(MASKED["bert"])
    inside, elsewhere = threading.Event(), threading.Event()

    def wait_inside(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert elsewhere.wait(60)

    encoder.model.get_input_embeddings().register_forward_hook(wait_inside)
    inputs = encoder.tokenize(TEXTS)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(encoder, **inputs)
        assert inside.wait(60)
        logits = encoder.model(**inputs).logits  # the other thread's hook is not active here
        vectors = encoder(**inputs)
        elsewhere.set()
        assert torch.equal(other.result(), vectors)
    assert logits.shape[-1] == VOCAB_SIZE


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_train_save_and_load(family, way, tmp_path):
    folder = save_checkpoint(FAMILIES[family], tmp_path / "base")
    encoder = SpladeEncoder.from_pretrained(folder)
    encoder = with_adapters(encoder, way, init_lora_weights=False).eval()
    inputs = encoder.tokenize(TEXTS)
    plain, exact = copy.deepcopy(encoder.model), copy.deepcopy(encoder.model).double()
    ours = trained(encoder.model, lambda: encoder(**inputs))
    assert all("lora_" in name for name in ours[1])
    assert_same_training(
        ours,
        trained(plain, lambda: by_reference(plain, inputs)),
        trained(exact, lambda: by_reference(exact, inputs)),
    )
    encoder.save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    again = SpladeEncoder.from_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(again(**inputs), ours[0])
    assert not torch.allclose(SpladeEncoder.from_pretrained(folder)(**inputs), ours[0])
    if family in MASKED:
        sentence_transformers = pytest.importorskip("sentence_transformers")
        theirs = sentence_transformers.SparseEncoder(str(tmp_path / "adapters"), device="cpu")
        vectors = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
        torch.testing.assert_close(vectors, ours[0].detach())


@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_the_decoder_are_refused(way):
    encoder = make_encoder(MASKED["bert"])
    inputs = encoder.tokenize(TEXTS)
    with pytest.raises(ValueError, match=r"Linear, got peft\..*; keep adapters off the decoder"):
        with_adapters(encoder, way, target_modules=["decoder"])(**inputs)
