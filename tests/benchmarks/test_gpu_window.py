"""The script for a machine with a GPU runs here as a rehearsal, so that it does not fail there."""

import os
import subprocess
import sys
from pathlib import Path

from tests.selection import ALL

ROOT = Path(__file__).parents[2]
STAGES = [
    *("twins", "first_calls", "selftest", "fused", "all", "table"),
    *("racecheck", "synccheck", "memcheck", "counters", "compiled"),
]
# Their commands differ by a word from those of other stages.
ALIKE = {"fused", "synccheck", "memcheck", "compiled"}


def test_rehearsal(tmp_path):
    """Every stage selects tests or measures something, without the packages that may be missing."""
    stages = [name for name in STAGES if os.environ.get(ALL) or name not in ALIKE]
    run = subprocess.run(
        ["bash", "benchmarks/gpu_window.sh", "run"],
        cwd=ROOT,
        env={
            **os.environ,
            "REHEARSAL": "1",
            "OUT": str(tmp_path),
            "PYTHON": sys.executable,
            "STAGES": " ".join(stages),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in summary] == stages, run.stdout + run.stderr
    assert all(": exit 0, " in line for line in summary), run.stdout
    assert run.returncode == 0
    assert (tmp_path / "record.tar.gz").stat().st_size > 0


def test_a_failed_stage_fails_the_script_and_leaves_the_others_their_turn(tmp_path):
    run = subprocess.run(
        ["bash", "benchmarks/gpu_window.sh", "run"],
        cwd=ROOT,
        env={
            **os.environ,
            "REHEARSAL": "1",
            "OUT": str(tmp_path),
            "PYTHON": "false",
            "STAGES": "first_calls counters",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    stages = [line.split(",")[0] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert stages == ["first_calls: exit 1", "counters: exit 1"]
