"""Folders of sentence-transformers in which a Router sends queries and documents to two models."""

import json

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.modules import SpladePooling

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.query_encoder import load_query_encoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from tests.integrations.sparse_encoders import TEXTS, inference_free, transformer_of
from tests.tiny_models import masked_lm_configs, save_checkpoint


@pytest.fixture
def routed(tmp_path):
    """An inference-free SparseEncoder and its folder."""
    theirs = inference_free(tmp_path)
    theirs.save_pretrained(str(tmp_path / "routed"))
    return theirs, tmp_path / "routed"


def dense(encoder):
    return encoder.encode(TEXTS, show_progress=False).to_dense()


def check_routes(theirs, folder):
    queries = BagOfWordsQueryEncoder.from_pretrained(folder)
    torch.testing.assert_close(
        dense(queries), theirs.encode_query(TEXTS, show_progress_bar=False).to_dense()
    )
    assert torch.equal(dense(load_query_encoder(folder)), dense(queries))
    torch.testing.assert_close(
        dense(SpladeEncoder.from_pretrained(folder)),
        theirs.encode_document(TEXTS, show_progress_bar=False).to_dense(),
    )


def test_both_routes_of_an_inference_free_folder_load(routed):
    check_routes(*routed)


def test_older_routers_load(routed):
    """Older folders hold the Router in a subfolder, whose configuration has a general name."""
    theirs, folder = routed
    inner = folder / "0_Asym"
    inner.mkdir()
    for entry in [folder / "router_config.json", *folder.glob("query_*"), *folder.glob("doc*")]:
        entry.rename(inner / entry.name)
    (inner / "router_config.json").rename(inner / "config.json")
    modules = [{"idx": 0, "name": "0", "path": inner.name, "type": "x.models.Asym"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    check_routes(theirs, folder)


def test_routes_with_other_names_load(routed):
    theirs, folder = routed
    config = json.loads((folder / "router_config.json").read_text())
    routes = config["structure"]
    config["structure"] = {"short": routes["query"], "text": routes["document"]}
    config["parameters"]["route_mappings"] = {"('query', None)": "short"}
    (folder / "router_config.json").write_text(json.dumps(config))
    check_routes(theirs, folder)


def test_two_transformers_load_by_task(tmp_path):
    router = Router.for_query_document(
        query_modules=[transformer_of(tmp_path, "distilbert"), SpladePooling("sum")],
        document_modules=[transformer_of(tmp_path), SpladePooling()],
    )
    theirs = SparseEncoder(modules=[router], device="cpu")
    theirs.save_pretrained(str(tmp_path / "two"))
    queries = load_query_encoder(tmp_path / "two")
    torch.testing.assert_close(
        dense(queries), theirs.encode_query(TEXTS, show_progress_bar=False).to_dense()
    )
    assert queries.settings.pooling == "sum"
    assert SpladeEncoder.from_pretrained(tmp_path / "two").settings.pooling == "max"
    with pytest.raises(ValueError, match=r"SparseStaticEmbedding alone, got .*SpladePooling; Spl"):
        BagOfWordsQueryEncoder.from_pretrained(tmp_path / "two")


def test_queries_of_other_folders_load(tmp_path):
    checkpoint = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    encoder = load_query_encoder(checkpoint, dtype=torch.float64)
    assert (type(encoder), encoder.dtype) == (SpladeEncoder, torch.float64)
    BagOfWordsQueryEncoder(encoder.tokenizer).save_pretrained(tmp_path / "bag")
    assert type(load_query_encoder(tmp_path / "bag")) is BagOfWordsQueryEncoder
    TermWeightEncoder.from_pretrained(checkpoint).save_pretrained(tmp_path / "weights")
    assert type(load_query_encoder(tmp_path / "weights")) is TermWeightEncoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": {"document": []}}, "with a route for the task 'query', got"),
        ({"structure": None}, "with a route for the task 'query', got"),
        ({"types": {}}, "with a route for the task 'query', got"),
        (
            {"structure": {"query": ["../x"]}, "types": {"../x": "x.SparseStaticEmbedding"}},
            r"folders of modules inside itself, got '\.\./x'",
        ),
    ],
)
def test_malformed_routers_are_refused(routed, changes, message):
    file = routed[1] / "router_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        BagOfWordsQueryEncoder.from_pretrained(routed[1])


def test_other_tasks_and_classes_are_refused(routed, tmp_path):
    with pytest.raises(ValueError, match="task must be one of 'document', 'query', got 'passage'"):
        SpladeEncoder.from_pretrained(routed[1], task="passage")
    with pytest.raises(ValueError, match="SparseStaticEmbedding; BagOfWordsQueryEncoder loads it"):
        SpladeEncoder.from_pretrained(routed[1], task="query")
