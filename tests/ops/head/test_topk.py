"""head_topk equals the pruned rows of head."""

import pytest
import torch

import splade_fast as sf
from splade_fast.ops.head import topk
from tests.ops.inputs import ACTIVATIONS, DTYPES, attention_mask
from tests.selection import pairwise


@pytest.fixture(params=[1, 3, 1000])
def rows_per_block(request, monkeypatch):
    """Set the block size to 1, 3 or all sequences, for float32 rows of 70 entries."""
    monkeypatch.setattr(topk, "_BLOCK_BYTES", request.param * 70 * 4)


def random_head(*shape: int, dtype=torch.float32):
    hidden = torch.randn(*shape, 6, dtype=dtype)
    return hidden, torch.randn(70, 6, dtype=dtype), torch.randn(70, dtype=dtype)


@pairwise(dtype=DTYPES, activation=ACTIVATIONS, k=[None, 1, 8, 70, 1000])
@pytest.mark.usefixtures("rows_per_block")
def test_equal_to_pruning_the_dense_rows(dtype, activation, k):
    head = random_head(7, 20, dtype=dtype)
    mask = attention_mask("right", 7, 20)
    expected = sf.SparseRows.from_dense(sf.splade_head(*head, mask, activation=activation), k)
    assert sf.splade_head_topk(*head, mask, k=k, activation=activation).equal(expected)


@pytest.mark.parametrize("lengths", [[5, 0, 9, 1], [0], []])
@pytest.mark.usefixtures("rows_per_block")
def test_packed(lengths):
    head = random_head(sum(lengths))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    expected = sf.SparseRows.from_dense(sf.splade_head(*head, cu_seqlens=cu_seqlens), 8)
    assert sf.splade_head_topk(*head, cu_seqlens=cu_seqlens, k=8).equal(expected)


@pytest.mark.usefixtures("rows_per_block")
def test_sum_pooling():
    head = random_head(7, 20)
    expected = sf.splade_head(*head, pooling="sum")
    actual = sf.splade_head_topk(*head, k=None, pooling="sum").to_dense()
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("rows_per_block")
def test_autocast_of_half_precision_hidden_states():
    """A transformer under autocast returns half precision for a decoder in float32."""
    hidden, weight, bias = random_head(7, 20)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sf.SparseRows.from_dense(sf.splade_head(hidden.bfloat16(), weight, bias), 8)
        actual = sf.splade_head_topk(hidden.bfloat16(), weight, bias, k=8)
    assert actual.equal(expected)


def test_it_is_for_inference():
    hidden, weight, bias = random_head(2, 3)
    rows = sf.splade_head_topk(hidden.requires_grad_(), weight, bias, k=4)
    assert not rows.values.requires_grad


def test_bad_arguments(monkeypatch):
    hidden, weight, bias = random_head(4, 5)
    with pytest.raises(ValueError, match=r"attention_mask must be .* = \(4, 5\), got \(9, 5\)"):
        sf.splade_head_topk(hidden, weight, bias, torch.ones(9, 5), k=4)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        sf.splade_head_topk(hidden, weight, bias, k=-1)
    with pytest.raises(ValueError, match="pooling must be one of"):
        sf.splade_head_topk(hidden, weight, bias, k=4, pooling="min")
    # A bad k is refused before the head is computed.
    monkeypatch.setattr("splade_fast.ops.head.topk.splade_head", None)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        sf.splade_head_topk(hidden, weight, bias, k=2.5)
