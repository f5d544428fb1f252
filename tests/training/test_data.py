import gzip
import json
import math
import os

import pytest

from splade_fast.search.texts import DataError
from splade_fast.training import load_training_data
from splade_fast.training.data.layout import infer_kind
from tests.selection import pairwise

datasets = pytest.importorskip("datasets")

PAIRS = [
    {"query": "what jumps", "document": 'a "quick" fox'},
    {"query": "who sleeps", "document": "the lazy dog"},
]
LABELLED = [{**PAIRS[0], "label": 1.0}, {**PAIRS[1], "label": 0.25}]
HARD = [{**PAIRS[0], "negatives": ["a tree", "a dog"]}, {**PAIRS[1], "negatives": ["a fox"]}]
TRIPLES = [{**PAIRS[0], "negatives": ["a tree"]}, {**PAIRS[1], "negatives": ["a fox"]}]
SCORED = [
    {"query": "what jumps", "documents": ["a fox", "a tree"], "scores": [2.5, -1.0]},
    {"query": "who sleeps", "documents": ["the dog", "a fox", "a tree"], "scores": [3.0, 1.0, 0.0]},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, content):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def tsv(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def both(source, **options):
    """The rows of the converted and of the streamed data, which are equal."""
    rows = list(load_training_data(source, **options))
    assert list(load_training_data(source, streaming=True, **options)) == rows
    return rows


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "ndjson"])
@pytest.mark.parametrize("rows", [PAIRS, LABELLED, HARD, SCORED])
def test_json_lines(tmp_path, ending, rows):
    assert both(write(tmp_path / f"train.{ending}", jsonl(rows))) == rows


@pairwise(
    ending=["tsv", "tsv.gz"],
    header=[False, True],
    rows=[
        pytest.param(PAIRS, id="pairs"),
        pytest.param(LABELLED, id="labelled"),
        pytest.param(TRIPLES, id="triples"),
    ],
)
def test_tsv_with_and_without_a_header(tmp_path, ending, header, rows):
    fields = [[v[0] if isinstance(v, list) else v for v in row.values()] for row in rows]
    lines = [list(rows[0]), *fields] if header else fields
    assert both(write(tmp_path / f"train.{ending}", tsv(*lines))) == rows


def test_quotes_and_carriage_returns_of_tsv_mean_nothing(tmp_path):
    path = write(tmp_path / "train.tsv", '"open\ta "quick" fox\r\n\r\nwho\tdog\r\n')
    assert both(path) == [
        {"query": '"open', "document": 'a "quick" fox'},
        {"query": "who", "document": "dog"},
    ]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffquery\tdocument\nwho\tdog\n",
        "\ufeffwho\tdog\n",
        "query\tdocument\rwho\tdog\r",
        "Query\tPositive\tsource\nwho\tdog\tweb\n",  # an unknown column beside the known ones
    ],
)
def test_marks_line_ends_and_headers_of_tsv_are_no_texts(tmp_path, content):
    path = write(tmp_path / "train.tsv", content)
    assert both(path) == [{"query": "who", "document": "dog"}]


def test_a_header_is_no_example_where_columns_tell_the_parts(tmp_path):
    path = write(tmp_path / "train.tsv", "query\tid\tdocument\nwho\t7\tdog\n")
    expected = [{"query": "who", "document": "dog"}]
    assert both(path, columns=["query", "-", "document"]) == expected
    assert both(write(path, "who\t7\tdog\n"), columns=["query", "-", "document"]) == expected


def test_a_header_of_ids_needs_their_texts(tmp_path):
    path = write(tmp_path / "train.tsv", "qid\tpos_pid\tneg_pid\n1\t7\t8\n")
    with pytest.raises(DataError, match="line 1: expected the columns .* got qid, pos_pid"):
        load_training_data(path)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "json", "parquet"])
