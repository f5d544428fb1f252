"""Accelerated models that share a tokenizer with other encoders, in threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import splade_fast as sf
import splade_fast.integrations.sentence_transformers.modules
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.integrations.sentence_transformers import accelerate
from tests.integrations.sparse_encoders import TEXTS, splade
from tests.tiny_models import WORDS, make_model, make_tokenizer, masked_lm_configs

pytestmark = pytest.mark.usefixtures("often_switching_threads")


def test_a_sparse_encoder_and_an_encoder_share_a_tokenizer(tmp_path):
    theirs = accelerate(splade(tmp_path))
    ours = SpladeEncoder(make_model(masked_lm_configs()["bert"]), theirs.tokenizer)
    text = " ".join(WORDS)
    ways = {
        "prompt": lambda: theirs.encode([text, *TEXTS], prompt_name="query").to_dense(),
        "plain": lambda: theirs.encode([text, *TEXTS], show_progress_bar=False).to_dense(),
        "short": lambda: ours.encode([text], max_length=4, show_progress=False).to_dense(),
    }
    expected = {name: way() for name, way in ways.items()}
    jobs = list(ways) * 25
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: ways[name](), jobs))
    for name, vectors in zip(jobs, found, strict=True):
        torch.testing.assert_close(vectors, expected[name])


def test_a_model_is_accelerated_for_all_threads():
    model = sf.accelerate(make_model(masked_lm_configs()["bert"]))
    inputs = [make_tokenizer()([text], return_tensors="pt") for text in TEXTS]

    def pooled(i):
        with torch.no_grad():
            return model(**inputs[i]).pooled

    expected = [pooled(i) for i in range(len(inputs))]
    jobs = list(range(len(inputs))) * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(pooled, jobs))
    assert all(torch.equal(vectors, expected[i]) for i, vectors in zip(jobs, found, strict=True))


def test_the_transformer_of_a_short_text_has_one_thread_and_its_head_all(tmp_path, monkeypatch):
    module = splade_fast.integrations.sentence_transformers.modules
    head, seen = module.splade_head_topk, {}
    model = accelerate(splade(tmp_path))
    layer = model[0].model.bert.encoder.layer[0]
    layer.register_forward_hook(lambda *_: seen.update(transformer=torch.get_num_threads()))

    def observed_head(*args, **kwargs):
        seen["head"] = torch.get_num_threads()
        return head(*args, **kwargs)

    monkeypatch.setattr(module, "splade_head_topk", observed_head)
    torch.set_num_threads(2)
    try:
        model.encode("quick fox", convert_to_sparse_tensor=True)
    finally:
        torch.set_num_threads(1)
    assert seen == {"transformer": 1, "head": 2}
