"""Pieces of a corpus, read in any order and encoded."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import splade_fast as sf
from splade_fast.search.lines import START
from splade_fast.search.pieces import DocumentError, PieceEncoder, PieceReader, list_pieces
from splade_fast.search.texts import DataError, read_texts
from tests.search.corpora import CHUNK, OPTIONS, LengthEncoder, assert_same_files, make_texts

TEXTS = {f"{text_id} ü": f"{text} ö" for text_id, text in make_texts(50).items()}
NAMES = ["plain.tsv", "header.tsv", "first.json", "lines.jsonl.gz", "returns.tsv", "rows.parquet"]


def write(path, texts=TEXTS):
    """Write texts in the format that the name stands for, with blank lines between them."""
    name = path.name
    if name == "rows.parquet":
        table = pa.table({"n": range(len(texts)), "_id": list(texts), "text": texts.values()})
        pq.write_table(table, path, row_group_size=7)
        return path
    if "json" in name:
        lines = [json.dumps({"_id": text_id, "text": text}) for text_id, text in texts.items()]
    elif name == "header.tsv":
        lines = ["text\tid", *(f"{text}\t{text_id}" for text_id, text in texts.items())]
    else:
        lines = [f"{text_id}\t{text}" for text_id, text in texts.items()]
    content = ("\r" if name == "returns.tsv" else "\n\n").join(lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_read_in_any_order(tmp_path, name):
    pieces, ids = list_pieces(write(tmp_path / name), CHUNK)
    assert ids == list(TEXTS)
    assert [piece.count for piece in pieces] == [6] * 8 + [2]
    assert [piece.is_last for piece in pieces] == [False] * 8 + [True]
    texts, reader = list(TEXTS.values()), PieceReader()
    shuffled = random.Random(0).sample(pieces, len(pieces))
    for piece in [*pieces, *pieces[::-1], *pieces[::2], *shuffled]:
        part = slice(piece.start, piece.start + piece.count)
        assert reader.read(piece) == (ids[part], texts[part])
    # A new reader starts anywhere.
    assert PieceReader().read(pieces[4]) == (ids[24:30], texts[24:30])


@pytest.mark.parametrize("name", NAMES)
def test_file_is_closed_after_its_last_piece(tmp_path, name):
    pieces, _ = list_pieces(write(tmp_path / name), CHUNK)
    reader = PieceReader()
    for piece in pieces:
        reader.read(piece)
        assert (tmp_path / name in open_files()) == (not piece.is_last)


def open_files() -> set[Path]:
    return {Path(os.readlink(link)) for link in Path("/proc/self/fd").iterdir() if link.exists()}


def test_pieces_end_with_their_file(tmp_path):
    (tmp_path / "corpus").mkdir()
    ids = list(TEXTS)
    for number, name in enumerate(["a.tsv", "b.jsonl", "rows.parquet"]):
        part = ids[10 * number : 10 * number + 10]
        write(tmp_path / "corpus" / name, {text_id: TEXTS[text_id] for text_id in part})
    pieces, found = list_pieces(tmp_path / "corpus", CHUNK)
    assert found == ids[:30]
    assert [piece.count for piece in pieces] == [6, 4] * 3
    assert [piece.start for piece in pieces] == [0, 6, 10, 16, 20, 26]
    assert [piece.place == START for piece in pieces] == [True, False] * 3
    reader = PieceReader()
    assert [text_id for piece in pieces for text_id in reader.read(piece)[0]] == found


@pytest.mark.parametrize("name", NAMES)
def test_same_index_from_every_kind_of_file(tmp_path, name):
    for path in (write(tmp_path / name), write(tmp_path / "expected.tsv")):
        sf.encode_corpus(LengthEncoder(), path, path.with_suffix(""), chunk_size=CHUNK, **OPTIONS)
    assert_same_files((tmp_path / name).with_suffix(""), tmp_path / "expected")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", None], "text": ["b", "c"]}, r"rows.parquet, row 2: expected an id \(id, _id"),
        ({"id": ["a", "b"], "text": [1.0, 1.5]}, "row 1: expected text under the key text"),
        ({"id": ["a", "a"], "text": ["b", "c"]}, "row 2: id 'a' appears a second time"),
        ({"id": [1.5, 2], "text": ["b", "c"]}, "row 1: expected text or a whole number as id"),
        (
            {"n": [1, 2]},
            r"must have columns for an id \(id, .* and a text \(text, .*, got n",
        ),
        ({"id": [], "text": []}, "rows.parquet must hold at least one text, got none"),
    ],
)
def test_bad_rows_are_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "rows.parquet")


def test_titles_and_numbers_of_rows(tmp_path):
    table = pa.table({"docid": [7, 8], "title": ["Fox", None], "text": ["quick", "lazy"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = read_texts(tmp_path / "rows.parquet")
    assert dict(zip(found.ids, found.texts, strict=True)) == {"7": "Fox quick", "8": "lazy"}


def test_damaged_parquet(tmp_path):
    path = write(tmp_path / "rows.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="rows.parquet must be a whole Parquet file"):
        read_texts(path)


class PickyEncoder(LengthEncoder):
    """Encoder that takes neither a text with the word "poison" nor more than `most` texts."""

    def __init__(self, most=CHUNK):
        super().__init__()
        self.most = most

    def tokenize(self, texts, max_length=256, prompt=""):
        if any("poison" in text for text in texts):
            raise RuntimeError("index out of range in self")
        if len(texts) > self.most:
            raise RuntimeError("out of memory")
        return super().tokenize(texts, max_length, prompt)


@pytest.mark.parametrize("bad", [0, 3, 5, 8, 24])
def test_a_document_that_cannot_be_encoded_is_named(tmp_path, bad):
    texts = make_texts(25)
    texts[f"d{bad}"] += " poison"
    pieces, _ = list_pieces(write(tmp_path / "plain.tsv", texts), CHUNK)
    work = PieceEncoder(PickyEncoder(), None, 4, 16)
    bad_piece = pieces.pop(bad // CHUNK)
    message = rf"^document 'd{bad}' \(text {bad + 1} of the corpus\) cannot be encoded: index out"
    with pytest.raises(DocumentError, match=message) as raised:
        work.encode(bad_piece, lambda count: None)
    assert isinstance(raised.value.__cause__, RuntimeError)
    for piece in pieces:
        assert len(work.encode(piece, lambda count: None)) == piece.count


def test_an_error_that_no_document_causes_alone_stays_as_it_is(tmp_path):
    pieces, _ = list_pieces(write(tmp_path / "plain.tsv"), CHUNK)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        PieceEncoder(PickyEncoder(most=1), None, 4, 16).encode(pieces[0], lambda count: None)
