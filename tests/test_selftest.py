"""The self-test finds mistakes that are put into the ops on purpose."""

import json

import pytest
import torch
from typer.testing import CliRunner

from splade_fast import ops
from splade_fast.cli import app
from splade_fast.selftest import cases, compare, run_selftest


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Choose sizes and dtypes that take a moment."""
    sizes = {"_LENGTH": 8, "_DIM": 32, "_VOCABULARY": 300, "_DOCUMENTS": 100, "_SLOTS": 256}
    for name, size in sizes.items():
        monkeypatch.setattr(cases, name, size)
    monkeypatch.setattr(compare, "_RUNS", 1)


def wrong_lines(*options):
    result = CliRunner().invoke(app, ["selftest", *options])
    lines = result.stdout.splitlines()
    return result.exit_code, [line.split("  ")[0] for line in lines if "WRONG" in line]


def test_all_ops_are_right(tmp_path):
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["selftest", "--json", str(report)])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert written["is_passed"]
    assert written["build"]["cpu"]["loaded"]
    found = {(outcome["op"], outcome["dtype"]) for outcome in written["outcomes"]}
    assert len(found) == len(written["outcomes"]) == len(result.stdout.splitlines()) - 1
    assert {dtype for _, dtype in found} == {"float32", "float64", "bfloat16", "float16"}
    tested = " ".join(op for op, _ in found)
    public = [name for name in ops.__all__ if name not in ("NegativeSamples", "Philox")]
    assert all(name in tested for name in public)


def test_a_weight_that_is_slightly_off(monkeypatch):
    head = ops.splade_head
    monkeypatch.setattr(ops, "splade_head", lambda *x, **y: head(*x, **y) * (1 + 2e-6))
    status, wrong = wrong_lines()
    assert status == 1
    assert "splade_head max" in wrong
    assert all(line.startswith("splade_head") for line in wrong)


def test_a_draw_of_the_wrong_rank(monkeypatch):
    sample = ops.sample_negatives

    def second_best(*arguments, **options):
        found = sample(*arguments, **options)
        return found._replace(indices=found.indices.roll(1, dims=1))

    monkeypatch.setattr(ops, "sample_negatives", second_best)
    status, wrong = wrong_lines()
    assert status == 1
    assert {line.strip() for line in wrong} == {
        "sample_negatives",
        "sample_negatives top_k",
        "sample_negatives exact top_k",
    }


def test_errors_count_as_wrong(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops, "prune_topk", fail)
    outcomes = [outcome for outcome in run_selftest() if not outcome.is_passed]
    assert {outcome.op for outcome in outcomes} == {"prune_topk"}
    assert all("no kernel image" in outcome.line for outcome in outcomes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_errors_that_are_not_finite(value):
    exact = torch.ones(3)
    assert not compare._relative_error(torch.tensor([1, 1, value]), exact) <= 1
    assert compare._relative_error(exact, torch.ones(4)) == float("inf")


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["selftest", "--device", "cuda"])
    assert result.exit_code == 2
    assert "--device must be cpu where torch finds no GPU" in result.output
