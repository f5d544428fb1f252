"""Encoders that the command line takes for an index, and warnings of models that changed."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import splade_fast as sf
from splade_fast import BagOfWordsQueryEncoder, SpladeEncoder, TermWeightEncoder
from splade_fast.cli import app
from splade_fast.search.index import Index
from tests.integrations.sparse_encoders import inference_free
from tests.test_cli import CORPUS
from tests.tiny_models import masked_lm_configs, save_checkpoint

QUERY = "old brown fox"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    config = masked_lm_configs()["bert"]
    config.num_hidden_layers = 1
    return save_checkpoint(config, tmp_path_factory.mktemp("bert"))


@pytest.fixture
def model(original, tmp_path):
    """Folder of a model that a test may change."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def bags(model, tmp_path):
    """Folder of a bag-of-words encoder of the model's vocabulary."""
    tokenizer = SpladeEncoder.from_pretrained(model).tokenizer
    bags = BagOfWordsQueryEncoder(tokenizer, torch.rand(len(tokenizer)))
    bags.save_pretrained(tmp_path / "bags")
    return tmp_path / "bags"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "corpus.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in CORPUS.items()))
    (tmp_path / "queries.tsv").write_text(f"q\t{QUERY}\n")
    (tmp_path / "qrels.tsv").write_text("q\td3\t1\n")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def encode(files, model, *options):
    index = files / "index"
    result = invoke("encode", files / "corpus.tsv", index, "--model", model, *options)
    assert result.exit_code == 0, result.output
    return index


def search(index, *options):
    result = invoke("search", index, QUERY, *options)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    [message] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return message.removeprefix("Error: ")


def warnings_of(result):
    lines = result.stderr.splitlines()
    return [line for line in lines if line.startswith("Warning: ") and "empty" not in line]


def check_hits(result, documents, queries):
    """Check documents and scores against the product of the encoders' vectors."""
    vectors = documents.encode(list(CORPUS.values()), show_progress=False).to_dense()
    prompt = queries.settings.prompt_for("query")
    query = queries.encode(QUERY, show_progress=False, prompt_name=prompt).to_dense()
    scores = (vectors @ query[0]).tolist()
    expected = {name: score for name, score in zip(CORPUS, scores, strict=True) if score > 0}
    found = [line.split("\t") for line in result.stdout.splitlines()]
    assert {line[2] for line in found} == set(expected)
    for _, _, name, score in found:
        assert float(score) == pytest.approx(expected[name], abs=1e-4)


