"""Hard negatives, compared with a plain search and plain rules, and runs that are interrupted."""

import json

import pytest
import torch
from typer.testing import CliRunner

import splade_fast as sf
from splade_fast.cli import app
from splade_fast.recipe import MiningReport, MiningTask, NegativeRules, mine_hard_negatives
from splade_fast.search.texts import DataError, Texts
from splade_fast.training import load_training_data
from tests.recipe.corpora import WeightedWords, draw_task, write_task
from tests.tiny_models import masked_lm_configs, save_checkpoint

QUIET = {"show_progress": False, "chunk_size": 3}


@pytest.fixture(scope="module")
def encoder():
    return WeightedWords()


def mine(encoder, task, path, rules=None, **options):
    report = mine_hard_negatives(encoder, task, path, rules, **(QUIET | options))
    return [json.loads(line) for line in path.read_text().splitlines()], report


def plain_mine(encoder, task, rules):
    """Return (query id, positive, negatives) of each line, and the counts of the report."""
    ids, texts = task.corpus.ids, task.corpus.texts
    vectors = encoder.encode(texts, show_progress=False).to_dense()
    lines, report = [], MiningReport()
    for query_id, query in zip(task.queries.ids, task.queries.texts, strict=True):
        scores = (encoder.encode(query, show_progress=False).to_dense() @ vectors.T)[0].tolist()
        hits = sorted((n for n in range(len(ids)) if scores[n] > 0), key=lambda n: -scores[n])
        relevant = [d for d, grade in task.qrels[query_id].items() if grade >= rules.min_relevance]
        positives = [ids.index(d) for d in relevant if d in ids]
        report.queries += bool(positives)
        forbidden = {" ".join(texts[p].split()) for p in positives} | {query}
        for positive in positives:
            report.pairs += 1
            kept, seen = [], []
            for number in hits[rules.first_rank - 1 : rules.last_rank]:
                report.candidates += 1
                text, score, limit = " ".join(texts[number].split()), scores[number], None
                if ids[number] in relevant:
                    limit = "relevant"
                elif text in forbidden:
                    limit = "equal_text"
                elif text in seen:
                    limit = "duplicate"
                elif rules.max_score is not None and score > rules.max_score:
                    limit = "max_score"
                elif rules.min_score is not None and score < rules.min_score:
                    limit = "min_score"
                elif rules.relative_margin and score > scores[positive] * (
                    1 - rules.relative_margin
                ):
                    limit = "relative_margin"
                elif score > scores[positive] - (rules.absolute_margin or -9e9):
                    limit = "absolute_margin"
                seen.append(text)
                if limit:
                    report.dropped[limit] += 1
                else:
                    kept.append(ids[number])
            kept = kept[: rules.num_negatives]
            if len(kept) >= (rules.min_negatives or rules.num_negatives):
                report.written += 1
                report.negatives += len(kept)
                lines.append((query_id, ids[positive], kept))
    return lines, report


RULES = [
    NegativeRules(num_negatives=3),
    NegativeRules(num_negatives=4, min_negatives=1, relative_margin=0.3, first_rank=2),
    NegativeRules(num_negatives=2, absolute_margin=0.75, last_rank=40),
    NegativeRules(num_negatives=5, min_negatives=2, max_score=2.5, min_score=1.0, min_relevance=2),
    NegativeRules(num_negatives=3, relative_margin=0.1, absolute_margin=0.4, max_score=2.0),
]


@pytest.mark.parametrize("number", range(len(RULES)))
@pytest.mark.parametrize("seed", [0, 1])
def test_negatives_are_those_of_a_plain_search_and_plain_rules(encoder, tmp_path, number, seed):
    task, rules = draw_task(seed), RULES[number]
    lines, report = mine(encoder, task, tmp_path / "mined.jsonl", rules)
    expected_lines, expected_report = plain_mine(encoder, task, rules)
    assert report == expected_report
    found = [(line["query_id"], line["document_id"], line["negative_ids"]) for line in lines]
    assert found == expected_lines
    texts = dict(zip(task.corpus.ids, task.corpus.texts, strict=True))
    queries = dict(zip(task.queries.ids, task.queries.texts, strict=True))
    for line in lines:
        assert line["query"] == queries[line["query_id"]]
        assert line["document"] == texts[line["document_id"]]
        assert line["negatives"] == [texts[doc_id] for doc_id in line["negative_ids"]]


