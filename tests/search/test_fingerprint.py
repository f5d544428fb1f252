"""Fingerprints: equal for equal encoders however they were loaded, and for no others."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.fingerprint import Fingerprint
from tests.search.corpora import LengthEncoder
from tests.tiny_models import make_tokenizer, masked_lm_configs, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert"))


@pytest.fixture
def encoder(folder):
    return SpladeEncoder.from_pretrained(folder)


def fingerprint(encoder, role="document", max_length=16, dtype=None):
    return Fingerprint.of(encoder, role, max_length, dtype)


def test_equal_however_the_model_was_loaded(folder, encoder, tmp_path):
    expected = fingerprint(encoder)
    assert expected == fingerprint(SpladeEncoder.from_pretrained(str(folder)))
    encoder.save_pretrained(tmp_path / "copy")  # as a folder of sentence-transformers as well
    assert expected == fingerprint(SpladeEncoder.from_pretrained(tmp_path / "copy"))
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert expected == fingerprint(SpladeEncoder(model, AutoTokenizer.from_pretrained(folder)))
    encoder.encode(["fox", "lazy dog"], max_length=2, show_progress=False)
    assert expected == fingerprint(encoder.train())


def test_known_digests():
    """A change of these digests would part all indexes from their models."""
    encoder = LengthEncoder()
    encoder.anchor = torch.nn.Parameter(torch.arange(2000) / 7)
    assert asdict(fingerprint(encoder)) == {
        "dtype": "float32",
        "weights": "a47cf210b7af80bdbbdff33ae86139b7",
        "vocabulary": "604424d3fc98ab736dc1ff188d1afdcc",
        "settings": "ad3faae27ad980791f77ae1f8712a5cf",
    }


@pytest.mark.parametrize("place", ["first", "last"])
def test_any_number_that_training_changes(encoder, place):
    before = fingerprint(encoder)
    for parameter in encoder.parameters():
        values = parameter.data.view(-1)
        number = 0 if place == "first" else -1
        original = values[number].clone()
        values[number] = torch.nextafter(original, torch.tensor(9.0))
        assert fingerprint(encoder).differences(before) == ["weights"]
        values[number] = original
    assert fingerprint(encoder) == before


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 5000])
def test_every_number_of_a_vector_counts(size, monkeypatch):
    monkeypatch.setattr("splade_fast.search.fingerprint._NUMBERS_AT_A_TIME", 2048)
    encoder = LengthEncoder()
    encoder.anchor = torch.nn.Parameter(torch.rand(size))
    before = fingerprint(encoder)
    for number in {0, size // 2, size - 1} & set(range(size)):
        encoder.anchor.data[number] += 1e-6
        assert fingerprint(encoder) != before
        before = fingerprint(encoder)


@pytest.mark.parametrize(
    ("size", "one", "other"), [(20, 3, 7), (1024, 3, 7), (5000, 3, 7), (5000, 3, 1027)]
)
def test_the_places_of_numbers_count(size, one, other):
    encoder = LengthEncoder()
    encoder.anchor = torch.nn.Parameter(torch.rand(size))
    before = fingerprint(encoder)
    encoder.anchor.data[[one, other]] = encoder.anchor.data[[other, one]]
    assert fingerprint(encoder).differences(before) == ["weights"]


def test_a_transposed_matrix_is_another():
    encoder = LengthEncoder()
    encoder.anchor = torch.nn.Parameter(torch.rand(16, 16))
    before = fingerprint(encoder)
    encoder.anchor.data = encoder.anchor.data.T.contiguous()
    assert fingerprint(encoder).differences(before) == ["weights"]


def test_a_pooling_layer_does_not_count(encoder):
    """Many checkpoints lack it, and transformers draws it at random."""
    before = fingerprint(encoder)
    encoder.model.base_model.pooler = torch.nn.Linear(2, 2)
    assert fingerprint(encoder) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes(folder, encoder, dtype):
    """Weights are compared in the dtype of the index, whichever way they were rounded."""
    rounded = SpladeEncoder.from_pretrained(folder, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert fingerprint(rounded).dtype == name
    assert fingerprint(encoder, dtype=name) == fingerprint(rounded)
    assert fingerprint(encoder) != fingerprint(rounded)
    as_read = fingerprint(rounded.float())  # a checkpoint in 16 bits that was loaded in 32
    assert fingerprint(rounded.to(dtype), dtype="float32") == as_read


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        ({"pooling": "sum"}, ["settings"]),
        ({"activation": "log1p_log1p_relu"}, ["settings"]),
        ({"max_length": 8}, ["settings"]),
        ({"prompts": {"document": "old "}}, ["settings"]),
        ({"prompts": {"x": "old "}, "default_prompt_name": "x"}, ["settings"]),
        ({"prompts": {"query": "old "}}, []),
        ({"max_length": 300}, []),
        ({"subfolder": "0_Transformer"}, []),
    ],
)
def test_settings(encoder, settings, differences):
    before = fingerprint(encoder)
    encoder.settings = EncoderSettings(**settings)
    assert fingerprint(encoder).differences(before) == differences


def test_tokenizers(encoder):
    before = fingerprint(encoder)
    encoder.tokenizer.add_tokens(["zebra"])
    assert "vocabulary" in fingerprint(encoder).differences(before)
    encoder.tokenizer = make_tokenizer()
    assert fingerprint(encoder) == before
    encoder.tokenizer.backend_tokenizer.post_processor = None
    assert fingerprint(encoder).differences(before) == ["settings"]


def test_bags_of_words(encoder):
    weight = torch.rand(len(encoder.tokenizer))
    bags = BagOfWordsQueryEncoder(encoder.tokenizer, weight)
    assert fingerprint(bags, "query").vocabulary == fingerprint(encoder).vocabulary
    weight[7] += 1e-6
    trained = BagOfWordsQueryEncoder(encoder.tokenizer, weight)
    assert fingerprint(trained, "query").differences(fingerprint(bags, "query")) == ["weights"]


@pytest.mark.parametrize("content", [[], {}, {"dtype": "float32"}, "x", 5])
def test_only_fingerprints_are_parsed(encoder, content):
    stored = asdict(fingerprint(encoder))
    assert Fingerprint.parse(json.loads(json.dumps(stored))) == fingerprint(encoder)
    for broken in (content, stored | {"weights": 5}, stored | {"dtype": "Tensor"}):
        with pytest.raises(ValueError, match="a fingerprint must hold texts for dtype, weights"):
            Fingerprint.parse(broken)
