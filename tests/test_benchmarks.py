"""The benchmark driver runs from end to end and refuses to time a wrong result."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases.pool import PoolCase
from benchmarks.checks import check, relative_error
from benchmarks.driver import Options, run_case
from benchmarks.inputs import ragged_lengths
from benchmarks.machine import Machine
from benchmarks.results import Row, read_csv

REPOSITORY = Path(__file__).parents[1]
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
    run = run_driver("pool", "head", "prune", "sample", *quick, "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    for op in ("pool", "head", "prune", "sample"):
        path = tmp_path / f"{op}-cpu-quick.csv"
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        assert header == [field.name for field in dataclasses.fields(Row)]
        rows = read_csv(path)
        assert {row.contender for row in rows} == {"ours", "eager", "floor"}
        directions = {"forward"} if op == "sample" else {"forward", "forward+backward"}
        assert {row.direction for row in rows} == directions
        assert all(row.correct and row.median_ms and row.torch and row.rounds == 3 for row in rows)
        measured = [row for row in rows if row.contender != "floor"]
        assert all(row.peak_extra_mib is not None for row in measured)
        skipped = op == "prune"  # its target is against the peer
        assert all(row.verdict or skipped for row in rows if row.contender == "ours")
    report = run_driver("--report", "--out", str(tmp_path))
    assert report.returncode == 0
    assert "head-cpu-quick.csv" in report.stdout


def test_unknown_case_is_refused() -> None:
    run = run_driver("nosuchop")
    assert run.returncode == 2
    assert "nosuchop" in run.stderr


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return PoolCase.eager(logits, attention_mask) * 1.01

    monkeypatch.setattr(PoolCase, "ours", staticmethod(wrong))
    rows = run_case(POOL, Options(rounds=3, seconds=1.0), Machine.current("cpu"))
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
