"""gather equals plain PyTorch to the bit, and writes all tables or none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import splade_fast as sf
from splade_fast import reference
from splade_fast.ops.gather import update_cache_

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
# Bytes of a row: none, one, odd numbers, multiples of 2, 4, 8 and 16, more than threads of a block.
ROWS = [(), (0,), (1,), (3,), (5, 2), (7,), (16,), (30,), (129,), (3, 5, 7), (768,), (4099,)]


def table(count: int, row: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 100, (count, *row)).to(device, dtype)


def tables_of_all_kinds(count: int, device: torch.device) -> dict[str, Tensor]:
    dtypes = {f"{dtype}": table(count, (5,), dtype, device) for dtype in DTYPES}
    return dtypes | {f"{row}": table(count, row, torch.uint8, device) for row in ROWS}


def clones(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tables.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True)


def compare(tables, indices, rows, mask=None) -> None:
    """Assert that scattering and gathering equal the reference."""
    expected = clones(tables)
    reference.scatter_rows_(expected, indices, rows, mask)
    sf.scatter_rows_(tables, indices, rows, mask=mask)
    assert_same(tables, expected)
    if mask is None:
        assert_same(sf.gather_rows(tables, indices), reference.gather_rows(tables, indices))


@pytest.mark.parametrize("count", [1, 2, 70, 5000])
def test_every_dtype_and_width(device, count):
    """5000 writes share blocks on a GPU and repeat many indices."""
    tables = tables_of_all_kinds(700, device)
    indices = torch.randint(700, (count,), device=device)
    rows = {name: table(count, t.shape[1:], t.dtype, device) for name, t in tables.items()}
    compare(tables, indices, rows)
    compare(tables, indices.int(), rows, torch.rand(count, device=device) < 0.5)


def test_of_several_writes_to_a_row_the_last_stays(device):
    tables = {"a": torch.zeros(4, device=device), "b": torch.zeros(4, 3, device=device)}
    indices = torch.tensor([2, 1, 2, 2, 1, 0], device=device)
    values = torch.arange(1.0, 7.0, device=device)
    rows = {"a": values, "b": values[:, None].expand(-1, 3)}
    sf.scatter_rows_(tables, indices, rows)
    assert tables["a"].tolist() == [6, 5, 4, 0]
    assert torch.equal(tables["b"], tables["a"][:, None].expand(-1, 3))
    mask = torch.tensor([True, True, True, False, False, False], device=device)
    sf.scatter_rows_(tables, indices, rows, mask=mask)
    assert tables["a"].tolist() == [6, 2, 3, 0]


def test_threads_do_not_matter():
    tables = {"a": torch.zeros(50, 3000)}
    indices = torch.randint(50, (2000,))
    rows = {"a": torch.randn(2000, 3000)}
    expected = clones(tables)
    reference.scatter_rows_(expected, indices, rows)
    threads = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        sf.scatter_rows_(tables, indices, rows)
        assert_same(tables, expected)
        tables["a"].zero_()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_that_follow_each_other(threads):
    """Runs of indices, in contiguous and strided tables, cross the borders of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    slots, count = 3000, 1500
    wide = torch.randn(slots, 900)
    rising = torch.arange(count)
    for indices in (
        rising + 7,
        rising.flip(0) + 7,
        (rising + rising // 5).roll(40),
        torch.cat([rising[:700] + 100, rising[:700] + 400, rising[-100:]]),
    ):
        tables = {
            "whole": wide.clone(),
            "apart": wide.clone()[:, :70],
            "number": wide[:, 0].clone(),
        }
        rows = {name: table(count, t.shape[1:], t.dtype, t.device) for name, t in tables.items()}
        compare(tables, indices, rows)
        spread = {name: r.repeat_interleave(2, 0)[::2] for name, r in rows.items()}
        compare(tables, indices, spread, torch.rand(count) < 0.9)
    torch.set_num_threads(before)


def test_many_tables(device):
    """There are more tables than one launch takes."""
    tables = {f"{i}": table(9, (i % 5,), torch.int32, device) for i in range(150)}
    indices = torch.tensor([8, 0, 3, 8], device=device)
    rows = {name: table(4, t.shape[1:], t.dtype, device) for name, t in tables.items()}
    compare(tables, indices, rows)


def test_nothing_to_do(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    tables = {"a": torch.ones(3, 2, device=device), "empty": torch.ones(3, 0, device=device)}
    gathered = sf.gather_rows(tables, none)
    assert {name: tuple(t.shape) for name, t in gathered.items()} == {"a": (0, 2), "empty": (0, 0)}
    sf.scatter_rows_(tables, none, gathered)
    assert sf.gather_rows({}, none) == {}
    sf.scatter_rows_({}, none, {})
    no_rows = {"a": torch.ones(0, 2, device=device)}
    assert sf.gather_rows(no_rows, none)["a"].shape == (0, 2)
    indices = torch.tensor([7, -1], device=device)
    sf.scatter_rows_(tables, indices, reference.gather_rows(tables, indices % 3), mask=indices > 9)
    assert (tables["a"] == 1).all()


def test_strides(device):
    base = torch.arange(600.0, device=device).reshape(20, 30)
    indices = torch.tensor([1, 4, 1], device=device)
    for view in (base[:, 3:10], base[::2], base[:, ::3], base.t()[:20], base[:1].expand(20, -1)):
        gathered = sf.gather_rows({"a": view}, indices[::2])
        assert_same(gathered, reference.gather_rows({"a": view}, indices[::2]))
    rows = {"a": torch.randn(14, 3, device=device).t()[:, ::2]}
    for view in (base[:, 3:10], base[::2, 3:10]):
        expected = base.clone()
        reference.scatter_rows_({"a": expected[:: 20 // len(view), 3:10]}, indices, rows)
        sf.scatter_rows_({"a": view}, indices, rows)
        assert torch.equal(base, expected)
    for name, view in {"whole": base[:, ::3], "overlap": base[:1].expand(20, -1)}.items():
        before = base.clone()
        with pytest.raises(RuntimeError, match="must have (contiguous rows|rows that do not over)"):
            sf.scatter_rows_({"a": view}, indices, {"a": view[:3].clone()})
        assert torch.equal(base, before), name


def test_rows_of_the_table_itself(device):
    base = torch.arange(40.0, device=device).reshape(10, 4)
    indices = torch.tensor([1, 2, 3, 4], device=device)
    expected = base.clone()
    expected[1:5] = base[:4].clone()
    sf.scatter_rows_({"a": base}, indices, {"a": base[:4]})
    assert torch.equal(base, expected)
    with pytest.raises(RuntimeError, match=r"tables\[1\] must not share memory with tables\[0\]"):
        sf.scatter_rows_({"a": base, "b": base[:]}, indices, {"a": base[:4], "b": base[:4]})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tables(data):
    count = data.draw(st.integers(1, 30))
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    kinds = data.draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4))
    cpu = torch.device("cpu")
    tables = {f"{i}": table(count, *kind, cpu) for i, kind in enumerate(kinds)}
    places = data.draw(st.lists(st.integers(0, count - 1), max_size=40))
    rows = {name: table(len(places), t.shape[1:], t.dtype, cpu) for name, t in tables.items()}
    mask = data.draw(
        st.none() | st.lists(st.booleans(), min_size=len(places), max_size=len(places))
    )
    indices = torch.tensor(places, dtype=torch.int64)
    compare(tables, indices, rows, None if mask is None else torch.tensor(mask, dtype=torch.bool))


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**40)])
def test_an_index_out_of_range_writes_nothing(bad):
    """Only on the CPU: a device-side assertion would end the use of the GPU in this process."""
    tables = {"a": torch.zeros(5, 2), "b": torch.zeros(5, dtype=torch.int16)}
    rows = {"a": torch.ones(3, 2), "b": torch.ones(3, dtype=torch.int16)}
    indices = torch.tensor([0, 1, bad])
    message = f"indices must be between 0 and 4, the last row of the tables, got {bad}"
    with pytest.raises(RuntimeError, match=message):
        sf.scatter_rows_(tables, indices, rows)
    with pytest.raises(RuntimeError, match=message):
        sf.gather_rows(tables, indices)
    with pytest.raises(RuntimeError, match=message):
        reference.scatter_rows_(tables, indices, rows)
    assert not any(t.any() for t in tables.values())
    sf.scatter_rows_(tables, indices, rows, mask=torch.tensor([True, False, False]))
    assert tables["b"].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_tables():
    cuda = torch.device("cuda")
    tables = {n: t.pin_memory() for n, t in tables_of_all_kinds(300, torch.device("cpu")).items()}
    indices = torch.randint(300, (90,), device=cuda)
    rows = {name: table(90, t.shape[1:], t.dtype, cuda) for name, t in tables.items()}
    expected = clones(tables)
    reference.scatter_rows_(expected, indices, rows)
    sf.scatter_rows_(tables, indices, rows)
    torch.cuda.synchronize()
    assert_same(tables, expected)
    assert_same(sf.gather_rows(tables, indices), reference.gather_rows(expected, indices))
    with pytest.raises(ValueError, match=r"tables\['a'\] must be on the device of indices"):
        sf.gather_rows({"a": torch.zeros(3)}, indices)


