"""Transforms of torch.func: forward mode is refused, vmap computes what a loop computes."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp, vmap

import splade_fast as sf
from splade_fast import reference
from splade_fast.ops.prune import dense_rows

torch.manual_seed(0)
LOGITS = torch.randn(2, 3, 5, dtype=torch.float64)
WEIGHT = torch.randn(7, 5, dtype=torch.float64)
BIAS = torch.randn(7, dtype=torch.float64)
DENSE = torch.rand(2, 6, dtype=torch.float64)
ROWS = sf.SparseRows.from_dense(torch.rand(4, 6, dtype=torch.float64), k=3)


def sparse(values):
    return sf.SparseRows(ROWS.indices, values, ROWS.lengths, 6)


DIFFERENTIABLE = {
    "pool": (sf.splade_pool, LOGITS),
    "pool sum": (lambda x: sf.splade_pool(x, pooling="sum"), LOGITS),
    "head of hidden": (lambda x: sf.splade_head(x, WEIGHT), LOGITS),
    "head of weight": (lambda x: sf.splade_head(LOGITS, x, pooling="sum"), WEIGHT),
    "head of bias": (lambda x: sf.splade_head(LOGITS, WEIGHT, x), BIAS),
    "screened head": (lambda x: sf.splade_head(x, WEIGHT, algorithm="screened"), LOGITS),
    "packed head": (
        lambda x: sf.splade_head(x[0], WEIGHT, cu_seqlens=torch.tensor([0, 1, 3]).int()),
        LOGITS,
    ),
    "head_topk": (lambda x: sf.splade_head_topk(x, WEIGHT, k=2).values, LOGITS),
    "prune_topk": (lambda x: sf.prune_topk(x, 2), DENSE),
    "from_dense": (lambda x: sf.SparseRows.from_dense(x, threshold=0.5).values, DENSE),
    "to_dense": (lambda x: sparse(x).to_dense(), ROWS.values),
    "scores of queries": (lambda x: sf.sparse_scores(x, ROWS), DENSE),
    "scores of documents": (lambda x: sf.sparse_scores(DENSE, sparse(x)), ROWS.values),
    "scores of sparse queries": (lambda x: sf.sparse_scores(sparse(x), ROWS), ROWS.values),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name):
    """The ops would return a tangent of zero."""
    function, x = DIFFERENTIABLE[name]
    message = r"has no forward-mode derivative.* Use splade_fast\.reference"
    with pytest.raises(RuntimeError, match=message):
        jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=message):
        jacfwd(function)(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        torch.testing.assert_close(function(x), function(x), rtol=0, atol=0)  # no tangent, no error


def test_tables_with_tangents_are_refused():
    index = torch.tensor([1])
    with pytest.raises(ValueError, match=r"tables\['a'\] must not require a gradient"):
        jvp(lambda x: sf.gather_rows({"a": x}, index)["a"], (DENSE,), (torch.ones_like(DENSE),))
    rows = {"a": torch.zeros(1, 6, dtype=torch.float64)}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(DENSE, torch.ones_like(DENSE))
        with pytest.raises(ValueError, match="must not require a gradient"):
            sf.scatter_rows_({"a": dual}, index, rows)


def test_the_reference_has_tangents():
    """The advice of the message: forward mode agrees with reverse mode."""
    cases = [
        (reference.splade_pool, sf.splade_pool, LOGITS),
        (lambda x: reference.splade_head(x, WEIGHT), lambda x: sf.splade_head(x, WEIGHT), LOGITS),
        (lambda x: reference.prune_topk(x, 2), lambda x: sf.prune_topk(x, 2), DENSE),
        (
            lambda x: reference.dense_rows(ROWS.indices, x, ROWS.lengths, 6),
            lambda x: dense_rows(ROWS.indices, x, ROWS.lengths, 6),
            ROWS.values,
        ),
    ]
    for plain, ours, x in cases:
        tangent = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        ours(leaf).sum().backward()
        _, forward = jvp(plain, (x,), (tangent,))
        torch.testing.assert_close(forward.sum(), (leaf.grad * tangent).sum())


@pytest.mark.parametrize("name", ["pool", "head of hidden", "prune_topk", "scores of queries"])
def test_vmap_computes_what_a_loop_computes(name):
    function, x = DIFFERENTIABLE[name]
    stacked = torch.stack([x, -x, x + 1]).requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        mapped = vmap(function)(stacked)
    looped = torch.stack([function(part) for part in stacked])
    assert torch.equal(mapped, looped)
    grad = torch.randn_like(looped)
    results = [torch.autograd.grad(result, stacked, grad)[0] for result in (mapped, looped)]
    assert torch.equal(*results)
