"""Coverage-guided fuzzing: python -m tests.fuzz.guided TARGET [options and folders of libFuzzer]

`make fuzz` runs it on a library that is instrumented for coverage.
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
    # libFuzzer runs the first argument in a shell again to merge the inputs that it has found.
    again = f"{sys.executable} -m {__spec__.name} {name}"
    atheris.Setup([again, *sys.argv[2:]], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
