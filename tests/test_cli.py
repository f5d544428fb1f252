import errno
import json
import os
import resource

import pytest
import torch
import typer
from typer.testing import CliRunner

from splade_fast.cli import app
from splade_fast.cli.options import select_device
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.search.index import Index
from tests.tiny_models import (
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
)

CORPUS = {
    "d1": "quick brown fox jumps",
    "d2": "lazy dog sleeps",
    "d3": "an old tree",
    "d4": "dog and fox under the tree",
}
QUERIES = {"q1": "fox", "q2": "old tree"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert")))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "corpus.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in CORPUS.items()))
    lines = [json.dumps({"_id": i, "text": text}) for i, text in QUERIES.items()]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td3\t1\n")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def index(files, model):
    result = invoke("encode", files / "corpus.tsv", files / "index", "--model", model)
    assert result.exit_code == 0, result.output
    return files / "index"


def expected_hits(model):
    """Return all documents of each query by the dense product, best first."""
    encoder = SpladeEncoder.from_pretrained(model)
    docs = encoder.encode(list(CORPUS.values()), show_progress=False).to_dense()
    queries = encoder.encode(list(QUERIES.values()), show_progress=False).to_dense()
    scores = queries @ docs.t()
    order = scores.argsort(dim=1, descending=True, stable=True)
    return {
        query: [(list(CORPUS)[doc], scores[i, doc].item()) for doc in order[i].tolist()]
        for i, query in enumerate(QUERIES)
    }


def test_encode_writes_what_the_encoder_gives(index, model):
    loaded = Index.load(index)
    assert loaded.ids == list(CORPUS)
    assert loaded.meta.model == model
    encoder = SpladeEncoder.from_pretrained(model)
    assert loaded.rows.equal(encoder.encode(list(CORPUS.values()), show_progress=False))


def test_search_prints_the_best_documents(index, files, model):
    result = invoke("search", index, "--queries", files / "queries.jsonl", "--hits", 2)
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    for query, hits in expected_hits(model).items():
        mine = [line for line in lines if line[0] == query]
        assert [line[1] for line in mine] == ["1", "2"]
        assert [line[2] for line in mine] == [doc for doc, _ in hits[:2]]
        for line, (_, score) in zip(mine, hits, strict=False):
            assert float(line[3]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_an_index_for_searches_is_kept_unless_all_documents_are_read(index, files, command):
    queries = ["--queries", files / "queries.jsonl"]
    arguments = {
        "search": ["search", index, *queries],
        "evaluate": ["evaluate", "--index", index, *queries, "--qrels", files / "qrels.tsv"],
    }[command]
    before = {path.name for path in index.iterdir()}
    exhaustive = invoke(*arguments, "--exhaustive")
    assert exhaustive.exit_code == 0, exhaustive.output
    assert {path.name for path in index.iterdir()} == before
    for _ in range(2):
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (0, exhaustive.stdout)
        kept = {"search.safetensors", "search.json"}
        assert {path.name for path in index.iterdir()} == before | kept


def test_search_shows_the_beginnings_of_texts(index, files):
    long_text = "tree  \u00fcber\u2028" + "tree " * 40
    corpus = files / "other.tsv"
    corpus.write_text("".join(f"{i}\t{text}\n" for i, text in {**CORPUS, "d3": long_text}.items()))
    result = invoke("search", index, "tree", "--corpus", corpus)
    assert result.exit_code == 0, result.output
    shown = {line.split("\t")[2]: line.split("\t")[4] for line in result.stdout.splitlines()}
    shortened = "tree \u00fcber" + " tree" * 18 + "\u2026"
    assert shown == {i: shortened if i == "d3" else CORPUS[i] for i in shown}
    assert "d3" in shown
    corpus.write_text("d9\ttree\n")
    result = invoke("search", index, "tree", "--corpus", corpus)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: {corpus} must hold all documents of the index, got no 'd" in result.stderr


@pytest.mark.parametrize("text_id", ["a\tb", "a\nb", "\ud800", " "])
def test_ids_that_would_break_a_line_are_not_printed(index, text_id):
    (index / "ids.json").write_text(json.dumps([text_id] * len(CORPUS)))
    result = invoke("search", index, "fox")
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        f"got the lone surrogate {text_id!r}" in result.stderr
        or f"got {text_id!r}" in result.stderr
    )


