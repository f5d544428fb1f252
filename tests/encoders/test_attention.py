"""Causal language models that attend in both directions, against masks made by hand."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from splade_fast import reference
from splade_fast.encoders.attention import find_attention
from splade_fast.encoders.hidden_states import hidden_before_decoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from tests.adapters import with_adapters
from tests.tiny_models import (
    VOCAB_SIZE,
    causal_lm_configs,
    gemma_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
)

FAMILIES = {**causal_lm_configs(), **gemma_configs()}
TEXTS = ["the lazy dog sleeps under an old tree", "quick fox", "a quick brown dog"]
DOUBLE = {"dtype": torch.float64}
# Gemma 2 has transformers' own softmax, in float32, where float64's lowest number overflows.
DTYPES = {"gemma2": torch.float32}
SIDES = ["right", "left"]
UPSTREAM = torch.linspace(0.1, 1, len(TEXTS) * VOCAB_SIZE, dtype=torch.float64).view(len(TEXTS), -1)


def make_encoder(config, attention="bidirectional"):
    settings = EncoderSettings(attention=attention)
    return SpladeEncoder(make_plain(config), make_tokenizer(), settings)


def make_plain(config):
    model = make_model(copy.deepcopy(config))
    return model.to(DTYPES.get(config.model_type, torch.float64))


def padded(side):
    inputs = make_tokenizer()(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def masks_by_hand(config, attention_mask, dtype):
    """Return the masks that a model adds to its scores, by kind of layer, or one for all layers."""
    positions = torch.arange(attention_mask.shape[1])
    distances = (positions[:, None] - positions).abs()
    window = getattr(config, "sliding_window", None)
    near = distances <= (window if window is not None else len(positions))
    is_text = attention_mask.bool()[:, None, None, :]

    def added(seen):
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    everywhere = added(is_text.expand(-1, 1, len(positions), -1))
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        return {"full_attention": everywhere, "sliding_attention": added(is_text & near)}
    return added(is_text & near) if window is not None else everywhere


def trained(model, vectors):
    model.zero_grad()
    vectors.backward(UPSTREAM.to(vectors.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_gradients_equal_those_of_masks_made_by_hand(family, side):
    encoder = make_encoder(FAMILIES[family])
    plain = make_plain(FAMILIES[family])
    inputs = padded(side)
    mask = inputs["attention_mask"]
    logits = plain(
        input_ids=inputs["input_ids"],
        attention_mask=masks_by_hand(plain.config, mask, plain.dtype),
        use_cache=False,
    ).logits
    expected = reference.splade_pool(logits, mask)
    vectors = encoder(**inputs)
    torch.testing.assert_close(vectors, expected)
    assert not torch.allclose(reference.splade_pool(plain(**inputs).logits, mask), expected)
    theirs, mine = trained(plain, expected), trained(encoder.model, vectors)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], msg=name)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_early_tokens_see_later_ones_and_no_token_sees_padding(family, attention, side):
    encoder = make_encoder(FAMILIES[family], attention)
    assert find_attention(encoder.model) == attention
    inputs = padded(side)
    is_text = inputs["attention_mask"].bool()
    before = hidden_before_decoder(encoder.model, **inputs)
    other_padding = inputs | {"input_ids": inputs["input_ids"].where(is_text, 7)}
    after = hidden_before_decoder(encoder.model, **other_padding)
    assert torch.equal(after[is_text], before[is_text])
    ids = inputs["input_ids"].clone()
    last = is_text[1].nonzero()[-1].item()
    ids[1, last] = 9
    changed = hidden_before_decoder(encoder.model, **inputs | {"input_ids": ids})
    is_changed = ((changed - before).abs().amax(-1) > 1e-6)[1, is_text[1]]
    assert is_changed.tolist() == [attention == "bidirectional"] * (len(is_changed) - 1) + [True]


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_saved_folder_keeps_the_attention(family, has_adapters, tmp_path):
    folder = save_checkpoint(FAMILIES[family], tmp_path / "base")
    encoder = SpladeEncoder.from_pretrained(folder, attention="bidirectional", **DOUBLE)
    if has_adapters:
        encoder = with_adapters(encoder, "get_peft_model", init_lora_weights=False).eval()
    expected = encoder.encode(TEXTS, show_progress=False)
    encoder.save_pretrained(tmp_path / "saved")
    again = SpladeEncoder.from_pretrained(tmp_path / "saved", **DOUBLE)
    assert again.settings.attention == "bidirectional"
    assert again.encode(TEXTS, show_progress=False).equal(expected)
    causal = SpladeEncoder.from_pretrained(tmp_path / "saved", attention="causal", **DOUBLE)
    assert not causal.encode(TEXTS, show_progress=False).equal(expected)
    if not has_adapters:
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["is_causal"] is False
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **DOUBLE).eval()
        inputs = padded("right")
        vectors = reference.splade_pool(plain(**inputs).logits, inputs["attention_mask"])
        torch.testing.assert_close(vectors, expected.to_dense())


def test_masked_language_models_attend_in_both_directions_already(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = save_checkpoint(masked_lm_configs()["modernbert"], tmp_path / "base")
    encoder = SpladeEncoder.from_pretrained(folder, attention="bidirectional", **DOUBLE)
    assert not hasattr(encoder.model.config, "is_causal")
    encoder.save_pretrained(tmp_path / "saved")
    theirs = sentence_transformers.SparseEncoder(
        str(tmp_path / "saved"), device="cpu", model_kwargs=DOUBLE
    )
    vectors = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
    torch.testing.assert_close(vectors, encoder.encode(TEXTS, show_progress=False).to_dense())


def test_models_without_the_switch_are_refused_and_stay_as_they_were():
    bert, mamba = (
        make_model(config)
        for config in (
            masked_lm_configs()["bert"],
            MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, state_size=2),
        )
    )
    for model, has, got in ((bert, "bidirectional", "causal"), (mamba, "causal", "bidirectional")):
        config = copy.deepcopy(model.config)
        message = f"attention must be '{has}', the only one of {type(model).__name__}.*'{got}'"
        with pytest.raises(ValueError, match=message):
            SpladeEncoder(model, make_tokenizer(), EncoderSettings(attention=got))
        assert model.config.to_dict() == config.to_dict()
        assert find_attention(model) == has
    with pytest.raises(ValueError, match="attention must be one of 'bidirectional', 'causal'"):
        EncoderSettings(attention="both")