def test_values_have_no_gradient(device):
    stored = torch.zeros(4, 2, device=device)
    fresh = torch.ones(2, 2, device=device, requires_grad=True)
    indices = torch.tensor([0, 3], device=device)
    sf.scatter_rows_({"a": stored}, indices, {"a": fresh * 2})
    assert not stored.requires_grad
    leaf = torch.zeros(4, 2, device=device, requires_grad=True)
    for call in (
        lambda: sf.gather_rows({"a": leaf}, indices),
        lambda: sf.scatter_rows_({"a": leaf}, indices, {"a": fresh}),
    ):
        with pytest.raises(ValueError, match=r"tables\['a'\] must not require a gradient"):
            call()
    with torch.no_grad():
        assert not sf.gather_rows({"a": leaf}, indices)["a"].requires_grad


def test_a_table_that_a_backward_saved_is_not_changed_unnoticed(device):
    stored = torch.ones(4, 2, device=device)
    weight = torch.ones(4, 2, device=device, requires_grad=True)
    loss = (weight * stored).sum()
    sf.scatter_rows_({"a": stored}, torch.tensor([0], device=device), {"a": stored[1:2] * 5})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Update:
    """A cache of three tables, and the arguments of one update."""

    def __init__(self, slots: int, device: torch.device, ages: Tensor | None = None) -> None:
        self.device = device
        self.tables = {
            "ids": table(slots, (5,), torch.int32, device),
            "flag": table(slots, (), torch.bool, device),
            "embedding": table(slots, (3, 7), torch.bfloat16, device),
        }
        ages = torch.randint(0, 9, (slots,)) if ages is None else ages
        self.age = ages.int().to(device)
        self.valid = table(slots, (), torch.bool, device)
        self.arguments: dict[str, object] = {}

    def new(self, count: int, mask: list[bool] | None = None) -> "Update":
        self.arguments |= {"new_rows": self._rows(count, self.tables), "new_mask": self._mask(mask)}
        return self

    def refresh(
        self, slots: list[int], names: tuple[str, ...], mask: list[bool] | None = None
    ) -> "Update":
        self.arguments |= {
            "refreshed_rows": self._rows(len(slots), names),
            "refreshed_slots": torch.tensor(slots, dtype=torch.int64, device=self.device),
            "refreshed_mask": self._mask(mask),
        }
        return self

    def state(self) -> dict[str, Tensor]:
        return {**self.tables, "age": self.age, "valid": self.valid}

    def compare(self, **options) -> None:
        """Assert that the update equals the reference in every tensor of the cache."""
        expected = clones(self.state())
        tables = {name: expected[name] for name in self.tables}
        reference.update_cache_(
            tables, expected["age"], expected["valid"], **self.arguments, **options
        )
        update_cache_(self.tables, self.age, self.valid, **self.arguments, **options)
        assert_same(self.state(), expected)

    def _rows(self, count: int, names) -> dict[str, Tensor]:
        shapes = {name: (self.tables[name].shape[1:], self.tables[name].dtype) for name in names}
        return {name: table(count, *kind, self.device) for name, kind in shapes.items()}

    def _mask(self, mask: list[bool] | None) -> Tensor | None:
        return None if mask is None else torch.tensor(mask, dtype=torch.bool, device=self.device)


