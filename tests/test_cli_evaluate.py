"""`splade-fast evaluate` with data sets, other measures, values per query and comparisons."""

import math

import pytest
from typer.testing import CliRunner

import splade_fast as sf
from splade_fast.cli import app
from splade_fast.search.significance import compare_runs, read_per_query
from splade_fast.training import MeanEvaluator, RetrievalEvaluator
from tests.recipe.corpora import WeightedWords
from tests.search.beir import write_beir
from tests.tiny_models import masked_lm_configs, save_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders: a SPLADE model alone, and with an encoder of queries."""
    folder = tmp_path_factory.mktemp("models")
    encoder = sf.SpladeEncoder.from_pretrained(
        save_checkpoint(masked_lm_configs()["bert"], folder / "bert")
    )
    encoder.save_pretrained(folder / "words")
    WeightedWords().save_pretrained(folder / "words" / "query")
    return folder / "bert", folder / "words"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    first = write_beir(folder / "first")
    second = write_beir(folder / "second", qrels={"q1": {"d2": 1}, "q2": {"d3": 1}})
    return first, second


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def evaluated(*arguments):
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    return [line.split("\t") for line in result.stdout.splitlines()]


def expected_metrics(model, source, measures):
    evaluator = RetrievalEvaluator.from_data(source, measures=measures)
    queries = WeightedWords() if model.name == "words" else None
    return evaluator(sf.SpladeEncoder.from_pretrained(model), queries)


@pytest.mark.parametrize("number", [0, 1])
def test_one_set(models, sets, number):
    lines = evaluated("--data", sets[0], "--model", models[number], "--measures", "AP P@1")
    expected = expected_metrics(models[number], sets[0], ["AP", "P@1"])
    assert lines == [[name, f"{expected[name]:.4f}"] for name in ("AP", "P@1")]


def test_several_sets_and_their_mean(models, sets):
    lines = evaluated("--data", sets[0], "--data", sets[1], "--model", models[0])
    names = ["MRR@10", "nDCG@10", "Recall@100"]
    values = [expected_metrics(models[0], source, names) for source in sets]
    assert values[0]["MRR@10"] != values[1]["MRR@10"]
    assert lines[0] == ["data", *names]
    assert lines[1] == ["first", *(f"{values[0][name]:.4f}" for name in names)]
    assert lines[2] == ["second", *(f"{values[1][name]:.4f}" for name in names)]
    assert lines[3] == ["mean", *(f"{(values[0][n] + values[1][n]) / 2:.4f}" for n in names)]


def test_the_evaluator_of_several_sets(models, sets):
    evaluators = {source.name: RetrievalEvaluator.from_data(source) for source in sets}
    encoder = sf.SpladeEncoder.from_pretrained(models[0])
    metrics = MeanEvaluator(evaluators)(encoder, prefix="eval_")
    by_set = {name: evaluator(encoder) for name, evaluator in evaluators.items()}
    expected = {f"eval_{s}/{name}": v for s, found in by_set.items() for name, v in found.items()}
    for name in by_set["first"]:
        expected[f"eval_{name}"] = (by_set["first"][name] + by_set["second"][name]) / 2
    assert metrics == pytest.approx(expected)
    with pytest.raises(ValueError, match="evaluators must hold at least one evaluator, got none"):
        MeanEvaluator({})


def test_values_per_query_and_comparisons(models, sets, tmp_path):
    files = [tmp_path / "bert.tsv", tmp_path / "words.tsv"]
    sources = ["--data", sets[0], "--data", sets[1]]
    lines = evaluated(*sources, "--model", models[0], "--per-query", files[0])
    values = read_per_query(files[0])
    mean = sum(values["first"]["MRR@10"].values()) / 2
    assert list(values["first"]["MRR@10"]) == ["q1", "q2"]
    assert lines[1][:2] == ["first", f"{mean:.4f}"]
    options = ["--model", models[1], "--per-query", files[1], "--compare", files[0]]
    lines = evaluated(*sources, *options, "--test", "permutation")[4:]
    others = read_per_query(files[1])
    header, *rows = lines
    assert header == ["data", "measure", "queries", "mean", "other mean", "difference", "p"]
    expected = [
        [
            *(name, found.measure, "2", f"{found.mean:.4f}", f"{found.other_mean:.4f}"),
            *(f"{found.difference:+.4f}", f"{found.p_value:.4g}"),
        ]
        for name in ("first", "second")
        for found in compare_runs(others[name], values[name], test="permutation")
    ]
    assert rows == expected
    assert any(float(row[5]) != 0 for row in rows)
    without_models = evaluated(
        "--compare", files[1], "--compare", files[0], "--test", "permutation"
    )
    assert without_models == lines


def test_files_have_values_per_query_too(models, sets, tmp_path):
    folder = sets[0]
    files = ["--queries", folder / "queries.jsonl", "--qrels", folder / "qrels" / "test.tsv"]
    options = ["--corpus", folder / "corpus.jsonl", "--model", models[0], "--measures", "nDCG@3"]
    [[name, value]] = evaluated(*files, *options, "--per-query", tmp_path / "values.tsv")
    values = read_per_query(tmp_path / "values.tsv")["test"]["nDCG@3"]
    assert (name, value) == ("nDCG@3", f"{math.fsum(values.values()) / 2:.4f}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --queries and --qrels, or --data"),
        (["--data", "SET"], "give --model with --data"),
        (["--data", "SET", "--qrels", "q"], "without the options of other sources"),
        (["--compare", "a", "--compare", "b", "--model", "m"], "without the options of other"),
        (["--compare", "a", "--compare", "b", "--compare", "c"], "once or twice, got 3 files"),
        (["--data", "SET", "--model", "MODEL", "--measures", "foo"], "measures must be names of"),
        (["--data", "SET", "--model", "MODEL", "--compare", "OTHER"], "must have data in common"),
    ],
)
def test_bad_options_exit_with_2(models, sets, tmp_path, arguments, message):
    other = tmp_path / "other.tsv"
    other.write_text("data\tquery_id\tmeasure\tvalue\nelse\tq1\tMRR@10\t1.0\n")
    places = {"SET": sets[0], "MODEL": models[0], "OTHER": other}
    result = evaluate(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
