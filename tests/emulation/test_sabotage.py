"""Check that the tests of this folder fail for kernels with one deliberate mistake each."""

from functools import partial

import pytest
import torch

from tests.emulation import (
    test_head,
    test_head_screened,
    test_pool,
    test_score,
    test_search,
)
from tests.emulation.cases import begin
from tests.emulation.library import SANITIZER
from tests.emulation.mistakes import MISTAKES

pytestmark = pytest.mark.skipif(
    bool(SANITIZER), reason="needs no sanitizer, which stops at mistakes"
)
FUSED = partial(test_head.test_fused_is_that_of_the_cpu, None)
TESTS = {
    "pool_without_barrier": test_pool.test_matches_reference,
    "score_without_barrier": test_score.test_is_that_of_the_cpu,
    "search_in_the_first_wave": partial(test_search.test_lists_that_fill_up, dtype=torch.float32),
    "head_without_wait": FUSED,
    "head_with_early_release": FUSED,
    "head_with_wrong_tile": FUSED,
    "head_without_whole_warps": FUSED,
    "screen_without_residual": test_head_screened.test_logits_around_zero,
    "screen_without_residual_of_entries": test_head_screened.test_logits_around_zero,
    "screen_without_last_token": test_head_screened.test_is_that_of_the_cpu,
    "screen_of_a_stale_weight": test_head_screened.test_weight_that_has_changed,
    "screen_without_fallback": test_head_screened.test_too_many_candidates,
}
# Cases in front of these do not find the mistake, and take half a second each.
FIRST_CASES = {"screen_without_residual": 36, "screen_without_residual_of_entries": 36}
CASES = 60


def is_found_by(test, emulator, case):
    try:
        test(emulator, begin(emulator, case))
    except AssertionError:
        return True
    except RuntimeError as error:
        if "emulated GPU:" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(monkeypatch, emulator, name):
    monkeypatch.setenv("SPLADE_FAST_HOPPER", "1")
    first = FIRST_CASES.get(name, 0)
    with emulator.mistake(name):
        assert any(is_found_by(TESTS[name], emulator, case) for case in range(first, first + CASES))
