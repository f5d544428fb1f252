"""Short cuts for single short texts give what the long way gives."""

import copy
import pickle
import threading

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from splade_fast.encoders.hidden_states import takes_no_mask
from splade_fast.encoders.small_work import SMALL, in_this_thread
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.token_lists import is_plain, token_lists
from tests.new_process import call_in_new_process
from tests.tiny_models import (
    WORDS,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
)

TEXTS = ["quick fox", " ".join(WORDS), "a"]
MODELS = masked_lm_configs() | causal_lm_configs()
WIDTH, DYNAMIC = {"cpp.simdlen": 256}, {"cpp.dynamic_threads": True}
OWN = {"cpp.simdlen": 0, "cpp.dynamic_threads": False}


def expected_lists(tokenizer, texts, max_length, add_special_tokens=True):
    return dict(
        copy.deepcopy(tokenizer)(
            texts,
            truncation=True,
            max_length=max_length,
            padding=True,
            padding_side="right",
            add_special_tokens=add_special_tokens,
        )
    )


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[1:2]], ids=["batch", "short", "long"])
@pytest.mark.parametrize("has_special_tokens", [True, False], ids=["special", "bare"])
def test_the_backend_gives_what_the_tokenizer_gives(texts, has_special_tokens):
    tokenizer = make_tokenizer()
    assert is_plain(type(tokenizer))
    for prepare in (
        lambda: None,
        lambda: tokenizer.backend_tokenizer.no_padding(),
        lambda: tokenizer.backend_tokenizer.no_truncation(),
        lambda: tokenizer.backend_tokenizer.enable_padding(length=40),
        lambda: tokenizer.backend_tokenizer.enable_truncation(4, direction="left"),
        lambda: setattr(tokenizer, "truncation_side", "left"),
        lambda: setattr(tokenizer, "padding_side", "left"),
        lambda: setattr(tokenizer, "split_special_tokens", True),
        lambda: setattr(tokenizer, "model_input_names", ["input_ids"]),
        lambda: setattr(tokenizer, "model_input_names", ["input_ids", "token_type_ids"]),
    ):
        prepare()
        for length in (6, 7, 6):
            expected = expected_lists(tokenizer, texts, length, has_special_tokens)
            assert token_lists(tokenizer, texts, length, has_special_tokens) == expected


def test_types_of_tokens_are_those_of_the_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:2 $A:1 [SEP]:0", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for texts in (TEXTS[:1], TEXTS):
        assert token_lists(tokenizer, texts, 9, True) == expected_lists(tokenizer, texts, 9)


def test_a_tokenizer_with_its_own_call_is_called():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **kwargs):
            return super()._encode_plus([one.lower() for one in text], **kwargs)

    tokenizer = make_tokenizer()
    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    assert not is_plain(Shouting)
    found = token_lists(shouting, ["QUICK FOX"], 9, True)
    assert found["input_ids"] == token_lists(tokenizer, ["quick fox"], 9, True)["input_ids"]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_one_text_alone_gets_the_vector_that_it_gets_with_others(name):
    encoder = SpladeEncoder(make_model(MODELS[name]), make_tokenizer())
    together = encoder.encode(TEXTS, show_progress=False).to_dense()
    alone = [encoder.encode([text], show_progress=False).to_dense() for text in TEXTS]
    torch.testing.assert_close(torch.cat(alone), together)


def test_a_model_that_needs_a_mask_gets_one():
    model = make_model(masked_lm_configs()["bert"])
    expected = SpladeEncoder(model, make_tokenizer()).encode(TEXTS[:1], show_progress=False)
    own = model.forward

    def forward(*args, **kwargs):
        if kwargs.get("attention_mask") is None:
            raise AttributeError("no mask")
        return own(*args, **kwargs)

    model.forward = forward
    assert not takes_no_mask(model)
    encoder = SpladeEncoder(model, make_tokenizer())
    assert encoder.encode(TEXTS[:1], show_progress=False).equal(expected)
    assert encoder(encoder.tokenize(TEXTS[:1])["input_ids"]).shape == (1, encoder.vocab_size)


