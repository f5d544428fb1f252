"""Poolings, the scale of logits and echoes of SpladeEncoder, against the model's own logits."""

import copy
import json

import pytest
import torch
from transformers import BertTokenizerLegacy

from splade_fast import reference
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.search.fingerprint import Fingerprint
from tests.tiny_models import (
    VOCAB_SIZE,
    causal_lm_configs,
    gemma_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
)
from tests.tolerances import assert_accurate, assert_accurate_gradients

FAMILIES = {
    **causal_lm_configs(),
    **gemma_configs(),
    "modernbert": masked_lm_configs()["modernbert"],
}
TEXTS = ["quick fox", "the lazy dog sleeps under an old tree", "a quick dog"]
DOUBLE = {"dtype": torch.float64}
OTHER = {"pooling": "mean", "logit_scale": 0.3, "echo": " again "}  # than SpladePooling has


def make_encoder(family="llama", dtype=torch.float32, **settings):
    model = make_model(copy.deepcopy(FAMILIES[family])).to(dtype)
    return SpladeEncoder(model, make_tokenizer(), EncoderSettings(**settings))


def by_reference(model, inputs, settings, scale):
    """Pool the model's own logits in plain PyTorch."""
    inputs = dict(inputs)
    mask = inputs["attention_mask"] * inputs.pop("pooling_mask", 1)
    logits = model(**inputs).logits * scale
    return reference.splade_pool(logits, mask, pooling=settings.pooling)


def gradients(vectors, model, scale):
    vectors.backward(torch.linspace(0.1, 1, vectors.numel()).view_as(vectors).to(vectors))
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named | {"logit_scale": scale.grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["max", "sum", "mean", "last"])
def test_vectors_and_gradients_are_those_of_the_models_own_logits(family, pooling):
    echo = " a " if pooling in ("mean", "last") else None
    encoder = make_encoder(
        family, pooling=pooling, logit_scale=0.3, train_logit_scale=True, echo=echo
    )
    assert next(iter(encoder.named_parameters()))[0] == "logit_scale"
    inputs = encoder.tokenize(TEXTS)
    ours = encoder(**inputs)
    results = [(ours, gradients(ours, encoder.model, encoder.logit_scale))]
    for dtype in (torch.float64, torch.float32):
        model = make_model(copy.deepcopy(FAMILIES[family])).to(dtype)
        scale = torch.tensor([0.3], requires_grad=True)
        vectors = by_reference(model, inputs, encoder.settings, scale.to(dtype))
        results.append((vectors, gradients(vectors, model, scale)))
    assert (ours > 0).any()
    assert results[0][1]["logit_scale"].shape == (1,)
    for part, compare in ((0, assert_accurate), (1, assert_accurate_gradients)):
        values = [result[part] for result in results]
        compare(*([v.detach() for v in values] if part == 0 else values))


def test_fixed_scales_and_settings_that_change_later():
    encoder = make_encoder(dtype=torch.float64, logit_scale=1 / 16)
    inputs = encoder.tokenize(TEXTS)
    assert encoder.logit_scale is None
    for pooling, scale in (("max", 1 / 16), ("last", 1 / 16), ("mean", 3.0)):
        encoder.settings.pooling, encoder.settings.logit_scale = pooling, scale
        expected = by_reference(encoder.model, inputs, encoder.settings, scale)
        torch.testing.assert_close(encoder(**inputs), expected)
        rows = encoder.encode(TEXTS, batch_size=2, show_progress=False)
        torch.testing.assert_close(rows.to_dense(), expected)


def test_an_echo_repeats_the_text_behind_its_prompt():
    encoder = make_encoder(echo=" jumps ")
    words = encoder.tokenizer.convert_ids_to_tokens
    inputs = encoder.tokenize(["quick fox", "", "dog"], prompt="the old ")
    assert [words(row) for row in inputs["input_ids"].tolist()] == [
        ["[CLS]", "the", "old", "quick", "fox", "jumps", "quick", "fox", "[SEP]"],
        ["[CLS]", "the", "old", "jumps", "[SEP]", *["[PAD]"] * 4],
        ["[CLS]", "the", "old", "dog", "jumps", "dog", "[SEP]", "[PAD]", "[PAD]"],
    ]
    assert inputs["pooling_mask"].tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
    ]
    assert not encoder(**inputs)[1].any()


def test_both_copies_are_cut_alike():
    encoder = make_encoder(echo=" jumps ")
    ids = encoder.tokenize("the lazy dog sleeps under a tree", 10, "old ")["input_ids"]
    shown = " ".join(encoder.tokenizer.convert_ids_to_tokens(ids[0].tolist()))
    assert shown == "[CLS] old the lazy dog jumps the lazy dog [SEP]"
    with pytest.raises(ValueError, match="max_length must be at least 6 for two copies .* got 5"):
        encoder.tokenize("dog", 5, "old ")


