"""Teachers' scores, compared with the libraries' own, and files of scores that training reads."""

import json
import math

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import splade_fast as sf
from splade_fast.cli import app
from splade_fast.recipe import (
    BM25Teacher,
    EncoderTeacher,
    SentenceTransformerTeacher,
    load_teacher,
    score_with_teachers,
)
from splade_fast.search.texts import DataError, Texts
from splade_fast.training import load_training_data
from tests.recipe.corpora import WeightedWords
from tests.tiny_models import make_tokenizer, masked_lm_configs, save_checkpoint

LISTS = [
    ("quick fox", ["a quick brown fox", "the lazy dog sleeps", "an old tree"]),
    ("lazy dog", ["the lazy dog sleeps", "fox and dog"]),
    ("tree", ["an old tree", "tree", "the lazy dog sleeps", "a quick brown fox"]),
]
QUERIES = [query for query, _ in LISTS]
DOCUMENTS = [documents for _, documents in LISTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """Folder of a classifier with one label, as transformers writes it."""
    folder = tmp_path_factory.mktemp("cross-encoder")
    config = masked_lm_configs()["bert"]
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(checkpoint, tmp_path_factory):
    """Folder of a SentenceTransformer, whose similarity is the cosine."""
    folder = tmp_path_factory.mktemp("dense")
    transformer = Transformer(str(checkpoint))
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder))
    return folder


def assert_close(actual, expected):
    assert [len(row) for row in actual] == [len(texts) for texts in DOCUMENTS]
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(mine), torch.as_tensor(theirs), check_dtype=False
        )


def test_an_encoder_scores_by_inner_products(checkpoint):
    encoder = sf.SpladeEncoder.from_pretrained(checkpoint)
    expected = [
        encoder.encode(query, show_progress=False).to_dense()[0]
        @ encoder.encode(documents, show_progress=False).to_dense().T
        for query, documents in LISTS
    ]
    teacher = load_teacher(checkpoint)
    assert isinstance(teacher, EncoderTeacher)
    assert_close(teacher(QUERIES, DOCUMENTS), expected)
    assert_close(load_teacher(f"splade:{checkpoint}")(QUERIES, DOCUMENTS), expected)


@pytest.fixture(scope="module")
def stored(checkpoint, tmp_path_factory):
    """The corpus of the lists, and the folder of an index by the checkpoint."""
    folder = tmp_path_factory.mktemp("stored")
    texts = list(dict.fromkeys(text for texts in DOCUMENTS for text in texts))
    corpus = Texts([f"d{number}" for number in range(len(texts))], texts)
    lines = "".join(f"{i}\t{text}\n" for i, text in zip(corpus.ids, corpus.texts, strict=True))
    (folder / "corpus.tsv").write_text(lines)
    encoder = sf.SpladeEncoder.from_pretrained(checkpoint)
    for name, k in (("whole", None), ("pruned", 4)):
        sf.encode_corpus(
            *(encoder, folder / "corpus.tsv", folder / name),
            **{"model": str(checkpoint), "k": k, "max_length": 5, "show_progress": False},
        )
    return corpus, folder


def count_documents(encoder, monkeypatch):
    """Return the list to which each later call of encode adds its number of texts."""
    counts, encode = [], type(encoder).encode

    def counting(self, texts, **options):
        counts.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(type(encoder), "encode", counting)
    return counts


def test_an_index_spares_encoding_its_documents(checkpoint, stored, monkeypatch):
    corpus, folder = stored
    encoder = sf.SpladeEncoder.from_pretrained(checkpoint)
    expected = EncoderTeacher(encoder, max_length=5)(QUERIES, DOCUMENTS)
    teacher = EncoderTeacher(encoder)
    teacher.use_index(folder / "whole", corpus)
    counts = count_documents(encoder, monkeypatch)
    assert_close(teacher(QUERIES, DOCUMENTS), expected)
    assert counts == [len(QUERIES)]
    with pytest.raises(DataError, match="corpus of encoder must hold all documents, got 'other'"):
        teacher(["fox"], [["other"]])


def test_a_pruned_index_gives_the_scores_of_its_vectors(checkpoint, stored):
    corpus, folder = stored
    teacher = load_teacher(checkpoint)
    teacher.use_index(folder / "pruned", corpus)
    queries = teacher.encoder.encode(QUERIES, max_length=5, show_progress=False).to_dense()
    documents = teacher.encoder.encode(corpus.texts, k=4, max_length=5, show_progress=False)
    rows = [[corpus.texts.index(text) for text in texts] for texts in DOCUMENTS]
    expected = [
        vector @ documents.to_dense()[row].T for vector, row in zip(queries, rows, strict=True)
    ]
    assert_close(teacher(QUERIES, DOCUMENTS), expected)
    assert teacher.name == f"{checkpoint} with 4 entries a document"  # told apart by --resume


