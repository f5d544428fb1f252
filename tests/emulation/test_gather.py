"""gather, scatter and the update of a cache on the emulated GPU, compared with the CPU by bytes."""

import pytest
import torch

from tests.emulation.inputs import assert_same

DTYPES = [
    *(torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float32, torch.float64),
]
SHAPES = [(), (1,), (3,), (16,), (33,), (4, 5), (0,)]


@pytest.fixture
def kinds(draw):
    """Row shape and dtype of each table."""
    count = draw.choice([1, 2, 3, 3, 49])
    return [(draw.choice(SHAPES), draw.choice(DTYPES)) for _ in range(count)]


@pytest.fixture
def count(draw, kinds):
    """Numbers of rows to copy; 49 tables take several launches, a block per row and table."""
    return draw.choice([1, 5, 40, 40 if len(kinds) > 3 else 1100])


def rows_of(kinds, count):
    return [
        torch.randint(0, 2 if dtype == torch.bool else 100, (count, *shape)).to(dtype)
        for shape, dtype in kinds
    ]


def with_wider_rows(draw, table):
    if table.dim() != 2 or draw.random() < 0.7:
        return table
    return table.new_empty(len(table), table.shape[1] + 1)[:, :-1].copy_(table)


def test_gather_and_scatter(emulator, draw, kinds, count):
    capacity, count = draw.choice([1, 7, 300]), draw.choice([0, count, count, count])
    tables = [with_wider_rows(draw, table) for table in rows_of(kinds, capacity)]
    indices, rows = torch.randint(0, capacity, (count,)), rows_of(kinds, count)
    cpu = torch.ops.splade_fast
    for found, expected in zip(
        emulator.ops.gather_rows(tables, indices), cpu.gather_rows(tables, indices), strict=True
    ):
        assert_same(found, expected)
    mask = draw.choice([None, torch.rand(count) < 0.5])
    if mask is not None:
        indices[~mask] = 10**9  # not looked at
    written, expected = ([table.clone() for table in tables] for _ in range(2))
    emulator.ops.scatter_rows_(written, indices, rows, mask)
    cpu.scatter_rows_(expected, indices, rows, mask)
    for found, table in zip(written, expected, strict=True):
        assert_same(found, table)


def test_index_out_of_range(emulator, draw, kinds, count):
    """Check that a bad index ends the launch before any table is written."""
    capacity = draw.choice([1, 7, 300])
    kinds[0] = (3,), kinds[0][1]  # a table with bytes to write
    tables, rows = rows_of(kinds, capacity), rows_of(kinds, count)
    indices = torch.randint(0, capacity, (count,))
    indices[draw.randrange(count)] = draw.choice([-1, capacity])
    written = [table.clone() for table in tables]
    with pytest.raises(RuntimeError, match="indices must be between 0 and the last row"):
        emulator.ops.scatter_rows_(written, indices, rows, None)
    for found, table in zip(written, tables, strict=True):
        assert_same(found, table)


@pytest.mark.parametrize("index", [-1, 5, 2**40, -(2**63)])
def test_index_out_of_range_is_refused_by_every_op(emulator, index):
    table, indices = torch.arange(10.0).view(5, 2), torch.tensor([0, index, 4])
    age, valid = torch.arange(5).int(), torch.ones(5).bool()
    kept = [tensor.clone() for tensor in (table, age, valid)]
    with pytest.raises(RuntimeError, match="indices must be between 0 and the last row"):
        emulator.ops.gather_rows([table], indices)
    with pytest.raises(RuntimeError, match="indices must be between 0 and the last row"):
        emulator.ops.update_cache_(
            [table], age, valid, [], None, [torch.ones(3, 2)], indices, None, True
        )
    for tensor, expected in zip((table, age, valid), kept, strict=True):
        assert_same(tensor, expected)


def test_update(emulator, draw):
    slots, vectors = draw.choice([1, 3, 40, 1500, 5000]), draw.choice([1, 3])

    def rows(count):
        return [*(torch.randn(count, 3) for _ in range(vectors)), torch.randint(10**6, (count,))]

    tables, valid = rows(slots), torch.rand(slots) < 0.5
    age = torch.randint(-1, draw.choice([1, 3, 100, 2**31 - 1]), (slots,)).int()
    added, refreshed = draw.choice([0, 1, 2, min(slots, 50), slots]), draw.choice([0, 1, 30])
    added = min(added, slots)
    new, new_mask = rows(added), draw.choice([None, torch.rand(added) < 0.5])
    if draw.random() < 0.3:
        new, new_mask = [], None
    fresh, fresh_slots = (
        rows(refreshed)[: draw.randint(0, vectors)],
        torch.randint(0, slots, (refreshed,)),
    )
    fresh_mask = draw.choice([None, torch.rand(refreshed) < 0.6])
    if draw.random() < 0.3:
        fresh, fresh_slots, fresh_mask = [], None, None
    use_lru = draw.random() < 0.5

    def updated(ops):
        state = [tensor.clone() for tensor in (*tables, age, valid)]
        ops.update_cache_(
            *(state[:-2], *state[-2:], new, new_mask, fresh, fresh_slots, fresh_mask, use_lru)
        )
        return state

    for found, expected in zip(updated(emulator.ops), updated(torch.ops.splade_fast), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("op", ["gather_rows", "scatter_rows_", "update_cache_"])
def test_pinned_tables_live_until_the_kernel_has_run(emulator, op):
    table, age, valid = torch.arange(6.0).view(3, 2), torch.zeros(3).int(), torch.ones(3).bool()
    storage = table.untyped_storage()

    def call(tables):
        if op == "gather_rows":
            emulator.ops.gather_rows(tables, torch.tensor([1]))
        elif op == "scatter_rows_":
            emulator.ops.scatter_rows_(tables, torch.tensor([1]), [torch.ones(1, 2)], None)
        else:
            emulator.ops.update_cache_(tables, age, valid, [], None, [], None, None, False)

    def references():
        return torch._C._storage_Use_Count(storage._cdata)

    before = references()
    try:
        emulator.pin(table, is_work_running=True)
        call([table])
        call([table])
        assert references() == before  # of the tensor, which has further references
        view = table.view(3, 2)
        emulator.pin(view, is_work_running=True)
        call([view])
        del view
        assert references() == before + 1
        other = torch.ones(3, 2)
        emulator.pin(other, is_work_running=False)
        call([other])
        assert references() == before
    finally:
        emulator.pin(None, is_work_running=False)