def test_every_guard_drops_something_in_these_cases(encoder):
    total = MiningReport()
    for rules in RULES:
        total.add(plain_mine(encoder, draw_task(0), rules)[1])
    assert min(total.dropped.values()) > 0
    assert 0 < total.written < total.pairs


def test_training_reads_texts_or_ids(encoder, tmp_path):
    task, rules = draw_task(0), NegativeRules(num_negatives=3)
    lines, _ = mine(encoder, task, tmp_path / "texts.jsonl", rules)
    examples = list(load_training_data(tmp_path / "texts.jsonl", streaming=True))
    names = ("query", "document", "negatives")
    assert examples == [{name: line[name] for name in names} for line in lines]
    write_task(task, tmp_path)
    mine(encoder, task, tmp_path / "ids.jsonl", rules, has_texts=False)
    files = {"queries": tmp_path / "queries.tsv", "corpus": tmp_path / "corpus.tsv"}
    assert list(load_training_data(tmp_path / "ids.jsonl", streaming=True, **files)) == examples


def test_random_negatives_depend_on_the_seed_alone(encoder, tmp_path):
    task = draw_task(0)

    def negatives(name, seed, **options):
        rules = NegativeRules(num_negatives=3, sampling="random", seed=seed)
        lines, _ = mine(encoder, task, tmp_path / name, rules, **options)
        return [line["negative_ids"] for line in lines]

    first = negatives("a", 0)
    assert negatives("b", 0, chunk_size=100) == first
    assert negatives("c", 1) != first
    every, _ = plain_mine(encoder, task, NegativeRules(num_negatives=100, min_negatives=1))
    allowed = [kept for _, _, kept in every if len(kept) >= 3]
    for chosen, kept in zip(first, allowed, strict=True):  # in the order of their ranks
        assert chosen == [doc_id for doc_id in kept if doc_id in chosen]
        assert len(chosen) == 3
    assert any(chosen != kept[:3] for chosen, kept in zip(first, allowed, strict=True))


def test_an_index_serves_as_well_as_the_corpus(encoder, tmp_path):
    task = draw_task(0)
    write_task(task, tmp_path)
    mine(encoder, task, tmp_path / "a.jsonl", k=3)
    sf.encode_corpus(
        encoder, tmp_path / "corpus.tsv", tmp_path / "index", model="m", k=3, show_progress=False
    )
    mine(encoder, task, tmp_path / "b.jsonl", index=tmp_path / "index")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    other = MiningTask(task.queries, Texts(task.corpus.ids[1:], task.corpus.texts[1:]), task.qrels)
    with pytest.raises(DataError, match="index must hold the documents of the corpus, got 'd"):
        mine(encoder, other, tmp_path / "c.jsonl", index=tmp_path / "index")
    assert not (tmp_path / "c.jsonl").exists()


