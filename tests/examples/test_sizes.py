import pytest

from examples.docstrings.sizes import Sizes, choose_sizes


def test_a_fast_machine_does_everything():
    assert choose_sizes(documents_per_second=420, documents=16_659) == Sizes(16_659)


@pytest.mark.parametrize("rate", [1, 20, 100, 170, 299])
def test_a_slower_machine_does_less_of_everything(rate):
    sizes, full = choose_sizes(rate, documents=16_659), Sizes(16_659)
    assert sizes.documents <= max(1000, 45 * rate) < full.documents
    assert sizes.compared < full.compared
    assert sizes.steps < full.steps
    assert not sizes.should_find_largest_batch


def test_a_small_corpus_stays_whole():
    assert choose_sizes(documents_per_second=20, documents=300).documents == 300