def test_a_causal_model_sees_the_whole_text_before_its_second_copy():
    """The vector of the second copy depends on the last word at every pooled position."""
    encoder = make_encoder(dtype=torch.float64, pooling="max", echo=" ")
    inputs = encoder.tokenize(["fox dog lazy", "fox dog tree"])
    first = inputs["pooling_mask"].cumsum(1) == 1  # the first word of the second copy
    inputs["pooling_mask"] *= first
    fox_before_lazy, fox_before_tree = encoder(**inputs)
    assert not torch.allclose(fox_before_lazy, fox_before_tree)
    encoder.settings.echo = None
    inputs = encoder.tokenize(["fox dog lazy", "fox dog tree"])
    only = torch.zeros_like(inputs["input_ids"])
    only[:, 1] = 1
    alone = encoder(**inputs, pooling_mask=only)
    torch.testing.assert_close(alone[0], alone[1])


@pytest.mark.parametrize("has_training", [False, True])
def test_a_saved_folder_keeps_the_settings(tmp_path, has_training):
    folder = save_checkpoint(FAMILIES["llama"], tmp_path / "base")
    prompts = {"query": "the old "}
    encoder = SpladeEncoder.from_pretrained(
        folder, **OTHER, train_logit_scale=has_training, prompts=prompts, **DOUBLE
    )
    if has_training:
        with torch.no_grad():
            encoder.logit_scale += 0.1
    expected = encoder.encode(TEXTS, prompt_name="query", show_progress=False)
    encoder.save_pretrained(tmp_path / "saved")
    again = SpladeEncoder.from_pretrained(tmp_path / "saved", **DOUBLE)
    assert again.settings.prompts == prompts
    assert (again.logit_scale is not None) == has_training
    assert again.settings.logit_scale == pytest.approx(0.4 if has_training else 0.3, abs=1e-15)
    assert again.encode(TEXTS, prompt_name="query", show_progress=False).equal(expected)
    assert Fingerprint.of(again, "query", 16) == Fingerprint.of(encoder, "query", 16)
    changed = SpladeEncoder.from_pretrained(
        tmp_path / "saved", logit_scale=0.5, train_logit_scale=False, pooling="last", **DOUBLE
    )
    assert (changed.settings.logit_scale, changed.settings.pooling) == (0.5, "last")
    assert (changed.logit_scale, changed.settings.echo) == (None, " again ")


@pytest.mark.parametrize("setting", OTHER)
def test_sentence_transformers_refuses_what_its_modules_lack(tmp_path, setting):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "base")
    encoder = SpladeEncoder.from_pretrained(folder, **{setting: OTHER[setting]})
    encoder.save_pretrained(tmp_path / "saved")
    name = "pooling_strategy" if setting == "pooling" else setting
    with pytest.raises((TypeError, ValueError), match=name):
        sentence_transformers.SparseEncoder(str(tmp_path / "saved"), device="cpu")


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        ({"logit_scale": 0.5}, ["settings"]),
        ({"echo": " "}, ["settings"]),
        ({"pooling": "mean"}, ["settings"]),
        ({"attention": "bidirectional"}, ["settings"]),
        ({"logit_scale": 1.0, "train_logit_scale": True}, ["weights"]),
    ],
    ids=str,
)
def test_fingerprints_differ(settings, differences):
    plain, other = make_encoder(), make_encoder(**settings)
    before, after = (Fingerprint.of(encoder, "document", 16) for encoder in (plain, other))
    assert after.differences(before) == differences


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pooling": "min"}, ValueError, "pooling must be one of 'max', 'sum', .* got 'min'"),
        ({"activation": "gelu"}, ValueError, "activation must be one of .* got 'gelu'"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be greater than 0, got 0.0"),
        ({"logit_scale": "1"}, TypeError, "logit_scale must be a number"),
        ({"train_logit_scale": "no"}, TypeError, "train_logit_scale must be a bool, got 'no'"),
        ({"echo": 3}, TypeError, "echo must be a text, got int"),
        ({"echo": "\ud800"}, ValueError, "echo must be Unicode text"),
    ],
    ids=str,
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        EncoderSettings(**settings)


def test_settings_of_a_folder_are_checked(tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    file = tmp_path / "1_SpladePooling" / "config.json"
    file.write_text(json.dumps({"pooling_strategy": "min"}))
    with pytest.raises(ValueError, match=r"the settings of .* are not supported: pooling must be"):
        SpladeEncoder.from_pretrained(tmp_path)


def test_slow_tokenizers_give_no_echo(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(make_tokenizer().get_vocab()))
    encoder = make_encoder(echo=" ")
    encoder.tokenizer = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match="echo needs a fast tokenizer"):
        encoder.tokenize("quick fox")


def test_encoders_without_a_head_refuse_its_settings(tmp_path):
    settings = EncoderSettings(echo=" ")
    bert = make_model(masked_lm_configs()["bert"]).bert
    for make in (
        lambda: TermWeightEncoder(bert, make_tokenizer(), settings),
        lambda: BagOfWordsQueryEncoder(make_tokenizer(), None, settings),
    ):
        with pytest.raises(ValueError, match="settings.echo must be left out for an encoder"):
            make()
    with pytest.raises(ValueError, match="attention must be left out for an encoder without"):
        TermWeightEncoder.from_pretrained(tmp_path, attention="bidirectional")


def test_compiles_whole():
    torch.compiler.reset()
    encoder = make_encoder(
        attention="bidirectional", pooling="mean", train_logit_scale=True, echo=" "
    )
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    inputs = encoder.tokenize(TEXTS)
    torch.testing.assert_close(compiled(**inputs), encoder(**inputs))
    assert encoder(**inputs).shape == (len(TEXTS), VOCAB_SIZE)