def test_a_resumed_run_writes_the_same_bytes(encoder, tmp_path):
    task = draw_task(0)
    _, report = mine(encoder, task, tmp_path / "whole.jsonl")
    path, work = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    with pytest.raises(OSError, match="disk full"):
        mine(WeightedWords(fail_at=1), task, path)
    assert sorted(file.name for file in work.iterdir()) == ["0.jsonl", "index", "settings.json"]
    assert not path.exists()
    with pytest.raises(DataError, match="resume must go on with the num_negatives of the chunks"):
        mine(encoder, task, path, NegativeRules(num_negatives=7), resume=True)
    resumed = WeightedWords()
    _, same = mine(resumed, task, path, resume=True)
    assert resumed.calls == 1  # of two chunks
    assert same == report
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not work.exists()
    with pytest.raises(FileExistsError, match="must not exist yet"):
        mine(encoder, task, path)


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
    class NoEncoder(WeightedWords):
        def encode_batches(self, *arguments):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        mine(NoEncoder(), draw_task(0), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_pairs_make_queries_documents_and_judgements(encoder, tmp_path):
    lines = ["fox\ta quick fox\n", "fox\tbrown fox\n", "dog\ta quick fox\n", "dog\tthe dog\n"]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    alone = MiningTask.from_pairs(tmp_path / "pairs.tsv")
    assert alone.queries == Texts(["q0", "q1"], ["fox", "dog"])
    assert alone.corpus == Texts(["d0", "d1", "d2"], ["a quick fox", "brown fox", "the dog"])
    assert alone.qrels == {"q0": {"d0": 1, "d1": 1}, "q1": {"d0": 1, "d2": 1}}
    corpus = Texts(["d2", "x"], ["brown fox", "lazy dog"])
    task = MiningTask.from_pairs(tmp_path / "pairs.tsv", corpus)
    assert task.corpus.ids == ["d2", "x", "d3", "d4"]
    assert task.corpus.texts == ["brown fox", "lazy dog", "a quick fox", "the dog"]
    assert task.qrels == {"q0": {"d3": 1, "d2": 1}, "q1": {"d3": 1, "d4": 1}}
    (tmp_path / "labels.tsv").write_text("fox\ta quick fox\t1.0\n")
    with pytest.raises(DataError, match="pairs must hold a query and a document each, got query"):
        MiningTask.from_pairs(tmp_path / "labels.tsv")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"last_rank": 5, "first_rank": 6}, "last_rank must be at least 6, got 5"),
        ({"last_rank": 5, "num_negatives": 6}, "must be at most the 5 ranks .* got 6"),
        ({"min_negatives": 9}, "min_negatives must be at most num_negatives, 8, got 9"),
        ({"sampling": "best"}, "sampling must be 'top' or 'random', got 'best'"),
        ({"relative_margin": 1.0}, "relative_margin must be at least 0 and below 1, got 1.0"),
        ({"absolute_margin": -1.0}, "absolute_margin must be finite and at least 0, got -1.0"),
        ({"max_score": float("nan")}, "max_score must be finite, got nan"),
        ({"min_relevance": 0}, "min_relevance must be at least 1, got 0"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        NegativeRules(**rules)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("side", ["queries", "documents"])
def test_learned_weights_may_be_negative(tmp_path, side):
    """Such weights have no bound, so all documents are read."""
    encoders = {"queries": WeightedWords(), "documents": WeightedWords()}
    with torch.no_grad():
        encoders[side].weight[5:12:2] *= -1
    task = draw_task(0)
    queries, documents = encoders.values()
    lines, _ = mine(documents, task, tmp_path / "mined.jsonl", query_encoder=queries)
    vectors = documents.encode(task.corpus.texts, show_progress=False).to_dense()
    assert lines
    for line in lines:
        query = queries.encode(line["query"], show_progress=False).to_dense()
        scores = dict(zip(task.corpus.ids, (query @ vectors.T)[0].tolist(), strict=True))
        found = [scores[doc_id] for doc_id in line["negative_ids"]]
        assert found == sorted(found, reverse=True)
        assert found[-1] > 0


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke(tmp_path / "out.jsonl", "--pairs", "pairs.tsv")
    assert result.exit_code == 2
    assert "mine must run in one process, got 2 of torchrun" in result.stderr


def test_judgements_without_a_positive_are_refused(encoder, tmp_path):
    task = MiningTask(Texts(["q"], ["fox"]), Texts(["d"], ["fox"]), {"q": {"d": 0}})
    with pytest.raises(DataError, match="a document of the corpus with a relevance of 1 or more"):
        mine(encoder, task, tmp_path / "out.jsonl")


def invoke(*arguments):
    return CliRunner().invoke(app, ["mine", *map(str, arguments)])


def test_the_command_mines_and_reports(tmp_path, bert):
    task = draw_task(2)
    files = write_task(task, tmp_path)
    options = ["--num-negatives", 2, "--relative-margin", 0.1, "--sampling", "random"]
    out = tmp_path / "mined.jsonl"
    result = invoke(out, *files, "--model", bert, *options, "--seed", 3)
    assert result.exit_code == 0, result.output
    rules = NegativeRules(num_negatives=2, relative_margin=0.1, sampling="random", seed=3)
    encoder = sf.SpladeEncoder.from_pretrained(bert)
    _, report = mine(encoder, task, tmp_path / "expected.jsonl", rules)
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert result.stdout.splitlines() == list(report.lines())
    assert f"pairs\t{report.pairs}" in result.stdout
    assert "dropped by relevant\t" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --queries, --corpus and --qrels together, or --pairs"),
        (["--pairs", "p.tsv", "--qrels", "q"], "give either --pairs or --queries and --qrels"),
        (["--index", "i", "--k", 3], "give --k and --max-length without --index"),
        (["--pairs", "PAIRS"], "give --model, or an --index that knows its own"),
    ],
)
def test_contradictions_exit_with_2(tmp_path, arguments, message):
    (tmp_path / "pairs.tsv").write_text("fox\ta quick fox\n")
    arguments = [tmp_path / "pairs.tsv" if part == "PAIRS" else part for part in arguments]
    result = invoke(tmp_path / "out.jsonl", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