def test_an_index_that_does_not_fit(checkpoint, stored):
    corpus, folder = stored
    teacher = load_teacher(checkpoint)
    others = Texts(["other", *corpus.ids[1:]], corpus.texts)
    with pytest.raises(DataError, match="the documents of the corpus, got 'd0'"):
        teacher.use_index(folder / "whole", others)
    more = Texts([*corpus.ids, "more"], [*corpus.texts, "more"])
    with pytest.raises(DataError, match="the documents of the corpus, got 5 of 6"):
        teacher.use_index(folder / "whole", more)
    with torch.no_grad():
        next(teacher.encoder.parameters()).add_(1)
    with pytest.raises(DataError, match="index must be of the encoder of .*, got that of another"):
        teacher.use_index(folder / "whole", corpus)


def test_the_encoder_of_queries_in_a_folder_counts(checkpoint, tmp_path):
    sf.SpladeEncoder.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    WeightedWords().save_pretrained(tmp_path / "model" / "query")
    documents = sf.SpladeEncoder.from_pretrained(checkpoint)
    expected = EncoderTeacher(documents, WeightedWords())(QUERIES, DOCUMENTS)
    assert_close(load_teacher(tmp_path / "model")(QUERIES, DOCUMENTS), expected)


def test_a_cross_encoder_gives_its_logits(cross_encoder):
    model = CrossEncoder(str(cross_encoder), device="cpu")
    expected = [
        torch.logit(torch.as_tensor(model.predict([(query, text) for text in documents])))
        for query, documents in LISTS
    ]
    assert_close(load_teacher(cross_encoder)(QUERIES, DOCUMENTS), expected)


def test_a_cross_encoder_that_sentence_transformers_saved(cross_encoder, tmp_path):
    CrossEncoder(str(cross_encoder), device="cpu").save_pretrained(str(tmp_path / "saved"))
    expected = load_teacher(cross_encoder)(QUERIES, DOCUMENTS)
    assert_close(load_teacher(tmp_path / "saved")(QUERIES, DOCUMENTS), expected)


def test_a_dense_model_scores_by_its_own_similarity(dense):
    model = SentenceTransformer(str(dense), device="cpu")
    expected = [
        torch.nn.functional.cosine_similarity(
            torch.as_tensor(model.encode([query])), torch.as_tensor(model.encode(documents))
        )
        for query, documents in LISTS
    ]
    teacher = load_teacher(dense)
    assert isinstance(teacher, SentenceTransformerTeacher)
    assert_close(teacher(QUERIES, DOCUMENTS), expected)


def test_a_sparse_encoder_scores_as_ours_does(checkpoint):
    expected = load_teacher(checkpoint)(QUERIES, DOCUMENTS)
    assert_close(load_teacher(f"sparse-encoder:{checkpoint}")(QUERIES, DOCUMENTS), expected)
    model = SparseEncoder(str(checkpoint), device="cpu", similarity_fn_name="cosine")
    cosines = SentenceTransformerTeacher(model)(QUERIES, DOCUMENTS)
    assert max(score for row in cosines for score in row.tolist()) <= 1 + 1e-6


def test_a_folder_of_bags_of_words_alone(tmp_path):
    WeightedWords().save_pretrained(tmp_path / "words")
    expected = EncoderTeacher(WeightedWords())(QUERIES, DOCUMENTS)
    assert_close(load_teacher(tmp_path / "words")(QUERIES, DOCUMENTS), expected)


def test_bm25_is_lucenes():
    corpus = list(dict.fromkeys(text for texts in DOCUMENTS for text in texts))
    words = [text.split() for text in corpus]
    words = [[word for word in text if word not in ("a", "the", "an", "and")] for text in words]
    mean = sum(map(len, words)) / len(words)

    def score(query, document):
        mine, total = words[corpus.index(document)], 0.0
        for word in query.split():
            frequency = sum(word in text for text in words)
            idf = math.log(1 + (len(words) - frequency + 0.5) / (frequency + 0.5))
            count = mine.count(word)
            total += idf * count / (count + 1.5 * (0.25 + 0.75 * len(mine) / mean))
        return total

    expected = [[score(query, text) for text in documents] for query, documents in LISTS]
    assert_close(BM25Teacher(corpus)(QUERIES, DOCUMENTS), expected)
    assert max(map(max, expected)) > 0
    [nothing] = BM25Teacher(corpus)(["the unseen"], [corpus])
    assert nothing.tolist() == [0.0] * len(corpus)
    with pytest.raises(DataError, match="corpus of bm25 must hold all documents, got 'other'"):
        BM25Teacher(corpus)(["fox"], [["other"]])


