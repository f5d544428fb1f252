"""pool on the emulated GPU, compared with the reference."""

import torch

from tests.emulation.inputs import assert_same, with_specials, with_strides, with_ties
from tests.ops.inputs import ACTIVATIONS, DTYPES, POOLINGS
from tests.ops.test_pool import compare


def drawn_logits(draw):
    shape = (
        draw.choice([1, 2, 3]),
        draw.choice([0, 1, 3, 17, 65, 300]),
        draw.choice([1, 2, 7, 30, 64, 101, 520]),
    )
    logits = with_ties(draw, torch.randn(shape)).to(draw.choice(DTYPES))
    share = draw.choice([None, 0.0, 0.3, 0.9])
    return logits, None if share is None else torch.rand(shape[:2]) < share


def test_matches_reference(emulator, draw):
    logits, mask = drawn_logits(draw)
    for pooling in POOLINGS:
        with emulator.in_place():
            compare(
                with_strides(draw, logits),
                mask,
                pooling=pooling,
                activation=draw.choice(ACTIVATIONS),
            )


def test_maximum_is_that_of_the_cpu(emulator, draw):
    """Check infinities, NaN and ties: the same maximum at the same position."""
    logits, mask = drawn_logits(draw)
    logits = with_strides(draw, with_specials(draw, logits))
    arguments = logits, mask, 0, draw.randrange(3), True
    _, maximum, argmax = emulator.ops.pool_forward(*arguments)
    _, expected, expected_argmax = torch.ops.splade_fast.pool_forward(*arguments)
    assert_same(maximum, expected)
    counted = expected != -torch.inf
    assert_same(argmax.where(counted, 0), expected_argmax.where(counted, 0))