def test_search_shows_expanded_terms_on_request(index, model):
    result = invoke("search", index, "fox", "--terms", 2)
    assert result.exit_code == 0, result.output
    name, terms = result.stdout.splitlines()[0].split("\t")
    encoder = SpladeEncoder.from_pretrained(model)
    [expected] = encoder.top_terms(encoder.encode("fox", show_progress=False), 2)
    assert name == "# query"
    assert terms == " ".join(f"{term}:{weight:.3f}" for term, weight in expected.items())


@pytest.mark.parametrize("source", ["index", "corpus"])
def test_evaluate_prints_the_measures(index, files, model, source):
    options = {
        "index": ["--index", index],
        "corpus": ["--corpus", files / "corpus.tsv", "--model", model],
    }[source]
    result = invoke(
        "evaluate", "--queries", files / "queries.jsonl", "--qrels", files / "qrels.tsv", *options
    )
    assert result.exit_code == 0, result.output
    relevant = {"q1": "d1", "q2": "d3"}
    ranks = [
        [doc for doc, _ in hits].index(relevant[query]) + 1
        for query, hits in expected_hits(model).items()
    ]
    reciprocal = sum(1 / rank for rank in ranks) / 2
    discounted = sum(1 / torch.log2(torch.tensor(rank + 1.0)).item() for rank in ranks) / 2
    values = dict(line.split("\t") for line in result.stdout.splitlines())
    assert float(values["MRR@10"]) == pytest.approx(reciprocal, abs=1e-4)
    assert float(values["nDCG@10"]) == pytest.approx(discounted, abs=1e-4)
    assert float(values["Recall@100"]) == 1.0


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """Checkpoint whose vectors are all empty."""
    folder = tmp_path_factory.mktemp("collapsed")
    model = make_model(masked_lm_configs()["bert"])
    model.get_output_embeddings().bias.data.fill_(-1000)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_collapsed_model_finds_nothing_and_is_warned_of(files, collapsed):
    index, queries = files / "index", files / "queries.jsonl"
    result = invoke("encode", files / "corpus.tsv", index, "--model", collapsed)
    assert "4 documents, 0.0 MiB, 4 of them with empty vectors\n" in result.stdout
    warning = "Warning: 2 of 2 queries and 4 of 4 documents have empty vectors, which match nothing"
    result = invoke("search", index, "--queries", queries)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.count("Warning: ") == 1
    assert result.stderr.endswith(f"{warning}\n")
    result = invoke(
        "evaluate", "--queries", queries, "--qrels", files / "qrels.tsv", "--index", index
    )
    assert result.exit_code == 0
    assert result.stdout == "MRR@10\t0.0000\nnDCG@10\t0.0000\nRecall@100\t0.0000\n"
    assert result.stderr.endswith(f"{warning}\n")


@pytest.mark.parametrize("weight", [float("nan"), 3e38])
def test_a_model_with_damaged_weights_is_refused(files, tmp_path, weight):
    model = make_model(masked_lm_configs()["bert"])
    model.get_output_embeddings().weight.data[7] = weight
    model.save_pretrained(tmp_path / "damaged")
    make_tokenizer().save_pretrained(tmp_path / "damaged")
    index = files / "index"
    result = invoke("encode", files / "corpus.tsv", index, "--model", tmp_path / "damaged")
    assert result.exit_code == 2, result.output
    assert "BertForMaskedLM must have finite logits, got NaN or infinity" in result.stderr
    assert not index.exists()


@pytest.mark.parametrize("source", ["index", "corpus"])
def test_evaluate_without_the_document_of_the_query(index, files, model, source):
    """The queries are the documents: of each, the next best document is relevant."""
    encoder = SpladeEncoder.from_pretrained(model)
    rows = encoder.encode(list(CORPUS.values()), show_progress=False).to_dense()
    scores = rows @ rows.t()
    best = scores.fill_diagonal_(-1).argmax(1).tolist()
    ids = list(CORPUS)
    lines = [f"{query}\t{ids[document]}\t1\n" for query, document in zip(ids, best, strict=True)]
    (files / "qrels.tsv").write_text("".join([*lines, "d1\tgone\t0\n", "q9\td1\t1\n"]))
    options = {
        "index": ["--index", index],
        "corpus": ["--corpus", files / "corpus.tsv", "--model", model],
    }[source]
    arguments = ["--queries", files / "corpus.tsv", "--qrels", files / "qrels.tsv", *options]
    result = invoke("evaluate", *arguments, "--ignore-identical-ids")
    assert result.exit_code == 0, result.output
    assert result.stdout == "MRR@10\t1.0000\nnDCG@10\t1.0000\nRecall@100\t1.0000\n"
    assert "Warning: 1 of 5 judged queries are not among the queries\n" in result.stderr
    assert "judged documents are not in the corpus, and count as not retrieved\n" in result.stderr
    result = invoke("evaluate", *arguments)
    assert "MRR@10\t1.0000" not in result.stdout