class Fixed:
    """Teacher whose scores are given by text."""

    def __init__(self, name, scores, fail_at=None):
        self.name, self.scores, self.fail_at, self.calls = name, scores, fail_at, 0

    def __call__(self, queries, documents):
        if self.calls == self.fail_at:
            raise OSError("disk full")
        self.calls += 1
        return [torch.tensor([self.scores[text] for text in texts]) for texts in documents]


FIRST = Fixed("first", {"a": 1.0, "b": 3.0, "c": 2.0})
SECOND = Fixed("second", {"a": 30.0, "b": 10.0, "c": 10.0})


@pytest.fixture
def source(tmp_path):
    lines = [
        {"query_id": 7, "query": "q", "document_id": "x", "document": "a", "negatives": ["b", "c"]},
        {"query_id": 8, "query": "r", "document_id": "y", "document": "b", "negatives": ["c", "c"]},
    ]
    lines[0]["negative_ids"], lines[1]["negative_ids"] = ["y", "z"], ["z", "z"]
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score(source, path, teachers, **options):
    report = score_with_teachers(source, path, teachers, show_progress=False, **options)
    return [json.loads(line) for line in path.read_text().splitlines()], report


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": "none"}, [[15.5, 6.5, 6.0], [6.5, 6.0, 6.0]]),
        ({}, [[0.5, 0.5, 0.25], [0.5, 0.0, 0.0]]),  # min-max; the second teacher has equal scores
        ({"weights": [3, 1], "scale": 8}, [[2.0, 6.0, 3.0], [6.0, 0.0, 0.0]]),
        (
            {"normalize": "z-score", "weights": [1, 0]},
            [
                [-math.sqrt(1.5), math.sqrt(1.5), 0.0],
                [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)],
            ],
        ),
    ],
)
def test_an_ensemble_is_a_weighted_mean_of_normalised_scores(tmp_path, source, options, expected):
    lines, report = score(source, tmp_path / "out.jsonl", [FIRST, SECOND], **options)
    assert [line["scores"] for line in lines] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert (report.lists, report.documents) == (2, 6)
    assert report.first_is_best == sum(row[0] > max(row[1:]) for row in expected)


def test_training_reads_the_scores(tmp_path, source):
    lines, report = score(source, tmp_path / "out.jsonl", [FIRST])
    assert lines[0] == {
        "query_id": 7,
        "query": "q",
        "document_ids": ["x", "y", "z"],
        "documents": ["a", "b", "c"],
        "scores": [1.0, 3.0, 2.0],  # one teacher is not normalised
    }
    assert report.first_is_best == 1
    assert list(load_training_data(tmp_path / "out.jsonl", streaming=True)) == [
        {"query": line["query"], "documents": line["documents"], "scores": line["scores"]}
        for line in lines
    ]


def test_ids_stay_ids_and_other_layouts_are_read(tmp_path, source):
    expected, _ = score(source, tmp_path / "texts.jsonl", [FIRST])
    queries, corpus = Texts(["7", "8"], ["q", "r"]), Texts(["x", "y", "z"], ["a", "b", "c"])
    texts = {"queries": queries, "corpus": corpus}
    ids = tmp_path / "ids.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        del line["query"], line["document"], line["negatives"]
    ids.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored, _ = score(ids, tmp_path / "a.jsonl", [FIRST], **texts)
    names = ("query_id", "document_ids", "scores")
    assert scored == [{name: line[name] for name in names} for line in expected]
    with_texts, _ = score(source, tmp_path / "b.jsonl", [FIRST], **texts)
    assert with_texts == expected
    (tmp_path / "ids.tsv").write_text("7\tx\ty\n8\ty\tz\n")
    scored, _ = score(tmp_path / "ids.tsv", tmp_path / "c.jsonl", [FIRST], **texts)
    assert scored == [
        {"query_id": "7", "document_ids": ["x", "y"], "scores": [1.0, 3.0]},
        {"query_id": "8", "document_ids": ["y", "z"], "scores": [3.0, 2.0]},
    ]
    (tmp_path / "texts.tsv").write_text("q\ta\tb\n")
    scored, _ = score(tmp_path / "texts.tsv", tmp_path / "d.jsonl", [FIRST], corpus=corpus)
    assert scored == [{"query": "q", "documents": ["a", "b"], "scores": [1.0, 3.0]}]
    (tmp_path / "lists.jsonl").write_text('{"query": "q", "documents": ["c", "a"]}\n')
    scored, _ = score(tmp_path / "lists.jsonl", tmp_path / "e.jsonl", [FIRST])
    assert scored == [{"query": "q", "documents": ["c", "a"], "scores": [2.0, 1.0]}]