@pytest.mark.parametrize("order", ["any", "rising", "falling", "equal"])
@pytest.mark.parametrize("count", [0, 1, 3, 100, 999, 1000])
def test_new_rows_replace_the_oldest(device, count, order):
    """The largest ages are replaced first, of equal ages the lowest slot; the largest age wraps."""
    ages = torch.randint(-1, 30, (1000,), dtype=torch.int32)
    ages[500], ages[700], ages[701] = 2**31 - 2, 2**31 - 1, -(2**31)
    if order == "equal":
        ages[:] = 7
    elif order != "any":
        ages = ages.sort(descending=order == "falling")[0]
    oldest = ages.long().sort(descending=True, stable=True)[1][:count].to(device)
    update = Update(1000, device, ages).new(count)
    expected = clones(update.state())
    update_cache_(update.tables, update.age, update.valid, **update.arguments)
    expected["age"] += 1
    expected["age"][oldest] = 0
    expected["valid"][oldest] = True
    for name in update.tables:
        expected[name][oldest] = update.arguments["new_rows"][name]
    assert_same(update.state(), expected)


@pytest.mark.parametrize("use_lru", [True, False])
def test_refresh_then_replace(device, use_lru):
    """Repeated slots, masks, a refreshed slot that is replaced, and tables in another order."""
    names = ("embedding", "ids")
    for ages in (None, torch.full((40,), 3), torch.arange(40).flip(0)):
        Update(40, device, ages).compare(use_lru=use_lru)
        Update(40, device, ages).new(6).compare(use_lru=use_lru)
        Update(40, device, ages).refresh([3, 0, 3, 39], names).compare(use_lru=use_lru)
        update = Update(40, device, ages).new(5).refresh([3, 0, 3, 39], names)
        update.compare(use_lru=use_lru)
        mask = [True, False, True, True, False]
        update = Update(40, device, ages).new(5, mask)
        update.refresh([7, -1, 2, 7, 10**9, 7], names, [True, False, True, True, False, False])
        update.compare(use_lru=use_lru)
        Update(40, device, ages).refresh([5, 5], ()).compare(use_lru=use_lru)
        Update(40, device, ages).new(3, [False] * 3).compare(use_lru=use_lru)
    # More new rows than slots, but not more unmasked ones; and all slots at once.
    Update(4, device).new(6, [True, False] * 3).compare(use_lru=use_lru)
    Update(4, device).new(4).refresh([1, 2], ("flag",)).compare(use_lru=use_lru)
    Update(1, device).new(1).refresh([0], names).compare(use_lru=use_lru)
    Update(0, device).new(0).compare(use_lru=use_lru)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_update(data):
    slots = data.draw(st.integers(1, 600))
    ages = data.draw(st.sampled_from(["few", "many", "steps"]))
    drawn = {
        "few": torch.randint(0, 3, (slots,)),
        "many": torch.randint(-(2**31), 2**31, (slots,)),
        "steps": torch.arange(slots).div(7, rounding_mode="floor").roll(slots // 3).flip(0),
    }[ages]
    update = Update(slots, torch.device("cpu"), drawn)

    def mask(count):
        return data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))

    if data.draw(st.booleans()):
        count = data.draw(st.integers(0, min(slots, 80)))
        update.new(count, mask(count))
    if data.draw(st.booleans()):
        places = data.draw(st.lists(st.integers(0, slots - 1), max_size=80))
        names = data.draw(st.permutations(list(update.tables)))
        update.refresh(places, names[: data.draw(st.integers(0, 3))], mask(len(places)))
    update.compare(use_lru=data.draw(st.booleans()))


