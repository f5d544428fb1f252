"""The inputs that the coverage-guided fuzzer has found, without it."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import SEEDS, TARGETS

INPUTS = sorted(SEEDS.glob("*/*"))


def test_every_target_has_inputs():
    assert {path.parent.name for path in INPUTS} == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs(target):
    for path in INPUTS:
        if path.parent.name == target:
            try:
                TARGETS[target](path.read_bytes())
            except Exception as error:
                error.add_note(f"the input: {path}")
                raise
