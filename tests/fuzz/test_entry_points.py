"""The C++ entry points raise an error for invalid arguments or return a result; they never crash.

Under `make sanitize` any access outside of a tensor ends the process.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.calls import CALLS
from tests.fuzz.inputs import DrawsOfHypothesis
from tests.fuzz.refusals import call_with_arguments_that_do_not_fit


@pytest.mark.parametrize("name", CALLS)
@given(st.data())
def test_arguments_that_do_not_fit_are_refused(name: str, data: st.DataObject) -> None:
    call_with_arguments_that_do_not_fit(name, DrawsOfHypothesis(data))
