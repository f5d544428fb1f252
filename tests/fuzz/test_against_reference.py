"""Every op equals plain PyTorch on random inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.calls import CALLS
from tests.fuzz.inputs import DrawsOfHypothesis
from tests.fuzz.results import assert_same_as_plain_pytorch


@pytest.mark.parametrize("name", CALLS)
@given(st.data())
def test_same_as_plain_pytorch(name: str, data: st.DataObject) -> None:
    assert_same_as_plain_pytorch(name, DrawsOfHypothesis(data))
