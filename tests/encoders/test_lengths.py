"""Limits of a text's length: those of the arguments, the tokenizer, the settings and the model."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, MPNetConfig
from typer.testing import CliRunner

from splade_fast.cli import app
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from tests.tiny_models import (
    VOCAB_SIZE,
    WORDS,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
)

CONFIGS = {**masked_lm_configs(), **causal_lm_configs()}
LONG = " ".join(WORDS * 20)
OFFSET = {"roberta": 1, "xlm-roberta": 1}  # the first position is the one after the padding's


def make_unlimited_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def make_encoder(family="bert", **options):
    return SpladeEncoder(make_model(CONFIGS[family]), make_unlimited_tokenizer(), **options)


def columns(encoder, max_length):
    return encoder.tokenize([LONG], max_length)["input_ids"].shape[1]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_positions_of_the_model_are_a_limit(family):
    encoder = make_encoder(family)
    limit = 64 - OFFSET.get(family, 0)
    assert columns(encoder, 10_000) == limit
    rows = encoder.encode([LONG], max_length=10_000, show_progress=False)
    assert rows.equal(encoder.encode([LONG], max_length=limit, show_progress=False))


def test_the_padding_shifts_the_positions():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = MPNetConfig(vocab_size=VOCAB_SIZE, **sizes, max_position_embeddings=40)
    model = AutoModelForMaskedLM.from_config(config).eval()
    encoder = SpladeEncoder(model, make_unlimited_tokenizer())
    assert columns(encoder, 10_000) == 38
    encoder.encode([LONG], max_length=10_000, show_progress=False)


def test_term_weights_have_the_limit_of_their_model():
    model = make_model(CONFIGS["roberta"]).base_model
    encoder = TermWeightEncoder(model, make_unlimited_tokenizer())
    assert columns(encoder, 10_000) == 63
    encoder.encode([LONG], max_length=10_000, show_progress=False)


def test_bags_of_words_have_no_positions():
    encoder = BagOfWordsQueryEncoder(make_unlimited_tokenizer())
    assert columns(encoder, 10_000) == len(WORDS) * 20


def test_a_loaded_tokenizer_without_a_limit(tmp_path):
    folder = save_checkpoint(CONFIGS["roberta"], tmp_path / "model")
    make_unlimited_tokenizer().save_pretrained(folder)
    assert columns(SpladeEncoder.from_pretrained(folder), 10_000) == 63


def test_the_special_tokens_alone_are_an_empty_text():
    encoder = make_encoder()
    short, empty = encoder.encode(["quick fox", ""], max_length=2, show_progress=False).to_dense()
    torch.testing.assert_close(short, empty)


def test_a_length_without_room_for_the_special_tokens_is_refused():
    message = "max_length must be at least 2, the number of special tokens of a text, got 1"
    encoder = make_encoder()
    with pytest.raises(ValueError, match=message):
        encoder.encode(["quick fox"], max_length=1)
    with pytest.raises(ValueError, match=message):
        encoder.tokenize(["quick fox"], 1)
    with pytest.raises(ValueError, match=message):
        make_encoder(settings=EncoderSettings(max_length=1)).encode(["quick fox"])
    bag = BagOfWordsQueryEncoder(make_tokenizer())
    assert bag.encode(["quick fox"], max_length=1, show_progress=False).lengths.tolist() == [1]


def test_the_command_refuses_it_too(tmp_path):
    folder = save_checkpoint(CONFIGS["bert"], tmp_path / "model")
    (tmp_path / "corpus.tsv").write_text("1\tquick fox\n")
    arguments = ["encode", tmp_path / "corpus.tsv", tmp_path / "index", "--model", folder]
    result = CliRunner().invoke(app, [*map(str, arguments), "--max-length", "1"])
    assert result.exit_code == 2
    assert "Error: max_length must be at least 2, the number of special tokens" in result.output