def test_a_resumed_run_scores_what_is_left(tmp_path, source):
    expected, report = score(source, tmp_path / "whole.jsonl", [FIRST])
    path = tmp_path / "out.jsonl"
    with pytest.raises(OSError, match="disk full"):
        score(source, path, [Fixed("first", FIRST.scores, fail_at=1)], chunk_size=1)
    assert not path.exists()
    with pytest.raises(DataError, match="resume must go on with the teachers of the chunks"):
        score(source, path, [SECOND], chunk_size=1, resume=True)
    teacher = Fixed("first", FIRST.scores)
    assert score(source, path, [teacher], chunk_size=1, resume=True) == (expected, report)
    assert teacher.calls == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "mined.jsonl",
        "out.jsonl",
        "whole.jsonl",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"query": "q", "document": "a"}, "line 1: expected query and documents, or query"),
        ({"query": "q", "documents": ["a"]}, "line 1: expected at least 2 documents, got 1"),
        ({"query": "q", "documents": ["a", ""]}, "line 1: documents must not be empty"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=message):
        score(tmp_path / "bad.jsonl", tmp_path / "out.jsonl", [FIRST])


@pytest.mark.parametrize(
    ("teachers", "options", "message"),
    [
        ([], {}, "teachers must hold at least one teacher, got none"),
        ([FIRST], {"weights": [1, 2]}, "weights must be one per teacher, 1, got 2"),
        ([FIRST], {"weights": [0]}, r"at least 0 and not all 0, got \[0.0\]"),
        ([FIRST], {"normalize": "l2"}, "one of none, min-max, z-score, got 'l2'"),
        ([FIRST], {"scale": 0}, "scale must be finite and greater than 0, got 0"),
        ([Fixed("bad", dict.fromkeys("abc", math.nan))], {}, "bad must give finite scores, got"),
    ],
)
def test_bad_arguments(tmp_path, source, teachers, options, message):
    with pytest.raises(ValueError, match=message):
        score(source, tmp_path / "out.jsonl", teachers, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["mined.jsonl"]


def test_unusable_teachers(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="corpus must be given for the teacher bm25, got None"):
        load_teacher("bm25")
    folder = tmp_path / "late"
    sf.SpladeEncoder.from_pretrained(checkpoint).save_pretrained(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config["model_type"] = "MultiVectorEncoder"
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="one of CrossEncoder, .*, got MultiVectorEncoder in "):
        load_teacher(folder)


def test_the_command_scores_by_an_ensemble(tmp_path, checkpoint, cross_encoder):
    source = tmp_path / "lists.jsonl"
    lines = [{"query": query, "documents": documents} for query, documents in LISTS]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["bm25", str(checkpoint), str(cross_encoder)]
    options = [part for name in names for part in ("--teacher", name)]
    options += ["--weight", "1", "--weight", "2", "--weight", "0.5", "--scale", "30"]
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["score", str(source), str(out), *options])
    assert result.exit_code == 0, result.output
    corpus = [text for texts in DOCUMENTS for text in texts]
    teachers = [load_teacher(name, corpus=corpus) for name in names]
    expected, _ = score(source, tmp_path / "e.jsonl", teachers, weights=[1, 2, 0.5], scale=30)
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert result.stdout.startswith("lists\t3\ndocuments\t9\nlists whose first document")


def test_the_command_takes_an_index(tmp_path, checkpoint, cross_encoder, stored):
    _, folder = stored
    source = tmp_path / "lists.jsonl"
    lines = [{"query": query, "documents": documents} for query, documents in LISTS]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(name, *options):
        out = tmp_path / name
        arguments = ["--max-length", "5", *map(str, options)]
        result = CliRunner().invoke(app, ["score", str(source), str(out), *arguments])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in out.read_text().splitlines()]

    ensemble = ["--teacher", checkpoint, "--teacher", cross_encoder]
    given = ["--index", folder / "whole", "--corpus", folder / "corpus.tsv"]
    lines, expected = run("with.jsonl", *ensemble, *given), run("without.jsonl", *ensemble)
    assert [line["documents"] for line in lines] == [line["documents"] for line in expected]
    assert_close(*([line["scores"] for line in found] for found in (lines, expected)))
    for options, message in (
        ((*ensemble, "--index", folder / "whole"), "--index needs --corpus"),
        (("--teacher", cross_encoder, *given), "--index must be of a SPLADE teacher, got that of"),
    ):
        result = CliRunner().invoke(app, ["score", str(source), "o.jsonl", *map(str, options)])
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