def test_formats_that_datasets_reads(tmp_path, ending):
    path = tmp_path / f"train.{ending}"
    source = datasets.Dataset.from_list(LABELLED)
    if ending == "parquet":
        source.to_parquet(path)
    elif ending == "json":
        source.to_json(path)
    else:
        source.to_csv(tmp_path / "plain.csv")
        write(path, (tmp_path / "plain.csv").read_bytes())
    assert both(path) == LABELLED


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.csv", "query,document\nq,d\n".encode("utf-16"), "csv file: 'utf-8' codec can't"),
        ("train.csv", b"", "csv file: No columns to parse"),
        ("latin.csv", b"query,document\nq,\xff\n", "csv file: 'utf-8' codec can't"),
        ("train.json", b"{", "json file: .* parse error"),
        ("train.parquet", b"garbage", "parquet file: Parquet file size is 7 bytes"),
    ],
)
def test_damaged_files_name_file_and_reason(tmp_path, name, content, reason):
    with pytest.raises(DataError, match=rf"{name} must be a whole {reason}"):
        load_training_data(write(tmp_path / name, content))
    with pytest.raises(DataError, match=name):
        load_training_data(tmp_path / name, streaming=True)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / name, content)
    with pytest.raises(DataError, match="folder must be a file, a folder of data or a dataset"):
        load_training_data(tmp_path / "folder")


def test_objects_and_saved_folders(tmp_path):
    source = datasets.Dataset.from_list(HARD)
    assert both(source) == HARD
    assert isinstance(load_training_data(source), datasets.Dataset)
    streamed = load_training_data(source.to_iterable_dataset())
    assert isinstance(streamed, datasets.IterableDataset)
    assert list(streamed) == HARD
    nameless = datasets.IterableDataset.from_generator(lambda: iter(HARD))
    assert nameless.column_names is None
    assert list(load_training_data(nameless)) == HARD
    source.save_to_disk(tmp_path / "one")
    assert both(tmp_path / "one") == HARD
    splits = datasets.DatasetDict(train=source, dev=source.select([1]))
    splits.save_to_disk(tmp_path / "several")
    assert both(tmp_path / "several", split="dev") == HARD[1:]
    assert list(load_training_data(splits, split="dev")) == HARD[1:]
    with pytest.raises(DataError, match="split must be one of train, dev, got 'test'"):
        load_training_data(splits, split="test")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", jsonl(HARD))
    assert both(tmp_path / "files") == HARD


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"anchor": "q", "positive": "d"}, {"query": "q", "document": "d"}),
        (
            {"Anchor": "q", "positive": "d", "negative": "n"},
            {"query": "q", "document": "d", "negatives": ["n"]},
        ),
        (
            {"anchor": "q", "positive": "d", "negative_1": "n", "negative_2": "o"},
            {"query": "q", "document": "d", "negatives": ["n", "o"]},
        ),
        (
            {"sentence1": "q", "sentence2": "d", "score": 0.5},
            {"query": "q", "document": "d", "label": 0.5},
        ),
        (
            {"query": "q", "positive": "d", "negative": "n", "score": 2.5},
            {"query": "q", "documents": ["d", "n"], "scores": [0.0, -2.5]},
        ),
        (
            {"query": "q", "positive": "d", "negative": "n", "label": [3.0, 0.5]},
            {"query": "q", "documents": ["d", "n"], "scores": [3.0, 0.5]},
        ),
        (
            {
                "query": "q",
                "pos": ["d", "e"],
                "neg": ["n"],
                "pos_scores": [2, 1],
                "neg_scores": [1],
            },
            {"query": "q", "documents": ["d", "n"], "scores": [2.0, 1.0]},
        ),
        (
            {
                "query_id": "7",
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "T", "text": "d"}],
                "negative_passages": [{"docid": "2", "title": "", "text": "n"}],
            },
            {"query": "q", "document": "T d", "negatives": ["n"]},
        ),
    ],
)
def test_names_that_others_use(tmp_path, given, expected):
    assert both(write(tmp_path / "train.jsonl", jsonl([given]))) == [expected]
    assert list(load_training_data(datasets.Dataset.from_list([given]))) == [expected]


def test_columns_say_what_names_do_not(tmp_path):
    path = write(tmp_path / "train.tsv", tsv((0.5, "7", "q", "d"), (1, "8", "r", "e")))
    expected = [
        {"query": "q", "document": "d", "label": 0.5},
        {"query": "r", "document": "e", "label": 1.0},
    ]
    assert both(path, columns=["label", "-", "query", "document"]) == expected
    renamed = {"much": "label", "asked": "query", "found": "document", "query": "-"}
    rows = [{"much": 0.5, "asked": "q", "found": "d", "query": "no"}]
    assert both(write(tmp_path / "a.jsonl", jsonl(rows)), columns=renamed) == expected[:1]
    assert (
        list(load_training_data(datasets.Dataset.from_list(rows), columns=renamed))
        == (expected[:1])
    )
    headed = write(tmp_path / "headed.tsv", tsv(list(rows[0]), list(rows[0].values())))
    assert both(headed, columns=renamed) == expected[:1]
    several = write(tmp_path / "several.tsv", tsv("qdno", "redm"))
    negatives = both(several, columns=["query", "document", "negatives", "negatives"])
    assert negatives[1] == {"query": "r", "document": "e", "negatives": ["d", "m"]}


