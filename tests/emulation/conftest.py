"""The emulated GPU, and the cases of each test."""

from random import Random

import pytest

from tests.emulation.cases import CASES, FIRST, begin
from tests.emulation.library import Emulator


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", range(FIRST, FIRST + CASES))


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
def draw(emulator: Emulator, case: int) -> Random:
    return begin(emulator, case)
