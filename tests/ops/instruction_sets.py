"""Tests and functions run with the kernels of lesser machines.

The instruction set is chosen once in a process, so each set has a process of its own.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import splade_fast as sf
from tests.new_process import call_in_new_process


def instruction_sets_here() -> list[str]:
    """Return the instruction sets of the build that this machine runs, its own one last."""
    info = sf.build_info()
    built = info["built"]["cpu_instruction_sets"].split()
    here = built[: built.index(info["cpu_instruction_set"]) + 1]
    # avxvnni is the only set that a machine with later ones may lack.
    if here[-1] != "avxvnni" and " avx_vnni " not in Path("/proc/cpuinfo").read_text():
        here = [name for name in here if name != "avxvnni"]
    return here


def call_with(isa: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments) of a process with the kernels of an instruction set."""
    return call_in_new_process(
        _checked, isa, function, arguments, environment={"SPLADE_FAST_ISA": isa}
    )


def assert_pass_with(isa: str, file: str, chosen: str) -> None:
    """Assert that tests pass with the kernels of an instruction set.

    Args:
        isa: name of the set.
        file: path of the tests.
        chosen: expression that selects some of them, as for `pytest -k`.
    """
    status, output = call_with(isa, _run_tests, file, chosen)
    assert status == pytest.ExitCode.OK, output


def _checked(isa: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    assert sf.build_info()["cpu_instruction_set"] == isa
    return function(*arguments)


def _run_tests(file: str, chosen: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", chosen])
    return int(status), output.getvalue()
