"""The driver runs every case, writes rows of one schema, and refuses to time a wrong result."""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, studies
from benchmarks.__main__ import main
from benchmarks.cases.pool import PoolCase
from benchmarks.cases.score import ScoreCase
from benchmarks.harness.checks import check, relative_error
from benchmarks.harness.extra_memory import peak_extra_here
from benchmarks.harness.machine import Machine
from benchmarks.harness.report import write_report
from benchmarks.harness.results import (
    RESULTS,
    Measurement,
    Row,
    read_csv,
    to_rows,
    update_csv,
    write_csv,
)
from benchmarks.harness.run_case import Options, run_case
from benchmarks.harness.timing import QUICK
from examples.docstrings.checkpoint import CheckpointError

THREADS = ["--threads", str(torch.get_num_threads())]
POOL = PoolCase(
    direction="forward+backward",
    dtype=torch.float32,
    device="cpu",
    batch=3,
    length=8,
    vocab=64,
)
OTHERS = {
    "score": {"torch sparse"},
    "head_trained": {"dense"},
    "gather": {"plain rows"},
}
WITH_BACKWARD = ("pool", "head", "head_trained", "prune")
MEASUREMENT = Measurement(study="pool", subject="B8", quantity="time", value=2.0, unit="ms")
MACHINE = Machine("2026-01-01", "abc", "no", "2.13", "a CPU", 2, 2, "", "avx2")


def row(**changes: object) -> Row:
    (found,) = to_rows([dataclasses.replace(MEASUREMENT, **changes)], MACHINE)
    return found


# Cases -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", cases.names())
def test_a_case_writes_its_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Here instead of in processes of their own, which take longer to start.
    monkeypatch.setattr(
        "benchmarks.harness.run_case.peak_extra_bytes",
        lambda case, contender, implementation, workload: peak_extra_here(
            case, contender, workload
        ),
    )
    arguments = [name, "--quick", "--skip", "compile", "peer", "--out", str(tmp_path)]
    assert main([*arguments, *THREADS]) == 0
    path = tmp_path / f"{name}-cpu-quick.csv"
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == [field.name for field in dataclasses.fields(Row)]
    rows = read_csv(path)
    times = [row for row in rows if row.quantity == "time"]
    assert {row.contender for row in times} == {"ours", "eager", "floor"} | OTHERS.get(name, set())
    assert all(row.value > 0 and row.p25 <= row.value <= row.p75 for row in times)
    assert all(row.rounds == 3 and row.torch for row in times)
    backward = {"forward+backward"} if name in WITH_BACKWARD else set()
    assert {row.part for row in rows} == {"forward"} | backward
    peaks = [row for row in rows if row.quantity == "extra memory"]
    assert len(peaks) == len([row for row in times if row.contender in ("ours", "eager")])
    errors = [row for row in rows if row.quantity == "relative error"]
    assert len(errors) == len([row for row in times if row.contender == "ours"])
    assert all(row.is_within_bounds for row in errors)
    only_the_peer = name in ("prune", "encode")  # their bounds are against the peer alone
    assert any(row.quantity.startswith("times") and row.verdict for row in rows) != only_the_peer


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_measured_in_processes_of_their_own() -> None:
    found = run_case(POOL, Options(QUICK, contenders=("ours", "eager")))
    peaks = {m.contender: m.value for m in found if m.quantity == "extra memory"}
    assert peaks.keys() == {"ours", "eager"}
    assert all(peak >= 0 for peak in peaks.values())


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nosuchop"], ["study", "nosuchop"], ["study", "scale", "nosuchop"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "nosuchop" in capsys.readouterr().err


def test_an_instruction_set_holds_for_all_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        started.append((command, environment))
        raise SystemExit

    monkeypatch.setattr("os.execve", execve)
    with pytest.raises(SystemExit):
        main(["score", "--isa", "avx2", "--quick"])
    [(command, environment)] = started
    assert command[1:] == ["-m", "benchmarks", "score", "--isa", "avx2", "--quick"]
    names = ("SPLADE_FAST_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    assert {environment[name].lower() for name in names} == {"avx2"}


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return PoolCase.eager(logits, attention_mask) * 1.01

    monkeypatch.setattr(PoolCase, "ours", staticmethod(wrong))
    (error,) = run_case(POOL, Options(QUICK))
    assert (error.contender, error.quantity) == ("ours", "relative error")
    assert not error.is_within_bounds


def test_nan_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        pooled = PoolCase.eager(logits, attention_mask).clone()
        pooled[0, 0] = torch.nan
        return pooled

    monkeypatch.setattr(PoolCase, "ours", staticmethod(poisoned))
    assert not check(POOL, POOL.build()).is_correct
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1).double()) == float("inf")


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_active_share_is_as_asked(share: float) -> None:
    case = dataclasses.replace(POOL, active=share, vocab=2000)
    assert check(case, case.build()).active == pytest.approx(share, abs=0.01)


