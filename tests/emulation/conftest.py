"""The emulated GPU, and the cases of each test."""

from collections.abc import Iterator
from random import Random

import pytest
import torch

from tests.emulation.cases import CASES, FIRST, begin
from tests.emulation.library import SANITIZER, Emulator
from tests.emulation.reports import Reports


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", range(FIRST, FIRST + CASES))


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
def draw(emulator: Emulator, case: int) -> Random:
    return begin(emulator, case)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """Fill each new tensor with NaN, or the largest integer, so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def reports() -> Reports:
    if SANITIZER != "thread":
        pytest.skip("needs ThreadSanitizer: make emulate-races")
    return Reports()


@pytest.fixture
def overlapping_outputs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Accept races: inputs are invalid, and say that two blocks own one output."""
    yield
    if SANITIZER == "thread":
        request.getfixturevalue("reports").take()


@pytest.fixture(autouse=True)
def _has_no_race(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where ThreadSanitizer reports a race that the test has not taken."""
    if SANITIZER != "thread":
        yield
        return
    reports = request.getfixturevalue("reports")
    yield
    report = reports.take()
    assert not report, report
