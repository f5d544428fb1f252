"""Cases: the number of a case determines its inputs, order of threads and size of the GPU."""

import os
from random import Random

import pytest
import torch

from tests.emulation.library import Emulator
from tests.emulation.prepare import LIBRARY

FIRST = int(os.environ.get("EMULATION_FIRST_CASE", "0"))
CASES = int(os.environ.get("EMULATION_CASES", "8"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", range(FIRST, FIRST + CASES))


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """Load the library of EMULATION_LIBRARY, which test_sabotage.py sets, or the correct one."""
    return Emulator(os.environ.get("EMULATION_LIBRARY", LIBRARY))


@pytest.fixture
def draw(emulator: Emulator, case: int) -> Random:
    draw = Random(case)
    torch.manual_seed(case)
    emulator.configure(case, draw.choice([1, 2, 132]), draw.choice([1, 2, 3]))
    return draw