def test_ids_of_texts_in_other_files(tmp_path):
    queries = write(tmp_path / "queries.tsv", "1\twhat jumps\n2\twho sleeps\n")
    corpus = write(tmp_path / "corpus.jsonl.gz", jsonl([{"id": i, "text": f"d{i}"} for i in "789"]))
    files = {"queries": queries, "corpus": corpus}
    triples = write(tmp_path / "triples.tsv", "1\t7\t8\n2\t9\t7\n")
    assert both(triples, **files) == [
        {"query": "what jumps", "document": "d7", "negatives": ["d8"]},
        {"query": "who sleeps", "document": "d9", "negatives": ["d7"]},
    ]
    scores = write(tmp_path / "scores.tsv", "2.5\t1.5\t1\t7\t8\n")
    columns = ["positive_scores", "negative_scores", "query", "document", "negatives"]
    assert both(scores, columns=columns, **files) == [
        {"query": "what jumps", "documents": ["d7", "d8"], "scores": [2.5, 1.5]}
    ]
    lists = write(tmp_path / "lists.jsonl", '{"qid": 2, "pids": [8, 9], "scores": [1, 0.5]}\n')
    assert both(lists, **files) == [
        {"query": "who sleeps", "documents": ["d8", "d9"], "scores": [1.0, 0.5]}
    ]
    assert both(write(tmp_path / "own.tsv", "own words\t7\t8\n"), corpus=corpus) == [
        {"query": "own words", "document": "d7", "negatives": ["d8"]}
    ]
    for value in (True, 7.0, None):
        bad = write(
            tmp_path / "bad.jsonl", jsonl([{"qid": value, "pids": [8, 9], "scores": [1, 0]}])
        )
        with pytest.raises(DataError, match=rf"line 1: query must be an id .* got {value!r}"):
            load_training_data(bad, **files)
    write(triples, "1\t7\t8\n1\t5\t7\n")
    with pytest.raises(DataError, match=r"triples.tsv, line 2: document must be an id .* got '5'"):
        load_training_data(triples, **files)


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "train.tsv", "q\td\n")
    assert both(path) == [{"query": "q", "document": "d"}]
    write(path, "q\tother\n")
    assert both(path) == [{"query": "q", "document": "other"}]