def test_a_mask_with_a_hole_is_used():
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    inputs = encoder.tokenize(["quick fox"])
    inputs["attention_mask"][0, 2] = 0
    with torch.inference_mode():
        expected = encoder(**inputs)
        found = encoder.sparse_rows(inputs, None).to_dense()
    torch.testing.assert_close(found, expected)


def test_small_work_uses_the_calling_thread_alone():
    torch.set_num_threads(2)
    try:
        seen = {}
        with in_this_thread(SMALL):
            seen["small"] = torch.get_num_threads()
            other = threading.Thread(target=lambda: seen.update(other=torch.get_num_threads()))
            other.start()
            other.join()
            with in_this_thread(SMALL):
                pass
            seen["after an inner block"] = torch.get_num_threads()
        seen["after"] = torch.get_num_threads()
        with in_this_thread(SMALL + 1):
            seen["large"] = torch.get_num_threads()
        with pytest.raises(KeyError), in_this_thread(0):
            raise KeyError
        seen["after an error"] = torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    assert seen == {
        "small": 1,
        "other": 2,
        "after an inner block": 1,
        "after": 2,
        "large": 2,
        "after an error": 2,
    }


def test_a_compiled_encoder_gives_the_same_vectors():
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    expected = [encoder.encode(texts, show_progress=False) for texts in (TEXTS, *zip(TEXTS))]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    encoder.compile(dynamic=True, fullgraph=True, backend=backend)
    found = [encoder.encode(texts, show_progress=False) for texts in (TEXTS, *zip(TEXTS))]
    assert len(graphs) == 2  # for several texts and for one
    assert all(mine.equal(rows) for mine, rows in zip(found, expected, strict=True))
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert copied.encode(TEXTS, show_progress=False).equal(expected[0])


@pytest.mark.parametrize(
    ("given", "whole", "transformer"),
    [
        ({}, WIDTH, WIDTH | DYNAMIC),
        ({"options": {"trace": 1}}, WIDTH | {"trace": 1}, WIDTH | DYNAMIC | {"trace": 1}),
        ({"options": OWN}, OWN, OWN),
        ({"mode": "reduce-overhead"}, None, None),  # torch takes either a mode or options
        ({"backend": "eager"}, None, None),
    ],
    ids=["default", "options", "own choice", "mode", "backend"],
)
def test_options_of_compiled_kernels(given, whole, transformer, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    calls = []

    def compile_and_take_options(function, **kwargs):
        calls.append(copy.deepcopy(kwargs))
        (kwargs["options"] or {}).clear()  # as torch does with some
        return function

    monkeypatch.setattr(torch, "compile", compile_and_take_options)
    encoder.compile(**copy.deepcopy(given))
    assert calls == [given | {"options": options} for options in (whole, transformer)]


def compiled_difference(capability):
    """Return the largest difference of a compiled encoder's vector from the encoder's own."""
    assert torch.backends.cpu.get_cpu_capability() == capability
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    expected = encoder.encode("quick fox", show_progress=False).to_dense()
    assert expected.count_nonzero() > 0
    encoder.compile(dynamic=True)
    found = encoder.encode("quick fox", show_progress=False).to_dense()
    return (found - expected).abs().max().item()


def test_processors_with_other_vectors_may_share_a_cache_of_compiled_kernels(tmp_path):
    capability = torch.backends.cpu.get_cpu_capability()
    for level in (capability, {"AVX512": "AVX2"}.get(capability, "DEFAULT")):
        variables = {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "ATEN_CPU_CAPABILITY": level.lower(),
        }
        found = call_in_new_process(compiled_difference, level, environment=variables)
        assert found <= 1e-5, level
