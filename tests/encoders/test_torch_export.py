"""Programs that torch.export makes give the vectors of their model."""

import copy
import io

import pytest
import torch
from torch.export import Dim

import splade_fast as sf
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from tests.tiny_models import (
    VOCAB_SIZE,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
)

FAMILIES = {**masked_lm_configs(), **causal_lm_configs()}
TEXTS = ["quick fox", "the lazy dog sleeps under an old tree"]


def make(kind, family):
    config = copy.copy(FAMILIES[family])
    config.num_hidden_layers = 1
    model = make_model(config)
    if kind == "accelerated":
        return sf.accelerate(model)
    if kind == "bag_of_words":
        return BagOfWordsQueryEncoder(make_tokenizer()).eval()
    if kind == "term_weights":
        return TermWeightEncoder(model.base_model, make_tokenizer())
    return SpladeEncoder(model, make_tokenizer())


def inputs_of(texts):
    tokens = make_tokenizer()(texts, padding=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def vectors(output):
    return getattr(output, "pooled", output)


@pytest.mark.parametrize(
    ("kind", "family", "strict"),
    [
        ("splade", "bert", False),
        pytest.param("accelerated", "bert", False, marks=pytest.mark.exhaustive),
        pytest.param("splade", "bert", True, marks=pytest.mark.exhaustive),
        pytest.param("accelerated", "bert", True, marks=pytest.mark.exhaustive),
        pytest.param("splade", "modernbert", False, marks=pytest.mark.exhaustive),
        pytest.param("splade", "llama", False, marks=pytest.mark.exhaustive),
        pytest.param("term_weights", "bert", False, marks=pytest.mark.exhaustive),
        pytest.param("bag_of_words", "bert", False, marks=pytest.mark.exhaustive),
    ],
)
def test_programs_give_the_vectors_of_the_model_for_texts_of_any_number_and_length(
    kind, family, strict
):
    model = make(kind, family)
    sizes = {0: Dim("batch"), 1: Dim("length", max=64)}
    names = {"input_ids": sizes, "attention_mask": sizes}
    program = torch.export.export(model, inputs_of(TEXTS), dynamic_shapes=names, strict=strict)
    others = inputs_of(["a brown fox", "", "quick dog"])
    with torch.no_grad():
        torch.testing.assert_close(
            vectors(program.module()(*others)), vectors(model(*others)), rtol=0, atol=0
        )
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in program.graph.nodes]
    assert not any(len(shape) == 3 and shape[2] == VOCAB_SIZE for shape in shapes)


def test_a_model_works_as_before_after_an_export_and_a_program_can_be_saved():
    model = make("accelerated", "bert")
    inputs = inputs_of(TEXTS)
    expected = model(*inputs).pooled
    program = torch.export.export(model, inputs)
    assert torch.equal(model(*inputs).pooled, expected)
    assert model(*inputs).pooled.requires_grad
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(vectors(loaded(*inputs)), expected)
    assert "forward" not in model.get_output_embeddings().__dict__
    sf.restore(model)
    assert model(*inputs).logits.shape[-1] == VOCAB_SIZE
