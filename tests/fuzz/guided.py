"""Coverage-guided fuzzing: python -m tests.fuzz.guided TARGET [options and folders of libFuzzer]

`make fuzz` runs it on a library that says which of its branches an input takes.
"""

from __future__ import annotations

import sys

import atheris
import torch

with atheris.instrument_imports(include=["splade_fast"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