BAD_LINES = [
    (tsv("qd", ("q", " ")), "line 2: document must not be empty"),
    (tsv("qd", ("", "d")), "line 2: query must not be empty"),
    (tsv("qd", "qdn"), "line 2: expected 2 columns, as in the first line, got 3"),
    (
        tsv(("q", "d", 0.5), ("q", "d", 1.5)),
        "line 2: label must be one number from 0 to 1, got 1.5",
    ),
    (tsv(("q", "d", 0.5), ("q", "d", "nan")), "line 2: scores must be finite, got nan"),
    (tsv(("q", "d", 0.5), ("q", "d", "much")), "line 2: scores must be numbers, got 'much'"),
    (tsv("qdnx"), "line 1: expected query<TAB>document, .* got 4 columns"),
    (tsv("q"), "line 1: .* got 1 columns"),
    (tsv(("query", "negative"), "qn"), "line 1: expected the columns query, document; or .* got"),
    (tsv(("query", "anchor", "document"), "qrd"), "line 1: expected one column for query, got"),
    (tsv(("query", "document")), "at least one example, got none"),
    ("", "at least one example, got none"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_tsv_names_line_and_reason(tmp_path, content, message, streaming):
    path = write(tmp_path / "train.tsv", content)
    with pytest.raises(DataError, match=rf"train\.tsv.*{message}"):
        list(load_training_data(path, streaming=streaming))


BAD_ROWS = [
    ({**HARD[0], "negatives": []}, "negatives must hold at least one text, got none"),
    ({**HARD[0], "negatives": ["n", ""]}, "negatives must not be empty"),
    ({**HARD[0], "negatives": ["n", 5]}, "negatives must be text, got 5"),
    ({**HARD[0], "query": None}, "query must be text, got None"),
    ({**HARD[0], "document": "fox \ud800"}, r"document must be Unicode text, .* at character 4"),
    (
        {"query": "q", "document": "d"},
        "expected the columns of the first row, negatives is missing",
    ),
]
BAD_LISTS = [
    ({**SCORED[0], "scores": [1.0]}, "expected 2 scores, one per document, got 1"),
    ({**SCORED[0], "scores": [1.0, math.inf]}, "scores must be finite, got inf"),
    ({**SCORED[0], "scores": [1.0, 10**400]}, "scores must be numbers, got 1000"),
    ({**SCORED[0], "documents": ["d"], "scores": [1.0]}, "at least 2 scored documents, got 1"),
]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [(HARD[0], *case) for case in BAD_ROWS] + [(SCORED[0], *case) for case in BAD_LISTS],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_name_place_and_reason(tmp_path, good, bad, message, streaming):
    path = write(tmp_path / "train.jsonl", jsonl([good, bad]))
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{message}"):
        list(load_training_data(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_datasets_are_numbered(streaming):
    rows = [*LABELLED, {**LABELLED[0], "label": -1.0}]
    with pytest.raises(DataError, match="the dataset, row 2: label must be one number"):
        list(load_training_data(datasets.Dataset.from_list(rows), streaming=streaming))


def test_too_few_negatives(tmp_path):
    path = write(tmp_path / "train.jsonl", jsonl(HARD))
    with pytest.raises(DataError, match="line 2: expected at least 2 negatives, got 1"):
        load_training_data(path, negatives_per_query=2)
    assert len(load_training_data(path, negatives_per_query=1)) == 2
    with pytest.raises(DataError, match="line 1: expected at least 2 negatives, got 1"):
        load_training_data(write(tmp_path / "s.jsonl", jsonl(SCORED)), negatives_per_query=2)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(DataError, match="no such file: .*missing.tsv"):
        load_training_data(tmp_path / "missing.tsv")
    with pytest.raises(DataError, match="no such file: .*missing.parquet"):
        load_training_data(tmp_path / "missing.parquet")
    with pytest.raises(DataError, match="no such file: .*missing.txt"):
        load_training_data(write(tmp_path / "t.tsv", "1\t2\n"), queries=tmp_path / "missing.txt")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match="folder.tsv must be a file, got a folder"):
        load_training_data(tmp_path / "folder.tsv")
    source, target = os.pipe()
    with os.fdopen(source), os.fdopen(target):
        with pytest.raises(DataError, match="must be a file, .* got a pipe"):
            load_training_data(f"/dev/fd/{source}")
        with pytest.raises(DataError, match="must be a file, .* got a pipe"):
            load_training_data(tmp_path / "t.tsv", corpus=f"/dev/fd/{source}")
    with pytest.raises(DataError, match="utf16.tsv must be UTF-8, got UTF-16"):
        load_training_data(write(tmp_path / "utf16.tsv", "q\td\n".encode("utf-16")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must be a file, a folder of data or a dataset"):
        load_training_data(tmp_path / "empty")
    with pytest.raises(TypeError, match="source must be a path"):
        load_training_data(PAIRS)
    with pytest.raises(DataError, match="line 2: .*utf-8"):
        load_training_data(write(tmp_path / "latin.tsv", b"q\td\nq\t\xff\n"))
    whole = gzip.compress(b"q\td\n" * 1000)
    (tmp_path / "cut.tsv.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"cut\.tsv\.gz must be a whole gzip file"):
        load_training_data(tmp_path / "cut.tsv.gz")
    with pytest.raises(DataError, match="expected a JSON object"):
        load_training_data(write(tmp_path / "list.jsonl", "[1, 2]\n"))


def test_bad_columns(tmp_path):
    path = write(tmp_path / "train.tsv", "q\td\n")
    with pytest.raises(DataError, match="columns must map to one of .*, got 'asked'"):
        load_training_data(path, columns=["asked", "document"])
    with pytest.raises(DataError, match="expected 3 columns, got 2"):
        load_training_data(path, columns=["query", "document", "label"])
    with pytest.raises(DataError, match="columns must be"):
        load_training_data(datasets.Dataset.from_list(PAIRS), columns=["query", "document"])
    with pytest.raises(DataError, match="columns names 'asked', which is not there"):
        load_training_data(datasets.Dataset.from_list(PAIRS), columns={"asked": "query"})


def test_kinds():
    assert [infer_kind(rows[0]) for rows in (PAIRS, LABELLED, HARD, SCORED)] == [
        "pairs",
        "labelled pairs",
        "hard negatives",
        "scored lists",
    ]
    with pytest.raises(DataError, match="expected the columns of load_training_data, got text"):
        infer_kind(["text"])