def test_large_updates_on_several_threads():
    threads = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        update = Update(9000, torch.device("cpu"), torch.arange(9000) % 1000)
        update.tables["wide"] = torch.randn(9000, 300)
        places = torch.randint(9000, (8000,)).tolist()
        update.new(7000).refresh(places, ("wide", "flag")).compare()
    torch.set_num_threads(threads)


def test_rows_of_the_cache_itself(device):
    """Rows that are views of the tables have their values from before the update."""
    update = Update(10, device).new(4).refresh([0, 1, 2], ("embedding",))
    update.arguments["new_rows"] = {name: t[3:7] for name, t in update.tables.items()}
    update.arguments["refreshed_rows"] = {"embedding": update.tables["embedding"][5:8]}
    before = clones(update.state())
    update.age[:4] = 100
    update_cache_(update.tables, update.age, update.valid, **update.arguments, use_lru=False)
    for name in update.tables:
        assert torch.equal(update.tables[name][:4], before[name][3:7])
        assert torch.equal(update.tables[name][4:], before[name][4:])


@pytest.mark.parametrize("bad", [-1, 40, 2**40, -(2**40)])
def test_a_bad_update_changes_nothing(bad):
    cpu = torch.device("cpu")

    def refused(message: str, change=None, **arguments) -> None:
        update = Update(40, cpu).new(3).refresh([1, 2], ("embedding",))
        update.arguments |= arguments
        if change is not None:
            change(update)
        before = clones(update.state())
        with pytest.raises(RuntimeError, match=message):
            update_cache_(update.tables, update.age, update.valid, **update.arguments)
        assert_same(update.state(), before)

    slots = torch.tensor([1, bad])
    refused(f"indices must be between 0 and 39, the last row of the tables, got {bad}",
            refreshed_slots=slots)  # fmt: skip
    refused("indices must be int64", refreshed_slots=slots.int())
    refused("refreshed_slots must be given with refreshed_rows", refreshed_slots=None)
    refused(r"refreshed_rows\[0\] must be \(count, \*row\) with count = 1",
            refreshed_slots=slots[:1])  # fmt: skip
    refused(r"refreshed_mask must be bool \(count,\) = \(2,\)", refreshed_mask=slots[:1] > 0)
    refused(r"new_mask must be bool \(count,\) = \(3,\)", new_mask=slots > 0)
    new = Update(40, cpu).new(3).arguments["new_rows"]
    refused(r"new_rows\[\d\] must have the dtype of its table, Int, got Long",
            new_rows={**new, "ids": new["ids"].long()})  # fmt: skip
    refused("new_rows must be at most the 40 slots, got 41",
            change=lambda update: update.new(41))  # fmt: skip

    def set_to(name: str, value: Tensor):
        return lambda update: setattr(update, name, value)

    refused("age must be contiguous int32", change=set_to("age", torch.zeros(40)))
    refused("age must be contiguous int32", change=set_to("age", torch.zeros(80).int()[::2]))
    refused("valid must be contiguous bool", change=set_to("valid", torch.zeros(39).bool()))
    refused(r"tables\[\d\] must have a row for each of the 40 slots",
            change=lambda update: update.tables.update(ids=torch.zeros(39, 5).int()))  # fmt: skip
    refused(r"tables\[\d\] must not share memory with tables\[\d\]",
            change=lambda update: update.tables.update(flag=update.valid))  # fmt: skip


