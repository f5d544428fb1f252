"""encode and export to numbered files and shards, on the command line."""

import pytest

from splade_fast.export import export_parts as module
from tests.search.part_files import assert_joined, contents
from tests.test_cli import CORPUS, QUERIES, invoke
from tests.tiny_models import masked_lm_configs, save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert")))


@pytest.fixture
def files(tmp_path):
    for name, texts in (("corpus.tsv", CORPUS), ("queries.tsv", QUERIES)):
        (tmp_path / name).write_text("".join(f"{i}\t{text}\n" for i, text in texts.items()))
    return tmp_path


@pytest.fixture
def index(files, model):
    run("encode", files / "corpus.tsv", files / "index", "--model", model)
    return files / "index"


def run(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refuse(message, *arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_a_corpus_is_encoded_straight_to_an_export(files, model):
    run("encode", files / "corpus.tsv", files / "index", "--model", model, "--chunk-size", 3)
    out = ("encode", files / "corpus.tsv", files / "out", "--model", model, "--chunk-size", 3)
    result = run(*out, "--format", "opensearch")
    assert f"{files / 'out'}: 4 documents, " in result.stdout
    run("export", files / "index", files / "whole", "--format", "opensearch")
    assert_joined(files / "out", files / "whole", "opensearch")
    assert len(contents(files / "out")) == 3


@pytest.mark.parametrize("command", ["encode", "export"])
def test_shards_are_searched_like_an_index(files, model, index, command):
    shards = files / "shards"
    if command == "encode":
        options = ("--model", model, "--format", "shards", "--chunk-size", 3)
        run("encode", files / "corpus.tsv", shards, *options)
    else:
        run("export", index, shards, "--format", "shards", "--part-size", 3)
    before = contents(shards)
    assert len(before) == 5
    arguments = ("--queries", files / "queries.tsv", "--hits", 3, "--terms", 2)
    found = run("search", shards, *arguments)
    assert found.stdout == run("search", index, *arguments).stdout
    assert found.stdout.count("\n") > 4
    assert contents(shards) == before
    refuse("--exhaustive must go with an index", "search", shards, "x", "--exhaustive")
    refuse("the folder holds shards", "export", shards, files / "o", "--format", "npz")


def test_an_index_is_exported_in_parts(files, index):
    run("export", index, files / "whole", "--format", "seismic")
    result = run("export", index, files / "out", "--format", "seismic", "--part-size", 3)
    assert result.stdout == f"{files / 'out'}: 4 documents\n"
    assert_joined(files / "out", files / "whole", "seismic")


def test_an_interrupted_export_goes_on(files, index, monkeypatch):
    out = ("export", index, files / "out", "--format", "qdrant", "--part-size", 1)
    write = module.PartWriter.write_part

    def fail(self, number, *rest):
        if number == 2:
            raise OSError("disk full")
        return write(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module.PartWriter, "write_part", fail)
        refuse("keeps what is exported: --resume goes on with it", *out)
        refuse("holds what an interrupted run has exported, which this run replaces", *out)
    assert len(contents(files / ".out.partial" / "parts")) == 2
    run(*out, "--resume")
    run("export", index, files / "whole", "--format", "qdrant")
    assert_joined(files / "out", files / "whole", "qdrant")


def test_bad_arguments_exit_with_2(files, model, index):
    encode = ("encode", files / "corpus.tsv", files / "out", "--model", model)
    export = ("export", index, files / "out", "--format")
    for message, arguments in (
        ("Invalid value for '--format'", (*encode, "--format", "bm25s")),
        ("scale must be given for anserini alone", (*encode, "--format", "npz", "--scale", 2)),
        ("another file_format than 'index'", (*encode, "--empty", "skip")),
        ("store_texts must be False for npz", (*encode, "--format", "npz", "--store-texts")),
        ("must be one of 'anserini'", (*export, "bm25s", "--part-size", 2)),
        ("must be one of 'anserini'", (*export, "bm25s", "--engine", "ray")),
        ("--address must go with --engine ray", (*export, "npz", "--address", "auto")),
        ("--workers must go with --engine ray", (*export, "npz", "--workers", 2)),
        ("--part-size", (*export, "npz", "--part-size", 0)),
    ):
        refuse(message, *arguments)
    assert not (files / "out").exists()
