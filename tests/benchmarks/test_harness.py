"""The benchmark driver runs from end to end and refuses to time a wrong result."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import regression
from benchmarks.__main__ import main
from benchmarks.cases.pool import PoolCase
from benchmarks.cases.score import ScoreCase
from benchmarks.harness.checks import check, relative_error
from benchmarks.harness.driver import Options, run_case
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import Row, read_csv, write_csv
from benchmarks.inputs.encoded import resampled
from benchmarks.inputs.inputs import ragged_lengths
from benchmarks.regression import FLOORS
from benchmarks.report import write_report
from benchmarks.studies import cache_training
from benchmarks.studies.screening.facts import Fact
from examples.docstrings.checkpoint import CheckpointError
from examples.docstrings.corpus import Pair
from splade_fast import SparseRows
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

REPOSITORY = Path(__file__).parents[2]
POOL = PoolCase(
    direction="forward+backward",
    dtype=torch.float32,
    device="cpu",
    batch=3,
    length=8,
    vocab=64,
)


def run_driver(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_quick_run_writes_rows_and_report(tmp_path: Path) -> None:
    quick = ("--quick", "--repeats", "3", "--threads", "1", "--skip", "compile", "peer")
    ops = ("pool", "head", "head_trained", "prune", "score", "encode", "sample", "gather")
    ops += ("negative_cache",)
    run = run_driver(*ops, *quick, "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    for op in ops:
        path = tmp_path / f"{op}-cpu-quick.csv"
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        assert header == [field.name for field in dataclasses.fields(Row)]
        rows = read_csv(Row, path)
        others = {
            "score": {"torch sparse"},
            "head_trained": {"dense"},
            "gather": {"plain rows"},
        }
        expected = {"ours", "eager", "floor"} | others.get(op, set())
        assert {row.contender for row in rows} == expected
        backward = (
            {"forward+backward"} if op in ("pool", "head", "head_trained", "prune") else set()
        )
        assert {row.direction for row in rows} == {"forward"} | backward
        assert all(row.correct and row.median_ms and row.torch and row.rounds == 3 for row in rows)
        measured = [row for row in rows if row.contender in ("ours", "eager")]
        assert all(row.peak_extra_mib is not None for row in measured)
        skipped = op in ("prune", "score", "encode")  # targets against the peer alone, or none
        assert all(row.verdict or skipped for row in rows if row.contender == "ours")
    page = tmp_path / "page.md"
    report = run_driver("--report", str(page), "--out", str(tmp_path))
    assert report.returncode == 0, report.stderr
    for op in ops:
        assert f"## {op}-cpu-quick\n" in page.read_text()
        assert (tmp_path / "page" / f"{op}-cpu-quick.svg").exists()


def row(contender: str, **changes: object) -> Row:
    facts = {field.name: "" for field in dataclasses.fields(Row)}
    numbers = {
        "fill": 0.5,
        "active": 0.05,
        "error": 0.0,
        "tolerance": 1.0,
        "cores": 2,
        "threads": 2,
    }
    measured = dict.fromkeys(("p25_ms", "p75_ms", "share_of_floor", "peak_extra_mib"), 1.5)
    given = {"op": "pool", "contender": contender, "correct": True, "rounds": 3, "cores": 2}
    return Row(**{**facts, **numbers, **measured, **given, **changes})


def test_report_is_a_function_of_the_csvs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    ours = row("ours", median_ms=2.0, times_ours=1.0, verdict="<= 1.3 times the floor: 1.27 met")
    wrong = row("ours", shape="other", correct=False, median_ms=None, times_ours=None)
    write_csv(
        [ours, row("eager", median_ms=250.0, times_ours=125.0), wrong], Row, results / "a.csv"
    )
    (results / "b.csv").write_text("machine,size,ms\nthis,1,2.5\nthis,2,5|6\n")
    (results / "b-curve.svg").write_text("<svg/>")
    fact = {field.name: "" for field in dataclasses.fields(Fact)}
    numbers = {"dim": 128, "value": 12.5, "active": None, "at_most": 20.0, "at_least": None}
    study = {"study": "training", "unit": "%", "cores": 2, "threads": 2}
    write_csv([Fact(**{**fact, **numbers, **study})], Fact, results / "c.csv")
    (results / "c.svg").write_text("<svg/>")
    write_report(results, tmp_path / "one.md")
    write_report(results, tmp_path / "two.md")
    page = (tmp_path / "one.md").read_text()
    assert page.replace("(one/", "(two/") == (tmp_path / "two.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert plots == ["a.svg", "b-curve.svg", "c.svg"]
    for name in plots:
        assert f"](one/{name})" in page
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| **2** | 250 (125 ×) |" in page
    assert "| WRONG, not timed |  |" in page
    assert "targets: 1 met, 0 missed" in page
    assert "<summary>training, 1 values</summary>" in page
    assert "| 12.5 % | <= 20: met |" in page
    assert "machine this.\n\n| size | ms |\n| --- | --- |\n| 1 | 2.5 |\n| 2 | 5/6 |" in page


def test_report_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no CSV in"):
        write_report(tmp_path, tmp_path / "page.md")


def save_run(storage: Path, number: int, floors: dict[str, float]) -> None:
    runs = [{"name": name, "extra_info": {FLOORS: ratio}} for name, ratio in floors.items()]
    path = storage / "machine" / f"{number:04}_run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmarks": runs}))


def test_slower_ratios_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = ["--storage", str(tmp_path)]
    assert regression.main(storage) == 2
    save_run(tmp_path, 1, {"a": 2.0, "b": 1.0, "gone": 1.0})
    assert regression.main(storage) == 0
    save_run(tmp_path, 2, {"a": 2.4, "b": 1.0})
    assert regression.main(storage) == 0
    assert "gone: gone" in capsys.readouterr().out
    save_run(tmp_path, 3, {"a": 2.6, "b": 1.0, "c": 3.0})
    assert regression.main(storage) == 0  # against run 2
    capsys.readouterr()
    assert regression.main(["0001", *storage]) == 1
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines() if "SLOWER" in line] == ["a"]
    assert regression.main(["0001", *storage, "--limit", "1.4"]) == 0
    assert regression.main(["0007", *storage]) == 2


def test_unknown_case_is_refused() -> None:
    run = run_driver("nosuchop")
    assert run.returncode == 2
    assert "nosuchop" in run.stderr


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return PoolCase.eager(logits, attention_mask) * 1.01

    monkeypatch.setattr(PoolCase, "ours", staticmethod(wrong))
    rows = run_case(POOL, Options(rounds=3, seconds=0.0), Machine.current("cpu"))
    assert [(row.contender, row.correct, row.median_ms) for row in rows] == [("ours", False, None)]


def test_nan_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        pooled = PoolCase.eager(logits, attention_mask).clone()
        pooled[0, 0] = torch.nan
        return pooled

    monkeypatch.setattr(PoolCase, "ours", staticmethod(poisoned))
    assert not check(POOL, POOL.build()).correct
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1).double()) == float("inf")


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_active_share_is_as_asked(share: float) -> None:
    case = dataclasses.replace(POOL, active=share, vocab=2000)
    assert check(case, case.build()).active == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("fill", [0.44, 0.65, 1.0])
def test_ragged_lengths_keep_the_fill(fill: float) -> None:
    lengths = ragged_lengths(32, 128, fill)
    assert lengths.float().mean().item() / 128 == pytest.approx(fill, abs=0.01)
    assert lengths.min() >= 1
    assert lengths.max() <= 128


def test_a_contender_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Case(PoolCase):
        def others(self):
            def missing():
                raise ImportError("No module named 'nowhere'")

            return {"nowhere": missing, "twice": lambda: PoolCase.eager}

        def detail(self, contender, workload):
            return f"{contender} says" if contender == "twice" else ""

    case = Case(**{field.name: getattr(POOL, field.name) for field in dataclasses.fields(POOL)})
    options = Options(rounds=3, seconds=0.0, contenders=("ours",), memory=False)
    rows = run_case(case, options, Machine.current("cpu"))
    assert "without nowhere: ImportError: No module named 'nowhere'" in capsys.readouterr().out
    assert [(row.contender, row.detail) for row in rows[:2]] == [
        ("ours", ""),
        ("twice", "twice says"),
    ]


def test_a_case_that_cannot_be_built_is_named_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_checkpoint(k: int) -> None:
        raise CheckpointError("no network")

    monkeypatch.setattr("benchmarks.cases.score.encoded_sample", no_checkpoint)
    case = ScoreCase(
        direction="forward", dtype=torch.float32, device="cpu", queries=2, docs=9, encoded=True
    )
    monkeypatch.setattr("benchmarks.cases.load", lambda *arguments, **options: [case])
    arguments = ["score", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert f"without {case.shape}: no network" in capsys.readouterr().out


def test_drawn_documents_have_the_statistics_of_the_encoded() -> None:
    """Document frequencies nearly; and a document of 50 may lack some that no draw found."""
    dense = torch.zeros(4, 1000)
    dense[0, ::20] = 1.0
    dense[1, 5:500:25] = 2.0
    dense[2, 20:40] = 3.0
    encoded = SparseRows.from_dense(dense)
    drawn = resampled(encoded, 20_000, 1)
    drawn.check_contents()
    assert drawn.equal(resampled(encoded, 20_000, 1))
    assert not drawn.equal(resampled(encoded, 20_000, 2))
    lengths = drawn.lengths.bincount(minlength=51) / 20_000
    assert lengths[[0, 20]].tolist() == pytest.approx([0.25, 0.5], abs=0.02)
    assert lengths[45:].sum().item() == pytest.approx(0.25, abs=0.02)
    assert lengths[[*range(1, 20), *range(21, 45)]].sum() == 0
    assert set(drawn.values[drawn.indices == 5].tolist()) == {2.0}
    weights = drawn.values[drawn.indices == 20]  # of the first and the third document
    assert weights.mean().item() == pytest.approx(2.0, abs=0.1)
    counts = drawn.coordinates()[1].bincount(minlength=1000)
    assert counts[20].item() == pytest.approx(2 * counts[5].item(), rel=0.2)
    assert (counts > 0).equal((dense > 0).any(0))


def test_the_cache_share_of_a_training_step(tmp_path, monkeypatch):
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    pairs = [Pair(f"{i}", " ".join(WORDS[i : i + 3]), " ".join(WORDS[i:])) for i in range(6)]
    monkeypatch.setattr(cache_training, "fetched", lambda checkpoint: folder)
    monkeypatch.setattr(cache_training, "docstring_pairs", lambda: pairs)
    sizes = ["--batch", "3", "--slots", "10", "--encoded", "4", "--steps", "2"]
    assert cache_training.main([*sizes, "--out", str(tmp_path)]) == 0
    facts = read_csv(Fact, tmp_path / "cache_training-cpu.csv")
    parts = {fact.variant: fact.value for fact in facts if fact.unit == "ms"}
    assert 0 < parts["update"] < parts["cache"] < parts["step"]
    shares = {fact.variant: fact.value for fact in facts if fact.unit == "%"}
    assert set(shares) == {"cache", "update", "drawn documents"}
    assert 0 < shares["update"] < shares["cache"] < 100