def test_opcheck(device):
    tables = [table(6, row, torch.float32, device) for row in ((), (3,), (2, 2))]
    indices = torch.tensor([0, 5, 5], device=device)
    rows = [t[:3].clone() for t in tables]
    torch.library.opcheck(torch.ops.splade_fast.gather_rows.default, (tables, indices))
    age, valid = torch.arange(6, device=device).int(), torch.ones(6, device=device).bool()
    for mask in (None, torch.tensor([True, False, True], device=device)):
        torch.library.opcheck(
            torch.ops.splade_fast.scatter_rows_.default, (tables, indices, rows, mask)
        )
        torch.library.opcheck(
            torch.ops.splade_fast.update_cache_.default,
            (tables, age, valid, rows, mask, rows[:1], indices, mask, True),
        )


def test_compiles_in_one_graph(device):
    """The first batch is compiled with static shapes, the second with a dynamic batch size."""

    def shift(tables, indices):
        rows = sf.gather_rows(tables, indices)
        sf.scatter_rows_(tables, indices + 1, rows, mask=indices > 0)
        return tables["a"].sum()

    compiled = torch.compile(shift, fullgraph=True)
    for count in (2, 3):
        tables = {
            # Whole numbers, whose sum is exact in any order.
            "a": table(6, (3,), torch.float32, device),
            "b": torch.arange(6, dtype=torch.int16, device=device),
        }
        others = clones(tables)
        indices = torch.arange(count, device=device)
        assert torch.equal(compiled(tables, indices), shift(others, indices))
        assert_same(tables, others)


