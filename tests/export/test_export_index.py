"""splade-fast export: every format from an index folder."""

import json

import numpy as np
import pytest
import torch
from transformers import EsmTokenizer
from typer.testing import CliRunner

from splade_fast import SparseRows, export
from splade_fast.cli import app
from splade_fast.export.export_index import export_index
from splade_fast.search.index import Index, IndexMeta
from tests.tiny_models import SPECIAL, VOCAB_SIZE, WORDS, masked_lm_configs, save_checkpoint

FORMATS = (
    "anserini",
    "bm25s",
    "elasticsearch",
    "npz",
    "opensearch",
    "parquet",
    "qdrant",
    "seismic",
)
IDS = ["d1", "d2", "d3", "d4"]
TOKENS = [*SPECIAL, *WORDS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert"))


@pytest.fixture
def rows():
    return SparseRows.from_dense(torch.rand(4, VOCAB_SIZE) * torch.tensor([[1], [2], [0], [1]]))


@pytest.fixture
def index(rows, model, tmp_path):
    Index(rows, IDS, IndexMeta(str(model), 256, None)).save(tmp_path / "index")
    return tmp_path / "index"


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_those_of_the_functions(name, index, rows, tmp_path):
    result = invoke(index, tmp_path / "out", "--format", name)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out'}: 4 documents\n"
    options = {} if name in ("npz", "parquet", "qdrant") else {"id_to_token": TOKENS}
    getattr(export, f"write_{name}")(rows, tmp_path / "expected", IDS, **options)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    actual = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert actual.keys() == expected.keys()
    for file, content in expected.items():
        if not file.endswith(".npz"):  # a zip file contains the time
            assert actual[file] == content


def test_options(index, rows, tmp_path):
    result = invoke(
        index, tmp_path / "out", "--format", "anserini", "--scale", 10, "--empty", "skip"
    )
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "documents.jsonl").read_text().splitlines()
    documents = {line["id"]: line["vector"] for line in map(json.loads, lines)}
    assert list(documents) == ["d1", "d2", "d4"]
    assert documents["d2"] == {
        TOKENS[column]: round(value * 10)
        for column, value in rows.to_dicts()[1].items()
        if round(value * 10)
    }


def test_another_models_tokens(index, model, tmp_path):
    missing = str(tmp_path / "no_such_model")
    result = invoke(index, tmp_path / "out", "--format", "opensearch", "--model", missing)
    assert result.exit_code == 2
    assert "no_such_model" in result.output
    result = invoke(index, tmp_path / "out", "--format", "opensearch", "--model", model)
    assert result.exit_code == 0, result.output


def test_columns_beyond_the_tokenizer_are_named_by_their_number(tmp_path):
    """Decoders are often wider than their tokenizer, and this one calls every such id <unk>."""
    words = ["<cls>", "<pad>", "<eos>", "<unk>", "fox"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "esm")
    padded = SparseRows.from_dicts([{3: 1.5, 4: 1.0, 5: 0.5, 6: 2.0}], 7)
    Index(padded, ["d1"], IndexMeta(str(tmp_path / "esm"), 256, None)).save(tmp_path / "padded")
    result = invoke(tmp_path / "padded", tmp_path / "out", "--format", "seismic")
    assert result.exit_code == 0, result.output
    [line] = (tmp_path / "out" / "documents.jsonl").read_text().splitlines()
    assert json.loads(line)["vector"] == {"<unk>": 1.5, "fox": 1.0, "<mask>": 0.5, "[#6]": 2.0}


def test_ids_that_the_format_cannot_hold_exit_with_2(rows, model, tmp_path):
    ids = ["d1", "d2", "x" * 513, "a b"]
    Index(rows, ids, IndexMeta(str(model), 256, None)).save(tmp_path / "index")
    for name, message in [
        ("opensearch", "ids must have at most 512 bytes for this format, got 513 bytes in row 2"),
        ("anserini", "ids must have no white space for this format, got 'a b' in row 3"),
    ]:
        result = invoke(tmp_path / "index", tmp_path / "out", "--format", name)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_bad_input_exits_with_2(index, tmp_path):
    out = tmp_path / "out"
    for arguments, message in [
        ([tmp_path / "missing", out, "--format", "npz"], "no index at"),
        ([index, out, "--format", "lucene"], "Invalid value for '--format'"),
        ([index, out, "--format", "npz", "--empty", "drop"], "Invalid value for '--empty'"),
        ([index, out, "--format", "npz", "--empty", "error"], "got an empty row 2"),
        ([index, out, "--format", "anserini", "--scale", "-1"], "scale must be finite and above 0"),
        ([index, out, "--format", "qdrant", "--scale", "7"], "scale must be given for anserini"),
        ([index, out, "--format", "npz", "--model", "x"], "model must not be given for npz"),
        ([index, index, "--format", "npz"], "must not exist yet"),
        ([index, out], "Missing option '--format'"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not out.exists()


def test_paths_of_every_kind(index, model, tmp_path):
    loaded = Index.load(index)
    export_index(loaded, str(tmp_path / "text"), "anserini", str(model))
    export_index(loaded, tmp_path / "path", "anserini", model, scale=np.float32(100))
    contents = {(tmp_path / n / "documents.jsonl").read_bytes() for n in ("text", "path")}
    assert len(contents) == 1
