"""Check that the tests of this folder fail for kernels with one deliberate mistake each."""

import os
import subprocess
import sys

import pytest

from tests.emulation.library import ROOT, build
from tests.emulation.prepare import (
    SABOTAGES,
    PreparationError,
    Replacement,
    launches_as_calls,
    replaced,
)

FUSED = "test_head.py::test_fused_is_that_of_the_cpu"
TESTS = {
    "pool_without_barrier": "test_pool.py::test_matches_reference",
    "score_without_barrier": "test_score.py::test_is_that_of_the_cpu",
    "head_without_wait": FUSED,
    "head_with_early_release": FUSED,
    "head_with_wrong_tile": FUSED,
    "screen_without_residual": "test_head_screened.py::test_logits_around_zero",
    "screen_without_residual_of_entries": "test_head_screened.py::test_logits_around_zero",
    "screen_without_last_token": "test_head_screened.py::test_is_that_of_the_cpu",
    "screen_of_a_stale_weight": "test_head_screened.py::test_weight_that_has_changed",
    "screen_without_fallback": "test_head_screened.py::test_too_many_candidates",
}
# Cases in front of these do not find the mistake, and take half a second each.
FIRST_CASES = {"screen_without_residual": "36", "screen_without_residual_of_entries": "36"}


# Other mistakes in the same code.
EXHAUSTIVE = {
    "head_with_early_release",
    "head_with_wrong_tile",
    "screen_without_residual_of_entries",
    "screen_of_a_stale_weight",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in EXHAUSTIVE else [])
        for name in SABOTAGES
    ],
)
def test_sabotage_is_found(name):
    build()
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            f"tests/emulation/{TESTS[name]}",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "EMULATION_LIBRARY": name,
            "EMULATION_FIRST_CASE": FIRST_CASES.get(name, "0"),
            "EMULATION_CASES": "60",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    assert "1 failed" in result.stdout, result.stdout  # and no error outside of the test
    assert "AssertionError" in result.stdout or "emulated GPU:" in result.stdout, result.stdout


def test_every_replacement_has_to_match():
    replacement = Replacement("cuda/x.cu", "wait();", "", times=2)
    assert replaced("wait(); wait();", replacement) == " "
    with pytest.raises(PreparationError, match=r"cuda/x.cu: expected 2 of 'wait\(\);', found 1"):
        replaced("wait();", replacement)


def test_every_launch_has_to_match():
    assert (
        launches_as_calls("kernel<T, 4>\n    <<<grid, 128, 0, stream>>>(x);", "cuda/x.cu")
        == "emulation::Launch(grid, 128, 0, stream).of(kernel<T, 4>)(x);"
    )
    with pytest.raises(PreparationError, match="cuda/x.cu: 0 of 1 launches"):
        launches_as_calls("kernels[0]<<<grid, 128>>>(x);", "cuda/x.cu")
