"""Check that a source that does not match a replacement stops the build."""

import pytest

from tests.emulation.mistakes import Mistake
from tests.emulation.prepare import (
    PreparationError,
    Replacement,
    launches_as_calls,
    replaced,
    with_switch,
)


def test_every_replacement_has_to_match():
    replacement = Replacement("cuda/x.cu", "wait();", "", times=2)
    assert replaced("wait(); wait();", replacement) == " "
    with pytest.raises(PreparationError, match=r"cuda/x.cu: expected 2 of 'wait\(\);', found 1"):
        replaced("wait();", replacement)


def test_every_launch_has_to_match():
    assert (
        launches_as_calls("kernel<T, 4>\n    <<<grid, 128, 0, stream>>>(x);", "cuda/x.cu")
        == "emulation::Launch(grid, 128, 0, stream).of(kernel<T, 4>)(x);"
    )
    with pytest.raises(PreparationError, match="cuda/x.cu: 0 of 1 launches"):
        launches_as_calls("kernels[0]<<<grid, 128>>>(x);", "cuda/x.cu")


def test_mistake_is_an_expression():
    mistake = Mistake("cuda/x.cu", "wait(1)", behind="second(); ")
    assert (
        replaced("first(); wait(1); second(); wait(1);", with_switch("no_wait", mistake))
        == 'first(); wait(1); second(); (emulation::has_mistake("no_wait") ? void() : wait(1));'
    )
