"""MTEBEncoder under calls like those of mteb, which is too large to be installed for the tests."""

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.integrations.mteb import MTEBEncoder
from tests.recipe.corpora import WeightedWords
from tests.tiny_models import WORDS, make_model, make_tokenizer, masked_lm_configs

TEXTS = ["quick fox", "the lazy dog", "fox and dog under the old tree"]


class PromptType(str, Enum):
    """Roles as mteb names them."""

    query = "query"
    document = "document"


def task(kind="Retrieval", name="NFCorpus"):
    is_search = kind in ("Retrieval", "Reranking")
    simplified = "retrieval" if is_search else kind.lower()
    return SimpleNamespace(name=name, type=kind, simplified_task_type=simplified)


def encode(model, metadata, role=None, texts=TEXTS):
    inputs = DataLoader(
        [{"text": text, "id": str(i)} for i, text in enumerate(texts)], batch_size=2
    )
    return model.encode(
        inputs,
        task_metadata=metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=role,
        batch_size=2,
        show_progress_bar=False,
        precision="float32",
    )


@pytest.fixture(scope="module")
def encoder():
    return SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())


def plain(encoder, texts=TEXTS, **options):
    return encoder.encode(texts, show_progress=False, **options).to_dense()


def test_searches_get_sparse_vectors_and_exact_scores(encoder):
    model = MTEBEncoder(encoder, WeightedWords(), document_top_k=3)
    queries = encode(model, task(), PromptType.query)
    documents = encode(model, task(), PromptType.document)
    assert queries.is_sparse
    assert documents.is_sparse
    expected = plain(WeightedWords()), plain(encoder, k=3)
    torch.testing.assert_close(queries.to_dense(), expected[0])
    torch.testing.assert_close(documents.to_dense(), expected[1])
    torch.testing.assert_close(model.similarity(queries, documents), expected[0] @ expected[1].T)
    alone = model.similarity(queries[1], documents)
    torch.testing.assert_close(alone, expected[0][1:2] @ expected[1].T)


@pytest.mark.parametrize("kind", ["Reranking", "Classification", "STS"])
def test_other_tasks_get_dense_vectors(encoder, kind):
    model = MTEBEncoder(encoder)
    vectors = encode(model, task(kind))
    assert vectors.layout == torch.strided
    expected = plain(encoder)
    torch.testing.assert_close(vectors, expected)
    torch.testing.assert_close(model.similarity(vectors, vectors), expected @ expected.T)
    products = (expected * expected.flip(0)).sum(1)
    torch.testing.assert_close(model.similarity_pairwise(vectors, vectors.flip(0)), products)


PROMPTS = {"NFCorpus-query": "a ", "SciFact": "quick ", "STS": "brown ", "query": "fox "}


@pytest.mark.parametrize(
    ("metadata", "role", "prompt"),
    [
        (task(), PromptType.query, "a "),
        (task(), PromptType.document, ""),
        (task(name="SciFact"), PromptType.query, "quick "),
        (task(name="SciFact"), PromptType.document, "quick "),
        (task("STS", "STS12"), None, "brown "),
        (task(name="Touche"), PromptType.query, "fox "),
        (task("Classification", "Banking"), None, ""),
    ],
)
def test_prompts_by_task_and_role(metadata, role, prompt):
    settings = EncoderSettings(prompts=PROMPTS)
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer(), settings)
    vectors = encode(MTEBEncoder(encoder), metadata, role).to_dense()
    expected = plain(SpladeEncoder(encoder.model, make_tokenizer()), [prompt + t for t in TEXTS])
    torch.testing.assert_close(vectors, expected)


def test_metadata_say_what_mteb_asks_for(encoder, monkeypatch):
    models = ModuleType("mteb.models")
    models.ModelMeta = SimpleNamespace(create_empty=lambda overwrites: overwrites)
    monkeypatch.setitem(sys.modules, "mteb", ModuleType("mteb"))
    monkeypatch.setitem(sys.modules, "mteb.models", models)
    meta = MTEBEncoder(encoder, name="me/model").mteb_model_meta
    assert meta == {
        "name": "me/model",
        "n_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "embed_dim": len(WORDS) + 5,
        "max_tokens": 64.0,
        "framework": ["PyTorch"],
        "model_type": ["sparse"],
    }


def test_bad_arguments(encoder):
    with pytest.raises(ValueError, match="name must be 'organization/model', got 'model'"):
        MTEBEncoder(encoder, name="model")
    with pytest.raises(ValueError, match="document_top_k must be at least 1, got 0"):
        MTEBEncoder(encoder, document_top_k=0)
    other = BagOfWordsQueryEncoder(make_tokenizer(), torch.ones(30))
    with pytest.raises(ValueError, match="query_encoder must have the vocab_size of encoder, 20"):
        MTEBEncoder(encoder, other)
