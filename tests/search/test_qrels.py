"""Judgements in the formats of TREC and BEIR, and lines that only look like them."""

import gzip

import pytest

from splade_fast.search.qrels import read_qrels
from splade_fast.search.texts import DataError

JUDGED = {"q1": {"d1": 1, "d2": 0}, "q2": {"d1": 2}}


def read(path, content):
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return read_qrels(path)


@pytest.mark.parametrize(
    "content",
    [
        "q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 2\n",
        "q1\t0\td1\t1\r\nq1\tQ0\td2\t0\r\nq2\t0\td1\t2\r\n",
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td1\t2\n",
        "\ufeffquery-id corpus-id score\nq1 d1 1\nq1  d2 0\nq2 d1 2\n",
        "query document relevance\nq1 d1 1\nq1 d2 0\nq2 d1 2\n",
        "Query_ID\titeration\tDocNo\tLabel\nq1\t0\td1\t1\nq1\t0\td2\t0\nq2\t0\td1\t2\n",
        "\ufeffq1 d1 1\rq1 d2 0\rq2 d1 2\r",
        "q1 \t0\t d1 \t 1\t\r\nq1\t0\td2\t0 \nq2\t0\td1\t2\t\n",
        "q1 0 d1 1 \n  q1 0 d2 0\nq2 0 d1 2\x0b\n",
        '{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'
        '{"query-id": "q1", "corpus-id": "d2", "score": 0.0}\n'
        '{"qid":"q2", "docid":"d1", "relevance":"2"}\n',
        "q1 d1 1.0\nq1 d2 0.00\nq2 d1 2.\n",
        "q1 d1 1\nq1 d2 0\nq1 d1 1\nq2 d1 2\nq1 d1 1.0\n",  # the same judgement again
    ],
)
@pytest.mark.parametrize("name", ["qrels.tsv", "qrels.gz"])
def test_formats_that_others_use(tmp_path, name, content):
    assert read(tmp_path / name, content) == JUDGED


def test_tabs_separate_ids_with_blanks(tmp_path):
    content = "how to\tdoc 1\t1\nhow to\t0\tdoc 2\t-1\n"
    assert read(tmp_path / "qrels.tsv", content) == {"how to": {"doc 1": 1, "doc 2": -1}}


def test_white_space_beyond_ascii_belongs_to_ids(tmp_path):
    content = "q1 d\u00a01 1\nq1 0 文\u30002 2\n"
    assert read(tmp_path / "qrels", content) == {"q1": {"d\u00a01": 1, "文\u30002": 2}}


def test_numbers_of_json_are_the_ids_of_other_files(tmp_path):
    assert read(tmp_path / "qrels", '{"qid": 7, "pid": 8, "rel": 1}') == {"7": {"8": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\td 1", "expected query document relevance or query 0 document"),
        ("q 1 0 d1 1", "expected query document relevance or query 0 document"),
        ("q1\t \t1", "expected an id that is not blank"),
        ("q1\td1\t0.5", "a whole number of at most 6 digits as relevance, got '0.5'"),
        ("q1 d1 one", "as relevance, got 'one'"),
        ("q1 d1 1_0", "as relevance, got '1_0'"),
        ("q1 d1 1000000", "as relevance, got '1000000'"),
        ("q1\t0\t5\t", "as relevance, got ''"),
        ("q1\td1\t1\t", "as relevance, got ''"),
        ('{"qid": "q1", "docid": "d1"}', "expected one key for each of query, document and"),
        ('{"qid": "q1", "topic": "q2", "docid": "d1", "rel": 1}', "expected one key for each"),
        ('{"qid": "q1", "docid": "d1", "rel": true}', "as relevance, got 'True'"),
        ('{"qid": "q1", "docid": 1.5, "rel": 1}', "text or a whole number as id, got 1.5"),
        ("q0 0 d0 2", "q0 d0 must be judged 1 as before, got 2"),
    ],
)
def test_bad_lines_name_the_reason(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"qrels\.txt, line 2: .*{message}"):
        read(tmp_path / "qrels.txt", f"q0 d0 1\n{line}\n")