def test_info_tells_about_the_build():
    result = invoke("info")
    assert result.exit_code == 0
    assert "version" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold at least one text, got none"),
        (b"d1\ttext\nd2 no tab\n", "line 2: expected id<TAB>text, got 'd2 no tab'"),
        (b"d1\ttext\n\nd1\tmore\n", "line 3: id 'd1' appears a second time"),
        (b"d1\t\xff\n", "line 1: 'utf-8' codec"),
    ],
)
def test_bad_corpora_exit_with_2(tmp_path, model, content, message):
    (tmp_path / "corpus.tsv").write_bytes(content)
    result = invoke("encode", tmp_path / "corpus.tsv", tmp_path / "index", "--model", model)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object, got '[1]'"),
        pytest.param("[" * 100_000, "line 2: expected a JSON object", id="deep"),
        pytest.param('{"id": ' + "1" * 5000, "line 2: expected a JSON object", id="long"),
        ('{"id": "d2"}', "line 2: expected an id (id, _id, docid, "),
    ],
)
def test_bad_jsonl_exits_with_2(tmp_path, model, line, message):
    (tmp_path / "corpus.jsonl").write_text('{"id": 1, "text": "fox"}\n' + line)
    result = invoke("encode", tmp_path / "corpus.jsonl", tmp_path / "index", "--model", model)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1 0 d1 one\n", "line 1: expected a whole number of at most 6 digits as relevance"),
        ("q1 d1\n", "line 1: expected query document relevance"),
        ("q1 d1 1\nq1 0 d1 2\n", "line 2: q1 d1 must be judged 1 as before, got 2"),
        ("q9 d1 1\n", "qrels must judge at least one of the queries, got 'q9'"),
        ("", "must hold at least one judgement, got none"),
    ],
)
def test_bad_qrels_exit_with_2(files, index, qrels, message):
    (files / "qrels.tsv").write_text(qrels)
    result = invoke(
        "evaluate",
        *("--queries", files / "queries.jsonl", "--qrels", files / "qrels.tsv", "--index", index),
    )
    assert result.exit_code == 2
    assert message in result.output


def test_missing_and_contradictory_arguments_exit_with_2(files, index, model):
    missing = files / "missing.tsv"
    for arguments, message in [
        (["encode", missing, files / "new", "--model", model], "no such file"),
        (["encode", files / "corpus.tsv", index, "--model", model], "must not exist yet"),
        (["encode", files / "corpus.tsv", files / "new", "--model", missing], "missing.tsv"),
        (["search", missing, "fox"], "no index at"),
        (["search", index], "give either QUERY or --queries"),
        (["search", index, "fox", "--queries", missing], "give either QUERY or --queries"),
        (["evaluate", "--queries", missing, "--qrels", missing], "give either --index or"),
        (["encode", files / "corpus.tsv", files / "new", "--model", ""], "got an empty name"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not (files / "new").exists()


@pytest.mark.parametrize("option", ["--k", "--max-length"])
def test_settings_of_the_documents_are_those_of_an_index(index, files, option):
    """Evaluating an index with others would print the measures of the old settings."""
    arguments = ["--queries", files / "queries.jsonl", "--qrels", files / "qrels.tsv"]
    result = invoke("evaluate", *arguments, "--index", index, option, 8)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give --k and --max-length with --corpus; an index has its own" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),  # `head` has seen enough
        (UnicodeEncodeError("ascii", "狐", 0, 1, "not in range"), 2, "Error: 'ascii' codec can't"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Error: [Errno 28] No space left"),
    ],
)
def test_output_that_cannot_be_written(index, monkeypatch, error, code, message):
    echo = typer.echo

    def fail(text, err=False):
        if not err:
            raise error
        echo(text, err=True)

    monkeypatch.setattr("typer.echo", fail)
    result = invoke("search", index, "fox")
    assert result.exit_code == code
    assert message in result.stderr
    assert ("Error: " in result.stderr) == bool(message)


def test_a_query_of_undecodable_bytes_exits_with_2(index):
    result = invoke("search", index, "fox \udcff")  # as Python decodes the byte 0xff
    assert result.exit_code == 2
    assert result.output == (
        "Error: QUERY must be Unicode text, got the lone surrogate '\\udcff' at character 4\n"
    )


def test_a_corpus_with_a_lone_surrogate_is_not_encoded(tmp_path, model):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "d1", "text": "fox"}\n{"_id": "d2", "text": "\\ud800"}\n')
    result = invoke("encode", corpus, tmp_path / "index", "--model", model)
    assert result.exit_code == 2
    assert result.stderr.endswith(
        f"Error: {corpus}, line 2: text must be Unicode text, got the lone surrogate '\\ud800' "
        "at character 0\n"
    )
    assert not (tmp_path / "index").exists()