def train(folder):
    """Replace the weights of a model's folder by others, as another training would."""
    encoder = SpladeEncoder.from_pretrained(folder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 1e-5 * torch.randn_like(parameter)
    encoder.save_pretrained(folder)


def test_a_model_that_is_named_in_two_ways_is_one(files, model, monkeypatch):
    (files / "link").symlink_to(model)
    monkeypatch.chdir(files)
    meta = Index.load(encode(files, "link/", "--query-model", "./model")).meta
    assert (meta.model, meta.query_model, meta.query_fingerprint) == (str(model), None, None)


def test_a_model_whose_weights_changed_is_refused(files, model):
    index = encode(files, model)
    judged = ["--queries", files / "queries.tsv", "--qrels", files / "qrels.tsv"]
    assert not warnings_of(search(index))
    train(model)
    message = (
        f"{model} must be as it was when the index was made, got other weights; "
        "encode the corpus again, or name the right model"
    )
    assert refused("search", index, QUERY) == message
    assert refused("evaluate", "--index", index, *judged) == message
    result = search(index, "--model", model)  # the user's choice
    assert warnings_of(result) == [
        f"Warning: {model} has other weights than the model that the index was made with, {model}"
    ]
    result = invoke("evaluate", "--index", index, "--model", model, *judged)
    assert result.exit_code == 0, result.output
    assert len(warnings_of(result)) == 1


def test_other_settings_of_a_model_are_refused(files, model):
    encoder = SpladeEncoder.from_pretrained(model)
    encoder.settings.prompts = {"document": "tree ", "query": "fox "}
    encoder.save_pretrained(model)
    index = encode(files, model)
    encoder.settings.prompts = {"document": "tree ", "query": "lazy "}
    encoder.save_pretrained(model)
    assert not warnings_of(search(index))  # the vectors of the documents do not depend on it
    encoder.settings.pooling = "sum"
    encoder.save_pretrained(model)
    assert "got other settings;" in refused("search", index, QUERY)


def test_another_model_under_the_name_is_refused(files, model):
    index = encode(files, model)
    content = (model / "tokenizer.json").read_text()
    swapped = content.replace('"fox"', '"x"').replace('"dog"', '"fox"').replace('"x"', '"dog"')
    (model / "tokenizer.json").write_text(swapped)
    assert "got other vocabulary and settings;" in refused("search", index, QUERY)
    export = ["export", index, files / "out", "--format", "opensearch"]
    message = f"{model} must have the vocabulary that the index was made with, got another"
    assert refused(*export) == message
    assert not (files / "out").exists()
    result = invoke(*export, "--model", model)
    assert result.exit_code == 0, result.output
    assert warnings_of(result) == [f"Warning: {message}"]


def test_a_model_that_moved_is_the_same(files, model):
    index = encode(files, model)
    moved = model.rename(files / "moved")
    result = search(index, "--model", moved)
    assert not warnings_of(result)
    encoder = SpladeEncoder.from_pretrained(moved)
    check_hits(result, encoder, encoder)


def test_an_index_without_a_fingerprint_loads(files, model):
    index = encode(files, model)
    meta = json.loads((index / "meta.json").read_text())
    old = {name: meta[name] for name in ("model", "max_length", "k", "format_version")}
    (index / "meta.json").write_text(json.dumps(old))
    train(model)
    assert not warnings_of(search(index))
    assert invoke("export", index, files / "out", "--format", "anserini").exit_code == 0


def test_an_index_in_16_bits_has_the_same_model(files, model):
    encoder = SpladeEncoder.from_pretrained(model, dtype=torch.bfloat16)
    sf.encode_corpus(encoder, files / "corpus.tsv", files / "index", model=model)
    assert not warnings_of(search(files / "index"))
    train(model)
    assert "got other weights;" in refused("search", files / "index", QUERY)


def test_queries_by_another_model(files, model, bags):
    """The index knows the model for queries; another one can be named at any search."""
    documents = SpladeEncoder.from_pretrained(model)
    queries = BagOfWordsQueryEncoder.from_pretrained(bags)
    index = encode(files, model, "--query-model", bags)
    assert Index.load(index).meta.query_model == str(bags)
    result = search(index)
    assert not warnings_of(result)
    check_hits(result, documents, queries)
    result = search(index, "--query-model", model)
    assert not warnings_of(result)
    check_hits(result, documents, documents)
    with torch.no_grad():
        queries.weight += 1
    queries.save_pretrained(bags)
    assert f"{bags} must be as it was when the index was made" in refused("search", index, QUERY)
    result = search(index, "--query-model", bags)
    assert not warnings_of(result)  # made for this vocabulary
    check_hits(result, documents, queries)


def test_evaluate_takes_the_model_for_queries(files, model, bags):
    judged = ["--queries", files / "queries.tsv", "--qrels", files / "qrels.tsv"]
    index = encode(files, model)
    results = [
        invoke("evaluate", *source, *judged, "--query-model", bags)
        for source in (["--index", index], ["--corpus", files / "corpus.tsv", "--model", model])
    ]
    found = search(index, "--query-model", bags).stdout.splitlines()
    [rank] = [line.split("\t")[1] for line in found if line.split("\t")[2] == "d3"]
    for result in results:
        assert result.exit_code == 0, result.output
        assert f"MRR@10\t{1 / int(rank):.4f}" in result.stdout


def test_the_query_encoder_that_was_trained_with_a_model(files, model, bags):
    """Training writes it to the folder `query`."""
    shutil.copytree(bags, model / "query")
    index = encode(files, model)
    assert Index.load(index).meta.query_model == str(model / "query")
    queries = BagOfWordsQueryEncoder.from_pretrained(bags)
    check_hits(search(index), SpladeEncoder.from_pretrained(model), queries)
    judged = ["--queries", files / "queries.tsv", "--qrels", files / "qrels.tsv"]
    of_corpus = invoke("evaluate", "--corpus", files / "corpus.tsv", "--model", model, *judged)
    of_index = invoke("evaluate", "--index", index, *judged)
    assert of_corpus.exit_code == of_index.exit_code == 0
    assert of_corpus.stdout == of_index.stdout


def test_the_query_encoder_of_a_router(files, tmp_path):
    inference_free(tmp_path).save_pretrained(str(tmp_path / "routed"))
    index = encode(files, tmp_path / "routed")
    queries = BagOfWordsQueryEncoder.from_pretrained(tmp_path / "routed")
    documents = SpladeEncoder.from_pretrained(tmp_path / "routed")
    check_hits(search(index), documents, queries)
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps(meta | {"query_fingerprint": None}))
    check_hits(search(index), documents, queries)


def test_term_weights(files, model, tmp_path):
    encoder = TermWeightEncoder.from_pretrained(model)
    encoder.save_pretrained(tmp_path / "weights")
    index = encode(files, tmp_path / "weights")
    check_hits(search(index), encoder, encoder)


def test_models_and_indexes_in_each_others_place(files, model):
    index = encode(files, model)
    as_model = f"must be a model, got the index {index}"
    corpus, out = files / "corpus.tsv", files / "out"
    judged = ["--queries", files / "queries.tsv", "--qrels", files / "qrels.tsv"]
    for arguments in (
        ["encode", corpus, out, "--model", index],
        ["encode", corpus, out, "--model", model, "--query-model", index],
        ["search", index, QUERY, "--model", index],
        ["search", index, QUERY, "--query-model", index],
        ["evaluate", "--corpus", corpus, "--model", index, *judged],
        ["export", index, out, "--format", "bm25s", "--model", index],
    ):
        assert as_model in refused(*arguments)
    as_index = f"no index at {model}: the folder holds a model"
    assert refused("search", model, QUERY) == as_index
    assert refused("evaluate", "--index", model, *judged) == as_index
    assert refused("export", model, out, "--format", "npz") == as_index
