"""Cases: the number of a case determines its inputs, order of threads and size of the GPU."""

import os
from random import Random

import torch

from tests.emulation.library import Emulator

FIRST = int(os.environ.get("EMULATION_FIRST_CASE", "0"))
CASES = int(os.environ.get("EMULATION_CASES", "8"))


def begin(emulator: Emulator, case: int) -> Random:
    """Return what draws the inputs of a case."""
    draw = Random(case)
    torch.manual_seed(case)
    emulator.configure(case, draw.choice([1, 2, 132]), draw.choice([1, 2, 3]))
    return draw