def test_an_update_compiles_in_one_graph(device):
    def step(tables, age, valid, arguments):
        update_cache_(tables, age, valid, **arguments)
        return tables["ids"].sum() + age.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ages in (None, torch.arange(30)):
        update = Update(30, device, ages).new(3).refresh([1, 4], ("embedding",), [True, False])
        other = clones(update.state())
        tables = {name: other[name] for name in update.tables}
        expected = step(tables, other["age"], other["valid"], update.arguments)
        assert compiled(update.tables, update.age, update.valid, update.arguments) == expected
        assert_same(update.state(), other)


def test_meta():
    rows = sf.gather_rows(
        {"a": torch.empty(5, 2, 3, dtype=torch.bool, device="meta")},
        torch.empty(4, dtype=torch.int64, device="meta"),
    )
    assert rows["a"].shape == (4, 2, 3)
    assert rows["a"].dtype == torch.bool


def test_bad_arguments(device):
    tables = {"a": torch.zeros(5, 2, device=device), "b": torch.zeros(5, device=device)}
    indices = torch.tensor([0, 1], device=device)
    rows = {"a": torch.ones(2, 2, device=device), "b": torch.ones(2, device=device)}
    mask = torch.ones(2, dtype=torch.bool, device=device)
    wrong = [
        (TypeError, "indices must be int64 or int32, got torch.float32", indices.float(), rows,
         None),
        (ValueError, r"indices must be \(count,\), got \(2, 1\)", indices[:, None], rows, None),
        (ValueError, r"must have the names of tables, \['a', 'b'\], got \['a'\]", indices,
         {"a": rows["a"]}, None),
        (TypeError, r"rows\['b'\] must have the dtype of its table, torch.float32, got torch.int64",
         indices, {**rows, "b": rows["b"].long()}, None),
        (ValueError, r"rows\['a'\] must be \(2, 2\), got \(2, 3\)", indices,
         {**rows, "a": torch.ones(2, 3, device=device)}, None),
        (TypeError, "mask must be bool, got torch.int64", indices, rows, mask.long()),
        (ValueError, r"mask must be \(2,\), got \(1,\)", indices, rows, mask[:1]),
    ]  # fmt: skip
    for error, message, places, values, chosen in wrong:
        with pytest.raises(error, match=message):
            sf.scatter_rows_(tables, places, values, mask=chosen)
    with pytest.raises(ValueError, match=r"tables\['b'\] must have 5 rows, got 4"):
        sf.gather_rows({"a": tables["a"], "b": tables["b"][:4]}, indices)
    with pytest.raises(TypeError, match=r"tables\['a'\] must be a tensor, got list"):
        sf.gather_rows({"a": [1.0]}, indices)
    with pytest.raises(ValueError, match=r"tables\['a'\] must be \(rows, ...\), got a scalar"):
        sf.gather_rows({"a": torch.tensor(1.0, device=device)}, indices)
    assert not any(t.any() for t in tables.values())
