"""Tests of the batches of encode: their texts and their features."""

import pytest
import torch
from sentence_transformers.base.modules import Transformer

from splade_fast.encoders.threads import submodules
from splade_fast.integrations.sentence_transformers import accelerate
from splade_fast.integrations.sentence_transformers.batches import batches
from tests.integrations.sparse_encoders import inference_free, sentences, splade
from tests.selection import pairwise
from tests.tiny_models import make_tokenizer

# The first texts are the longest in characters, the last are the longest in tokens.
MISLEADING = ["unknownwords " * 2] * 3 + ["a " * 8] * 3 + ["sleeps " * 3] * 3

needs_processing = pytest.mark.skipif(
    not hasattr(Transformer, "_merge_processing_kwargs"),
    reason="sentence-transformers 5.4 has no processing_kwargs",
)


def assert_features_are_theirs(model, texts, batch_size=3, prompt=None, **options):
    """Compare the features of every batch with preprocess bit for bit, and return their widths."""
    seen, widths = [], []
    for places, features in batches(model, submodules(model), texts, batch_size, prompt, options):
        expected = model.preprocess([texts[i] for i in places], prompt=prompt, **options)
        assert list(features) == list(expected)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(features[name], value)
                assert features[name].dtype == value.dtype
            else:
                assert features[name] == value
        seen += places.tolist()
        widths.append(features["input_ids"].shape[1])
    assert sorted(seen) == list(range(len(texts)))
    assert len(widths) == -(-len(texts) // batch_size)
    return widths


@pairwise(
    padding_side=["left", "right"],
    prompt=[None, "a quick "],
    texts=[
        pytest.param(MISLEADING, id="misleading"),
        pytest.param(sentences(10), id="sentences"),
        pytest.param(["", "a", "", "a", ""], id="short"),
    ],
)
def test_features_are_theirs(padding_side, prompt, texts, tmp_path):
    model = accelerate(splade(tmp_path))
    model.tokenizer.padding_side = padding_side
    assert_features_are_theirs(model, texts, prompt=prompt)


@pytest.mark.parametrize("task", ["query", "document"])
def test_features_of_a_router_are_theirs(task, tmp_path):
    assert_features_are_theirs(accelerate(inference_free(tmp_path)), MISLEADING, task=task)


def test_texts_of_as_many_tokens_go_together(tmp_path):
    model = accelerate(splade(tmp_path))
    assert assert_features_are_theirs(model, MISLEADING) == [10, 5, 4]


def test_pairs_stay_in_the_order_of_their_characters(tmp_path):
    model = accelerate(splade(tmp_path))
    pairs = [(text, "a") for text in MISLEADING]
    found = [
        set(places.tolist()) for places, _ in batches(model, submodules(model), pairs, 3, None, {})
    ]
    assert found == [{0, 1, 2}, {6, 7, 8}, {3, 4, 5}]


@needs_processing
@pytest.mark.parametrize(
    "padding", [{"padding": "max_length"}, {"padding": True, "pad_to_multiple_of": 8}]
)
def test_padding_that_was_asked_for_stays(padding, tmp_path):
    """Check that padding which the caller requested stays, since compiled models may need it."""
    model = accelerate(splade(tmp_path))
    model[0].processing_kwargs = {"text": padding}
    widths = assert_features_are_theirs(model, MISLEADING)
    assert all(width % 8 == 0 for width in widths)


@needs_processing
def test_the_end_of_a_chat_template_survives_truncation(tmp_path):
    """Check the end of a template, which sentence-transformers restores only in tensors."""
    model = splade(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "the {{ messages[0].content }} tree"
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"), transformer_task="fill-mask")
    transformer.max_seq_length = 6
    model[0] = transformer
    accelerate(model)
    assert "message" in transformer.modality_config
    assert_features_are_theirs(model, MISLEADING)
    tree = tokenizer.convert_tokens_to_ids("tree")
    for _, features in batches(model, submodules(model), MISLEADING, 3, None, {}):
        assert (features["input_ids"] == tree).any(1).all()