def test_a_contender_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Case(PoolCase):
        def others(self):
            def missing():
                raise ImportError("No module named 'nowhere'")

            return {"nowhere": missing, "twice": lambda: PoolCase.eager}

        def detail(self, contender, workload):
            return f"{contender} says" if contender == "twice" else ""

    case = Case(**{field.name: getattr(POOL, field.name) for field in dataclasses.fields(POOL)})
    found = run_case(case, Options(QUICK, contenders=("ours",), has_memory=False))
    assert "without nowhere: ImportError: No module named 'nowhere'" in capsys.readouterr().out
    times = [(m.contender, m.note) for m in found if m.quantity == "time"]
    assert times[:2] == [("ours", ""), ("twice", "twice says")]


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
    assert main(["score", "--out", str(tmp_path), *THREADS]) == 1
    assert f"without {case.shape}: no network" in capsys.readouterr().out


# Results -----------------------------------------------------------------------------------------


def test_bounds_give_a_verdict() -> None:
    assert row(at_most=1.5).verdict == "<= 1.5: missed"
    assert row(at_most=2).verdict == "<= 2: met"
    assert row(at_least=8).verdict == ">= 8: missed"
    assert row(at_least=1, at_most=8).verdict == ">= 1, <= 8: met"
    assert row().verdict == ""


def test_rows_come_back_and_new_ones_replace_the_old(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    first = [row(axis="slots", size=float(size), value=size / 7) for size in (1, 1_048_576)]
    update_csv(first, path)
    update_csv([row(axis="slots", size=1.0, value=9.0, p25=8.5), row(dtype="bfloat16")], path)
    found = read_csv(path)
    assert [(r.size, r.value, r.p25, r.dtype) for r in found] == [
        (1, 9.0, 8.5, "float32"),
        (1_048_576, 149797, None, "float32"),
        (None, 2.0, None, "bfloat16"),
    ]
    write_csv(found, tmp_path / "again.csv")
    assert read_csv(tmp_path / "again.csv") == found


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_results_have_the_one_schema(path: Path) -> None:
    rows = read_csv(path)
    assert len({row.key for row in rows}) == len(rows) > 0
    assert path.stem.partition("-")[0] in [*cases.names(), *studies.names()]
    assert all(row.commit and row.date for row in rows)


def test_report_is_a_function_of_the_results(tmp_path: Path) -> None:
    results = tmp_path / "results"
    times = [row(contender="eager", value=250.0, note="fast"), row(axis="slots", size=5000.0)]
    bounds = [row(quantity="times the floor", unit="", value=1.27, at_most=1.3)]
    write_csv([row(), *times, *bounds], results / "pool-cpu.csv")
    curve = [
        row(study="scale", axis="documents", size=float(size), value=3.0 * size)
        for size in (10, 20, 40)
    ]
    write_csv(curve, results / "scale-cpu.csv")
    for name in ("one", "two"):
        assert main(["report", str(tmp_path / f"{name}.md"), "--results", str(results)]) == 0
    page = (tmp_path / "one.md").read_text()
    assert page.replace("(one/", "(two/") == (tmp_path / "two.md").read_text()
    for name in ("pool-cpu.svg", "scale-cpu.svg"):
        assert f"](one/{name})" in page
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| B8 | float32 |  | **2** | 250 (125 ×), fast |" in page
    assert "| B8 | float32 | slots 5,000 | **2** |  |" in page
    assert "bounds: 1 met, 0 missed" in page
    assert "| times the floor | 1.27 | <= 1.3: met |" in page
    assert "|  | B8 | ours | time | documents | 1.00 ± 0.00 | 3 |" in page
    assert "a CPU, 2 threads, kernels avx2, torch 2.13, commit abc, 2026-01-01." in page


def test_report_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no CSV in"):
        write_report(tmp_path, tmp_path / "page.md")


def save_floors(folder: Path, ratios: dict[str, float]) -> None:
    for subject, ratio in ratios.items():
        for contender, value in (("ours", ratio), ("floor", 1.0)):
            timed = row(subject=subject, contender=contender, value=9.0, p25=value)
            update_csv([timed], folder / "pool-cpu.csv")


def test_slower_ratios_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, newest = (tmp_path / name for name in ("old", "new", "newest"))
    save_floors(old, {"a": 2.0, "b": 1.0, "gone": 1.0})
    save_floors(new, {"a": 2.4, "b": 1.0})
    save_floors(newest, {"a": 2.6, "b": 1.0, "c": 3.0})
    assert main(["compare", str(old), str(new)]) == 0
    assert main(["compare", str(new), str(newest)]) == 0
    capsys.readouterr()
    assert main(["compare", str(old), str(newest)]) == 1
    out = capsys.readouterr().out
    flagged = [line for line in out.splitlines() if "SLOWER" in line]
    assert [line.partition("SLOWER")[2].split()[:2] for line in flagged] == [["pool-cpu", "a"]]
    assert main(["compare", str(old), str(newest), "--limit", "1.4"]) == 0
    with pytest.raises(FileNotFoundError, match="must have a case in common, got none"):
        main(["compare", str(old), str(tmp_path / "nothing")])
