"""Sizes beyond any memory, sizes that overflow 64 bits and negative sizes raise errors.

The tensors have no columns or are expanded from one element: nothing large is allocated.
"""

import pytest
import torch
from torch import Tensor

import splade_fast as sf

OPS = torch.ops.splade_fast
HUGE = 2**48  # elements, beyond any address space
ROOT = 2**33  # its square overflows 64 bits
LIMITS = (2**63 - 1, 2**62)


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


def none(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    assert 0 in shape
    return torch.empty(shape, dtype=dtype)


def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded rows without slots: indices, values, lengths."""
    return none(count, 0, dtype=torch.int32), none(count, 0), huge(count, dtype=torch.int32)


def small_index() -> list[Tensor]:
    return [
        torch.zeros(6, dtype=torch.int64),
        torch.zeros(5, dtype=torch.float64),
        none(0, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        *(none(*shape, dtype=torch.uint8) for shape in ((0, 32), (0,))),
        none(0),
        torch.arange(2, dtype=torch.int32),
    ]


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return huge(*shape, dtype=dtype)


STATE = torch.tensor([1, 0])
ONES = torch.ones(3, 2)
MAX, LOG1P = 0, 1
# num_samples, scale, inv_temp, top_k, exact, valid, exclude, slot_offset, query_offset
DRAW = (2, 1.0, 1.0, None, False, None, None, 0, 0)
SAVED = (ONES, ONES, torch.zeros(3, 2, dtype=torch.uint8))
NEEDED = (LOG1P, True, True, True)


def draw(**changed: object) -> tuple[object, ...]:
    names = ("num_samples", "scale", "inv_temp", "top_k", "exact", "valid", "exclude")
    given = dict(zip((*names, "slot_offset", "query_offset"), DRAW, strict=True))
    return tuple((given | changed).values())


REFUSED = {
    "pool_forward, result too large": lambda: OPS.pool_forward(
        huge(HUGE, 1, 2), None, MAX, LOG1P, True
    ),
    "pool_forward, result overflows": lambda: OPS.pool_forward(
        none(ROOT, 0, ROOT), None, MAX, LOG1P, True
    ),
    "pool_backward_max, length -1": lambda: OPS.pool_backward_max(*SAVED, -1, LOG1P),
    "pool_backward_max, length -2^63": lambda: OPS.pool_backward_max(*SAVED, -(2**63), LOG1P),
    "pool_backward_max, result overflows": lambda: OPS.pool_backward_max(
        ONES, ONES, SAVED[2].int(), 2**62, LOG1P
    ),
    "pool_backward_sum, result too large": lambda: OPS.pool_backward_sum(
        huge(HUGE, 2), huge(HUGE, 1, 2), None, LOG1P
    ),
    "head_forward_dense, result overflows": lambda: OPS.head_forward_dense(
        none(2**62, 1, 0), none(8, 0), None, None, None, MAX, LOG1P, True, False
    ),
    "head_forward_dense, hidden too large": lambda: OPS.head_forward_dense(
        huge(HUGE, 1, 2), ONES, None, None, None, MAX, LOG1P, True, False
    ),
    "head_forward_dense, weight too large": lambda: OPS.head_forward_dense(
        none(0, 4),
        huge(HUGE, 4),
        None,
        None,
        integers(3, dtype=torch.int32),
        MAX,
        LOG1P,
        *(True,) * 2,
    ),
    "head_prepare, result too large": lambda: OPS.head_prepare(none(2**62, 0), torch.zeros(0)),
    "head_prepare, weight too large": lambda: OPS.head_prepare(huge(HUGE, 4), torch.zeros(4)),
    "head_prepare, too many columns": lambda: OPS.head_prepare(huge(2, 2**60), huge(2**60)),
    "head_prepare_into, packed too large": lambda: OPS.head_prepare_into(
        *(torch.zeros(2, 4), torch.zeros(4), None, None, 0.0),
        *(huge(HUGE, 16, 48, dtype=torch.int32), huge(HUGE, 4, 48)),
    ),
    "head_forward_screened, result overflows": lambda: OPS.head_forward_screened(
        *(none(2**62, 1, 0), none(8, 0), None, None, None, MAX, LOG1P, False, False),
        *(torch.zeros(0), torch.zeros(0, dtype=torch.int8), torch.zeros(0), None, None, False),
    ),
    "head_backward_max, weight too large": lambda: OPS.head_backward_max(
        *(none(0, HUGE), none(0, HUGE), none(0, HUGE, dtype=torch.uint8)),
        *(none(0, 1, 4), huge(HUGE, 4), None, *NEEDED),
    ),
    "head_backward_sum, hidden too large": lambda: OPS.head_backward_sum(
        none(HUGE, 0), huge(HUGE, 1, 4), none(0, 4), None, None, None, *NEEDED
    ),
    "prune_rows, x too large": lambda: OPS.prune_rows(huge(HUGE, 2), 2, None, None, None),
    "prune_rows, too many rows": lambda: OPS.prune_rows(none(2**62, 0), 3, 0.0, None, None),
    "prune_rows, k -2^63": lambda: OPS.prune_rows(ONES, -(2**63), None, None, None),
    "dense_rows, result overflows": lambda: OPS.dense_rows(
        none(HUGE, 0), rows(HUGE)[0], rows(HUGE)[2], 2**31 - 2
    ),
    "dense_rows, num_cols 2^62": lambda: OPS.dense_rows(none(2, 0), rows(2)[0], rows(2)[2], 2**62),
    "dense_rows, num_cols -2^63": lambda: OPS.dense_rows(
        none(2, 0), rows(2)[0], rows(2)[2], -(2**63)
    ),
    "sparse_scores, result overflows": lambda: OPS.sparse_scores(*rows(ROOT), *rows(ROOT), 5),
    "sparse_scores, dense queries": lambda: OPS.sparse_scores(
        None, none(ROOT, 0), None, *rows(ROOT), 0
    ),
    "sparse_scores, num_cols 2^62": lambda: OPS.sparse_scores(*rows(2), *rows(2), 2**62),
    "sparse_scores_backward, grad too large": lambda: OPS.sparse_scores_backward(
        huge(HUGE, 3), *rows(HUGE), *rows(3), 5, True, True
    ),
    "sparse_search, too many documents": lambda: OPS.sparse_search(*rows(2), *rows(HUGE), 5, 9),
    "sparse_search, result too large": lambda: OPS.sparse_search(*rows(HUGE), *rows(3), 5, 3),
    "index_count, too many documents": lambda: OPS.index_count(
        *rows(HUGE), 5, integers(HUGE, dtype=torch.int32)
    ),
    "index_count, too many columns": lambda: OPS.index_count(
        *rows(2), 2**31 - 2, torch.arange(2, dtype=torch.int32)
    ),
    "index_fill, too many documents": lambda: OPS.index_fill(
        *rows(HUGE), 5, integers(HUGE, dtype=torch.int32), integers(6), small_index()
    ),
    "index_fill, columns too large": lambda: OPS.index_fill(
        *rows(2), 5, torch.arange(2, dtype=torch.int32), integers(HUGE), small_index()
    ),
    "index_check, columns too large": lambda: OPS.index_check([huge(HUGE), *small_index()[1:]]),
    "index_search, k -2^63": lambda: OPS.index_search(*rows(2), small_index(), -(2**63), 0.0, None),
    "index_search, result too large": lambda: OPS.index_search(
        *rows(HUGE), small_index(), 2, 0.0, None
    ),
    "index_search, tensors of no index": lambda: OPS.index_search(*rows(2), [ONES], 2, 0.0, None),
    "index_search, columns too large": lambda: OPS.index_search(
        *rows(2), [huge(HUGE), *small_index()[1:]], 2, 0.0, None
    ),
    "sparse_search, k -2^63": lambda: OPS.sparse_search(*rows(2), *rows(3), 5, -(2**63)),
    "gather_rows, indices too large": lambda: OPS.gather_rows([ONES], integers(HUGE)),
    "gather_rows, result overflows": lambda: OPS.gather_rows([huge(5, 2**60)], integers(8)),
    "scatter_rows_, rows too large": lambda: OPS.scatter_rows_(
        [ONES.clone()], integers(HUGE), [huge(HUGE, 2)], None
    ),
    "update_cache_, too many new rows": lambda: OPS.update_cache_(
        *([ONES.clone()], torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool)),
        *([huge(HUGE, 2)], None, [], None, None, True),
    ),
    "update_cache_, refreshed rows too large": lambda: OPS.update_cache_(
        *([ONES.clone()], torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool)),
        *([], None, [huge(HUGE, 2)], integers(HUGE), None, True),
    ),
    "sample_dense, num_samples 2^62": lambda: OPS.sample_dense(
        ONES, ONES, STATE, *draw(num_samples=2**62)
    ),
    "sample_dense, num_samples -2^63": lambda: OPS.sample_dense(
        ONES, ONES, STATE, *draw(num_samples=-(2**63))
    ),
    "sample_dense, top_k -2^63": lambda: OPS.sample_dense(
        ONES, ONES, STATE, *draw(top_k=-(2**63), exact=True)
    ),
    "sample_dense, too many queries": lambda: OPS.sample_dense(huge(HUGE, 2), ONES, STATE, *DRAW),
    "sample_dense, too many slots": lambda: OPS.sample_dense(
        none(3, 0), none(HUGE, 0), STATE, *DRAW
    ),
    "sample_dense, offsets": lambda: OPS.sample_dense(
        ONES, ONES, STATE, *draw(slot_offset=2**63 - 1, query_offset=2**63 - 1)
    ),
    "sample_dense, exclude too large": lambda: OPS.sample_dense(
        ONES, ONES, STATE, *draw(exclude=integers(3, HUGE))
    ),
    "sample_sparse, too many slots": lambda: OPS.sample_sparse(
        *rows(3), *rows(HUGE), 5, STATE, *DRAW
    ),
    "sample_scores, num_samples 2^62": lambda: OPS.sample_scores(
        ONES, STATE, 2**62, 1.0, None, 0, 0
    ),
    "sample_scores, too many queries": lambda: OPS.sample_scores(
        huge(HUGE, 2), STATE, 2, 1.0, None, 0, 0
    ),
}


@pytest.mark.parametrize("call", REFUSED)
def test_absurd_sizes_are_refused(call):
    """The error names the broken rule or the shape that cannot be allocated."""
    with pytest.raises((RuntimeError, ValueError, MemoryError)) as raised:
        REFUSED[call]()
    said = str(raised.value)
    assert "must" in said or "alloc" in said or "larger than" in said or "overflow" in said, said


def test_every_op_is_among_them():
    names = {
        name.removeprefix("splade_fast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("splade_fast::")
    }
    others = names - {call.partition(",")[0] for call in REFUSED}
    assert others == {"head_forward"}  # implemented in Python


@pytest.mark.parametrize("k", LIMITS)
def test_more_than_there_is_are_all(k):
    """A k larger than the number of entries is allowed."""
    x = torch.tensor([[0.5, 0.0, 2.0]])
    everything = sf.SparseRows.from_dense(x)
    assert sf.SparseRows.from_dense(x, k).equal(everything)
    assert sf.SparseRows.from_dense(x, k, max_ratio=0.0, mass=1.0).equal(everything)
    assert torch.equal(sf.prune_topk(x, k), x)
    hidden, weight = torch.eye(3)[None, :, :], torch.eye(3)
    head = sf.splade_head_topk(hidden, weight, k=k)
    assert head.equal(sf.splade_head_topk(hidden, weight, k=3))
    scores, ids = sf.sparse_search(x, everything, k)
    assert scores.shape == ids.shape == (1, 1)
    for method in ("grouped", "exact"):
        options = {"top_k": k, "top_k_method": method, "rng": sf.Philox(3)}
        drawn = sf.sample_negatives(ONES, ONES, **options)
        assert torch.equal(drawn.indices, sf.sample_negatives(ONES, ONES, rng=sf.Philox(3)).indices)
