"""Corpora and queries in the files that others write, and files that only look like them."""

import gzip
import json
import os

import pytest

from splade_fast.search.texts import DataError, read_texts


def write(path, content):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path, content):
    found = read_texts(write(path, content))
    return dict(zip(found.ids, found.texts, strict=True))


TWO = {"d1": "quick fox", "d2": "lazy dog"}


@pytest.mark.parametrize(
    "content",
    [
        "d1\tquick fox\nd2\tlazy dog\n",
        "\ufeffd1\tquick fox\nd2\tlazy dog",
        "\ufeffd1\tquick fox\n\ufeffd2\tlazy dog\n",  # joined files
        "d1\tquick fox\rd2\tlazy dog\r",
        "d1\tquick fox\r\nd2\tlazy dog\r\n",
        "\ufeffid\ttext\nd1\tquick fox\nd2\tlazy dog\n",
        "_id\ttext\rd1\tquick fox\rd2\tlazy dog",
        "id text\nd1\tquick fox\nd2\tlazy dog\n",
        " Doc-ID \tContents\r\nd1\tquick fox\r\nd2\tlazy dog\r\n",
        "text\tid\nquick fox\td1\nlazy dog\td2\n",
        "id\ttext\ttitle\nd1\tfox\tquick\nd2\tdog\tlazy\n",
        "id\ttitle\ttext\nd1\tquick\tfox\nd2\t\tlazy dog\n",
        "pid\tpassage\turl\nd1\tquick fox\tu1\nd2\tlazy dog\t\n",
        '{"_id": "d1", "text": "quick fox"}\n{"_id": "d2", "text": "lazy dog"}',
    ],
)
@pytest.mark.parametrize("name", ["texts.tsv", "texts.tsv.gz", "texts"])
def test_line_ends_marks_and_headers_are_no_texts(tmp_path, name, content):
    assert read(tmp_path / name, content) == TWO


def test_a_text_may_hold_tabs_and_carriage_returns(tmp_path):
    assert read(tmp_path / "a.tsv", "d1\ta\tb\rc\nd2\td\n") == {"d1": "a\tb\rc", "d2": "d"}
    assert read(tmp_path / "b.tsv", "id\ttext\nd1\ta\tb\n") == {"d1": "a\tb"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"_id": "d1", "title": "quick", "text": "fox", "metadata": {}}, "quick fox"),  # BEIR
        ({"docid": "d1", "title": "", "text": "fox"}, "fox"),  # Tevatron
        ({"docid": "d1", "title": None, "text": "fox"}, "fox"),
        ({"query_id": "d1", "query": "fox", "positive_passages": []}, "fox"),
        ({"id": "d1", "contents": "quick fox", "title": "quick"}, "quick fox"),  # Anserini
        ({"docno": "d1", "text": "fox"}, "fox"),  # TREC, PyTerrier
        ({"id": "d1", "content": "fox", "vector": {}}, "fox"),  # Haystack, Seismic
        ({"doc_id": "d1", "text": "fox", "contents": "dog"}, "fox"),
        ({"id": None, "_id": "d1", "text": ""}, ""),
    ],
)
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.ndjson.gz"])
def test_keys_that_others_use(tmp_path, name, record, expected):
    assert read(tmp_path / name, "\ufeff" + json.dumps(record)) == {"d1": expected}


def test_blanks_around_an_id_do_not_belong_to_it(tmp_path):
    assert read(tmp_path / "a.tsv", "d1 \tfox\n how to\t dog \n") == {
        "d1": "fox",
        "how to": " dog ",
    }
    assert read(tmp_path / "a.jsonl", '{"_id": " d1 ", "text": " fox"}') == {"d1": " fox"}
    with pytest.raises(DataError, match="line 2: id 'd1' appears a second time"):
        read(tmp_path / "a.tsv", "d1\tfox\nd1 \tdog\n")


