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
    name = sys.argv[1]
    torch.set_num_threads(1)
    # The first is what libFuzzer starts again by a shell, to merge what it has found.
    again = f"{sys.executable} -m {__spec__.name} {name}"
    atheris.Setup([again, *sys.argv[2:]], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