def test_a_pipe_of_documents_is_refused_and_one_of_queries_searched(index, files, model):
    source, target = os.pipe()
    with os.fdopen(source), os.fdopen(target, "w") as file:
        file.write("q1\tfox\n")
        file.close()
        pipe = f"/dev/fd/{source}"
        result = invoke("encode", pipe, files / "new", "--model", model)
        assert result.exit_code == 2
        assert f"{pipe} must be a file, since it is read several times, got a pipe" in result.stderr
        result = invoke("search", index, "--queries", pipe, "--hits", 1)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("q1\t1\t")


def test_encode_needs_a_gpu_for_cuda(files, model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert select_device("cuda") == torch.device("cuda")
    assert select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["encode", files / "corpus.tsv", files / "new", "--model", model]
    result = invoke(*arguments, "--device", "cuda")
    assert result.exit_code == 2
    assert "--device must be cpu where torch finds no GPU, got cuda" in result.output
    assert not (files / "new").exists()


def test_encode_refuses_all_ranks_of_torchrun_but_the_first(files, model, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = invoke("encode", files / "corpus.tsv", files / "new", "--model", model)
    assert result.exit_code == 2
    assert "engine must be 'ray' to encode with several processes" in result.output
    assert not list(files.glob("*new*"))


@pytest.mark.parametrize("option", ["address", "workers", "threads"])
def test_options_of_ray_need_its_engine(files, model, option):
    arguments = ["encode", files / "corpus.tsv", files / "new", "--model", model]
    result = invoke(*arguments, f"--{option}", "2")
    assert result.exit_code == 2
    assert f"--{option} must go with --engine ray, got --engine process" in result.output


def test_an_index_of_another_format_is_refused(index):
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    result = invoke("search", index, "fox")
    assert result.exit_code == 2
    assert "must have format version 1, got 99" in result.output


def test_an_index_with_a_missing_id_is_refused(index):
    (index / "ids.json").write_text(json.dumps(list(CORPUS)[1:]))
    result = invoke("search", index, "fox")
    assert result.exit_code == 2
    assert "must have one id per vector, got 3 for 4" in result.output


def fail_after(chunks, error, monkeypatch):
    """Let every encoder fail once it has encoded some chunks."""
    original, encoded = TextEncoder.encode_batches, []

    def encode_batches(*arguments):
        if len(encoded) == chunks:
            raise error
        encoded.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(TextEncoder, "encode_batches", encode_batches)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_interrupted_encode_goes_on(files, model, monkeypatch, error, code):
    arguments = ["encode", files / "corpus.tsv", files / "new", "--model", model]
    arguments += ["--chunk-size", 1]
    whole = invoke(*arguments[:2], files / "whole", *arguments[3:])
    assert "--resume" not in whole.output
    with monkeypatch.context() as patch:
        fail_after(2, error, patch)
        result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert "--resume goes on with it" in result.stderr
    assert result.stderr.count("Error: ") == (code == 2)
    with monkeypatch.context() as patch:
        fail_after(0, error, patch)
        result = invoke(*[*arguments[:1], files / "missing.tsv", *arguments[2:]])
    assert result.exit_code == 2
    assert "--resume would go on with it" in result.stderr
    result = invoke(*arguments, "--resume", "--k", 3)
    assert result.exit_code == 2
    assert "Error: resume must go on with the k of the chunks" in result.stderr
    assert "--resume goes on with it" not in result.stderr
    fail_after(2, AssertionError("encoded a chunk again"), monkeypatch)
    result = invoke(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    for name in ("vectors.safetensors", "ids.json", "meta.json"):
        assert (files / "new" / name).read_bytes() == (files / "whole" / name).read_bytes()


@pytest.mark.parametrize("limit", [100, 480, 700])
def test_encode_on_a_full_disk_exits_with_2(files, model, limit):
    arguments = ["encode", files / "corpus.tsv", files / "new", "--model", model]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        result = invoke(*arguments, "--chunk-size", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 2, result.output
    [message] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert ".new.partial" in message
    assert "File too large" in message
    assert not (files / "new").exists()
    result = invoke(*arguments, "--chunk-size", 2, "--resume")
    assert result.exit_code == 0, result.output