def test_whole_numbers_are_ids(tmp_path):
    assert read(tmp_path / "a.jsonl", '{"id": 7, "text": "fox"}') == {"7": "fox"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "", "text": "fox"}', "an id that is not blank"),
        ('{"id": " ", "text": "fox"}', "an id that is not blank"),
        ('{"id": "a\\tb", "text": "fox"}', r"holds no tab, line end or NUL, got 'a\\tb'"),
        ('{"id": "a\\nb", "text": "fox"}', "holds no tab, line end or NUL"),
        ('{"id": "a\\u0000", "text": "fox"}', "holds no tab, line end or NUL"),
        ('{"id": true, "text": "fox"}', "text or a whole number as id, got True"),
        ('{"id": 1.0, "text": "fox"}', "text or a whole number as id, got 1.0"),
        ('{"id": ["a"], "text": "fox"}', "text or a whole number as id, got"),
        ('{"id": null, "text": "fox"}', r"expected an id \(id, _id, docid"),
        ('{"id": "a", "text": null}', r"and a text \(text, contents"),
        ('{"id": "a", "text": 5}', "expected text under the key text"),
        ('{"id": "a", "text": "fox", "title": 5}', "expected text under the key title"),
        ('{"id": "\\ud800", "text": "fox"}', r"the id must be Unicode .* surrogate '\\ud800'"),
        ('{"id": "a", "text": "fox \\udfff"}', "text must be Unicode .* at character 4"),
        ('{"id": "a", "text": "fox", "title": "\\ud800"}', "title must be Unicode text"),
    ],
)
def test_bad_json_names_the_line(tmp_path, line, message):
    content = '{"id": "d1", "text": "fox \\ud83e\\udd8a"}\n' + line  # a whole pair is a fox
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: .*{message}"):
        read(tmp_path / "bad.jsonl", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (" \tfox\n", "line 1: expected an id that is not blank"),
        ("d\0\tfox\n", "must be UTF-8, got UTF-16"),
        ("d1\0\tfox\n", "line 1: expected an id that is not blank and holds no"),
        ("d1\tfox\n".encode("utf-16"), "bad.tsv must be UTF-8, got UTF-16 or UTF-32"),
        ("d1\tfox\n".encode("utf-16-be"), "bad.tsv must be UTF-8, got UTF-16 or UTF-32"),
        ("d1\tfox\n".encode("utf-16-le"), "bad.tsv must be UTF-8, got UTF-16 or UTF-32"),
        ("d1\tfox\n".encode("utf-32"), "bad.tsv must be UTF-8, got UTF-16 or UTF-32"),
        (gzip.compress(b"d1\tfox\n", mtime=0), "bad.tsv must have a name that ends in .gz"),
        ("id\ttext\ttitle\nd1\tfox\n", "line 2: expected 3 columns, as in the header, got 2"),
        ("id\ttext\ttitle\nd1\ta\tb\tc\n", "line 2: expected 3 columns, as in the header, got 4"),
        ("query\tdocument\nfox\tquick fox\n", "line 1: expected the columns id, text \\("),
        ("query-id\tcorpus-id\tscore\nq1\td1\t1\n", "line 1: expected the columns id, text \\("),
        ("docno\tbody\nd1\tfox\n", r"line 1: expected the columns .*, got 'docno\\tbody'"),
        ("docid\tbody\nd1\tfox\n", r"line 1: expected the columns .*, got 'docid\\tbody'"),
        ("id and text\nd1\tfox\n", "line 1: expected id<TAB>text, got 'id and text'"),
        ("id\ttext\n", "must hold at least one text, got none"),
    ],
)
def test_bad_files_name_the_reason(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "bad.tsv", content)


@pytest.mark.parametrize("content", ["d1\tquick fox\n", '{"_id": "d1", "text": "quick fox"}\n'])
def test_pipes_are_read(content):
    source, target = os.pipe()
    with os.fdopen(source), os.fdopen(target, "w") as file:
        file.write(content)
        file.close()
        assert read_texts(f"/dev/fd/{source}").texts == ["quick fox"]


def test_other_paths_are_named_as_what_they_are(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file: .*missing"):
        read_texts(tmp_path / "missing.tsv")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*texts.tsv"):
        read(tmp_path / "texts.tsv", "d1\tfox\n")
