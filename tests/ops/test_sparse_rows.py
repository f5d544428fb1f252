import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from splade_fast.ops.score import sparse_scores, sparse_search
from splade_fast.ops.sparse_rows import SparseRows


def random_dense(rows: int = 7, cols: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows with few distinct values, hence ties, and one empty row."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randint(-3, 5, (rows, cols), generator=generator).to(dtype) / 2
    if rows > 2:
        x[2] = -1
    return x


def largest_by_python(
    row: list[float],
    k: int | None = None,
    threshold: float = 0.0,
    max_ratio: float | None = None,
    mass: float | None = None,
) -> dict[int, float]:
    ranked = sorted(
        ((value, column) for column, value in enumerate(row) if value > threshold),
        key=lambda entry: (-entry[0], entry[1]),
    )
    total = sum(value for value, _ in ranked)
    kept, before = [], 0.0
    for rank, (value, column) in enumerate(ranked):
        if (
            (k is None or rank < k)
            and (max_ratio is None or value >= max_ratio * ranked[0][0])
            and (mass is None or before < mass * total)
        ):
            kept.append((column, value))
        before += value
    return dict(sorted(kept))


@pytest.mark.parametrize(
    "criteria",
    [
        {},
        {"k": 0},
        {"k": 3},
        {"k": 100},
        {"threshold": 1.0},
        {"max_ratio": 0.6},
        {"mass": 0.5},
        {"mass": 0.0},
        {"k": 4, "threshold": 0.5, "max_ratio": 0.5, "mass": 0.75},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_dense_keeps_what_python_keeps(criteria, dtype):
    x = random_dense(dtype=dtype)
    rows = SparseRows.from_dense(x, **criteria)
    rows.check_contents()
    expected = [largest_by_python(row, **criteria) for row in x.tolist()]
    assert rows.to_dicts() == expected
    assert rows.dtype == dtype
    assert rows.width == max(len(row) for row in expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_shapes_survive_everything(shape, tmp_path):
    x = torch.zeros(shape)
    for rows in (SparseRows.from_dense(x), SparseRows.from_dense(x, k=2)):
        assert torch.equal(rows.to_dense(), x)
        assert torch.equal(rows.to_torch_csr().to_dense(), x)
        assert rows.to_scipy().shape == shape
        assert rows.to_dicts() == [{}] * shape[0]
        assert SparseRows.from_torch_csr(rows.to_torch_csr()).equal(rows)
        assert SparseRows.from_scipy(rows.to_scipy()).equal(rows)
        assert SparseRows.from_dicts(rows.to_dicts(), shape[1]).equal(rows)
        assert [len(columns) for columns, _ in rows] == [0] * shape[0]
        assert rows.to(torch.bfloat16).to_dense().dtype == torch.bfloat16
        assert rows.shape == shape
        assert SparseRows.cat([rows, rows]).to_dense().shape == (2 * shape[0], shape[1])
        assert len(rows[:0]) == 0
        rows.save(tmp_path / "rows.safetensors")
        assert SparseRows.load(tmp_path / "rows.safetensors").equal(rows)


def test_conversions_agree_with_dense():
    x = random_dense()
    rows = SparseRows.from_dense(x)
    dense = x.clamp(min=0)
    assert torch.equal(rows.to_dense(), dense)
    assert torch.equal(rows.to_torch_csr().to_dense(), dense)
    np.testing.assert_array_equal(rows.to_scipy().toarray(), dense.numpy())
    names = [f"term{i}" for i in range(x.shape[1])]
    assert rows.to_dicts(names)[0] == {names[i]: v for i, v in rows.to_dicts()[0].items()}
    assert np.array_equal(rows.to(torch.bfloat16).to_scipy().toarray(), dense.numpy())


def entries_of_every_kind(dtype: torch.dtype) -> SparseRows:
    """Return empty rows first, last and between, a full row, negative values and explicit zeros."""
    x = random_dense(9, 20, dtype)
    x[[0, 4, 5, 8]] = -1
    x[3] = 1
    rows = SparseRows.from_dense(x)
    values = rows.values.clone()
    values[1, 0], values[1, 1], values[3, 2], values[3, 3] = -2, 0, torch.inf, -torch.inf
    return SparseRows(rows.indices, values, rows.lengths, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_conversions_come_back_exactly(dtype, tmp_path):
    rows = entries_of_every_kind(dtype)
    names = [f"term{i}" for i in range(20)]
    ids = {name: i for i, name in enumerate(names)}
    rows.save(tmp_path / "rows.safetensors")
    for back in (
        SparseRows.from_torch_csr(rows.to_torch_csr()),
        SparseRows.from_scipy(rows.to_scipy(), dtype=dtype),
        SparseRows.from_dicts(rows.to_dicts(), 20, dtype=dtype),
        SparseRows.from_dicts(rows.to_dicts(names), 20, ids, dtype=dtype),
        SparseRows.load(tmp_path / "rows.safetensors"),
        SparseRows.load(tmp_path / "rows.safetensors", mmap=False),
        SparseRows.cat([rows[:4], rows[4:6], rows[6:]]),
        rows[torch.arange(9)],
        rows.to(torch.float64).to(dtype),
    ):
        back.check_contents()
        assert back.equal(rows)
        assert back.width == rows.width == 20
        assert back.num_cols == 20
    positive = SparseRows.from_dense(rows.to_dense())
    assert SparseRows.from_dense(positive.to_dense()).equal(positive)


@pytest.mark.parametrize("columns", ["all empty", "no columns"])
def test_empty_rows_come_back(columns):
    width = 0 if columns == "no columns" else 7
    rows = SparseRows.from_dense(torch.zeros(3, width))
    assert rows.width == 0
    wide = SparseRows(
        torch.full((3, 2), -1, dtype=torch.int32), torch.zeros(3, 2), rows.lengths, width
    )
    for given in (rows, wide):
        assert torch.equal(given.to_dense(), torch.zeros(3, width))
        for back in (
            SparseRows.from_torch_csr(given.to_torch_csr()),
            SparseRows.from_scipy(given.to_scipy()),
            SparseRows.from_dicts(given.to_dicts(), width),
            SparseRows.cat([given[:1], given[1:]]),
        ):
            assert back.equal(rows)
            assert len(back) == 3


def test_from_scipy_takes_any_format():
    from scipy.sparse import coo_array, csc_matrix

    twice = coo_array(([1.0, 2.0, 4.0], ([0, 0, 2], [3, 3, 1])), shape=(3, 5))
    assert SparseRows.from_scipy(twice).to_dicts() == [{3: 3.0}, {}, {1: 4.0}]
    assert twice.nnz == 3  # the argument is not changed
    rows = SparseRows.from_scipy(csc_matrix(twice))
    assert rows.to_dicts() == [{3: 3.0}, {}, {1: 4.0}]
    assert rows.dtype == torch.float64
    whole = twice.astype(int)
    assert SparseRows.from_scipy(whole, dtype=torch.float32).to_dicts() == rows.to_dicts()
    with pytest.raises(TypeError, match="floating point without dtype, got torch.int64"):
        SparseRows.from_scipy(whole)
    with pytest.raises(TypeError, match="matrix must be of scipy.sparse, got ndarray"):
        SparseRows.from_scipy(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"two dimensions, got shape \(5,\)"):
        SparseRows.from_scipy(coo_array(np.ones(5)))


def test_from_torch_csr_refuses():
    csr = torch.eye(3).to_sparse_csr()
    with pytest.raises(TypeError, match="matrix must be a tensor, got list"):
        SparseRows.from_torch_csr([[1.0]])
    with pytest.raises(ValueError, match="torch.sparse_csr .*got torch.sparse_coo"):
        SparseRows.from_torch_csr(csr.to_sparse_coo())
    with pytest.raises(ValueError, match="torch.sparse_csr .*got torch.strided"):
        SparseRows.from_torch_csr(torch.eye(3))
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        SparseRows.from_torch_csr(csr.to(torch.int64))
    backwards = torch.sparse_csr_tensor([0, 2], [2, 1], [1.0, 1.0], (1, 3), check_invariants=False)
    with pytest.raises(ValueError, match="indices must ascend within a row, got in row 0"):
        SparseRows.from_torch_csr(backwards)


@pytest.mark.parametrize(
    ("dicts", "token_to_id", "message"),
    [
        ([{0: 1.0}, {3: 1.0}], None, r"dicts\[1\] must have columns from 0 to 2, got 3"),
        ([{-1: 1.0}], None, "columns from 0 to 2, got -1"),
        ([{"a": 1.0}], None, "columns from 0 to 2, got 'a'"),
        ([{"a": 1.0, "b": 1.0}], {"a": 0}, "must name tokens of token_to_id, got 'b'"),
        ([{"a": 1.0, "b": 1.0}], {"a": 0, "b": 0}, "one value a column, got two for 0"),
        ([{"a": 1.0}], {"a": 5}, "columns from 0 to 2, got 5"),
        ([{True: 1.0}], None, "columns from 0 to 2, got True"),
        ([{1.0: 1.0}], None, r"columns from 0 to 2, got 1\.0"),
        ([{np.int64(7): 1.0}], None, "columns from 0 to 2, got .*7"),
        ([{"-1": 1.0}], None, "columns from 0 to 2, got '-1'"),
        ([{"1": 1.0, 1: 1.0}], None, "one value a column, got two for 1"),
        ([{"a": 1.0, "[#0]": 1.0}], {"a": 0}, "one value a column, got two for 0"),
        ([{"[#3]": 1.0}], {"a": 0}, "columns from 0 to 2, got 3"),
    ],
)
def test_from_dicts_refuses(dicts, token_to_id, message):
    with pytest.raises(ValueError, match=message):
        SparseRows.from_dicts(dicts, 3, token_to_id)


@pytest.mark.parametrize(
    ("dicts", "message"),
    [
        ({0: 1.0}, "dicts must be a list of dicts, got one dict"),
        ([{0: 1.0}, [(0, 1.0)]], r"dicts\[1\] must be a dict, got list"),
        ([None], r"dicts\[0\] must be a dict, got NoneType"),
        ([{}, {1: "2.0"}], r"dicts\[1\] must have numbers as values, got str for 1"),
        ([{1: None}], r"dicts\[0\] must have numbers as values, got NoneType for 1"),
        ([{1: np.ones(1)}], r"dicts\[0\] must have numbers as values, got ndarray for 1"),
        ([{1: torch.ones(1)}], r"dicts\[0\] must have numbers as values, got Tensor for 1"),
    ],
)
def test_from_dicts_refuses_other_types(dicts, message):
    with pytest.raises(TypeError, match=message):
        SparseRows.from_dicts(dicts, 3)


@pytest.mark.parametrize(
    "number", [2, np.float32(2), np.int64(2), np.float16(2), torch.tensor(2.0)]
)
def test_from_dicts_takes_numbers_of_every_kind(number):
    assert SparseRows.from_dicts([{1: number}], 3).to_dicts() == [{1: 2.0}]


def test_from_dicts_in_any_order():
    assert SparseRows.from_dicts(({4: 1.5, 0: -1}, {}), 5).indices.tolist() == [[0, 4], [-1, -1]]
    assert SparseRows.from_dicts([], 5).shape == (0, 5)


def test_from_dicts_takes_columns_of_numpy_torch_and_json():
    entries = [{1: 0.5, 3: 2.0}, {}]
    expected = SparseRows.from_dicts(entries, 5)
    for to_key in (np.int64, np.uint8, torch.tensor, str):
        dicts = [{to_key(column): value for column, value in row.items()} for row in entries]
        assert SparseRows.from_dicts(dicts, np.int64(5)).equal(expected)
    from_json = json.loads(json.dumps(expected.to_dicts()))
    assert SparseRows.from_dicts(from_json, 5).equal(expected)
    ids = {"fox": np.int64(1), "dog": np.int32(3)}
    assert SparseRows.from_dicts([{"dog": 2.0, "fox": 0.5}, {}], 5, ids).equal(expected)


@pytest.mark.parametrize(
    "names",
    [
        ["cat", None, ""],  # a padded vocabulary: fewer names than columns
        {0: "cat"},
        {"0": "cat", "9": "beyond"},  # from JSON
        np.array(["cat", "", ""]),
        ["cat", None, None, None, None, "beyond"],
    ],
    ids=["list", "mapping", "json", "numpy", "long"],
)
def test_columns_without_a_name_stay_apart(names):
    rows = SparseRows.from_dense(torch.tensor([[1.0, 2.0, 3.0, 0.0, 5.0]]))
    named = rows.to_dicts(names)
    assert named == [{"cat": 1.0, "[#1]": 2.0, "[#2]": 3.0, "[#4]": 5.0}]
    assert SparseRows.from_dicts(named, 5, {"cat": 0}).equal(rows)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["cat", "dog", "cat"], ValueError, "name every column differently, got 'cat' twice"),
        (["cat", "[#2]", None], ValueError, r"name every column differently, got '\[#2\]' twice"),
        ({"cat": 0, "dog": 1}, TypeError, "have columns as keys, got 'cat'"),
        ([b"cat", b"dog", b"cow"], TypeError, "name columns by strings, got bytes for 0"),
    ],
)
def test_to_dicts_refuses_names_that_would_merge_columns(names, error, message):
    with pytest.raises(error, match=f"id_to_token must {message}"):
        SparseRows.from_dense(torch.ones(1, 3)).to_dicts(names)


def test_iteration_gives_the_used_slots():
    rows = entries_of_every_kind(torch.float32)
    found = [dict(zip(columns.tolist(), values.tolist(), strict=True)) for columns, values in rows]
    assert found == rows.to_dicts()


def test_pickle_and_copy():
    rows = entries_of_every_kind(torch.float32)
    assert pickle.loads(pickle.dumps(rows)).equal(rows)
    assert copy.deepcopy(rows).equal(rows)


def test_inside_torch_compile():
    """The first batch is compiled with static shapes, the second with a dynamic batch size.

    The width of one of the results is known only after pruning.
    """

    def pruned(x, queries):
        few = SparseRows.from_dense(x, 3)
        many = SparseRows.from_dense(x, threshold=0.5, max_ratio=0.5)
        return few.to_dense() + many.to_dense(), sparse_scores(queries, few)

    compiled = torch.compile(pruned, fullgraph=True)
    for rows in (5, 6):
        x = random_dense(rows).requires_grad_()
        queries = torch.randn(rows - 2, 20)
        results, expected = compiled(x, queries), pruned(x, queries)
        for actual, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        (grad,) = torch.autograd.grad(results[0].square().sum() + results[1].sum(), x)
        (wanted,) = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), x)
        torch.testing.assert_close(grad, wanted)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_move_to_a_gpu_and_back():
    rows = entries_of_every_kind(torch.float32)
    pinned = rows.pin_memory()
    assert pinned.indices.is_pinned()
    assert pinned.values.is_pinned()
    assert pinned.lengths.is_pinned()
    moved = pinned.to("cuda", torch.float16, non_blocking=True)
    assert moved.device.type == "cuda"
    assert moved.to("cpu").equal(rows.to(torch.float16))
    assert SparseRows.from_torch_csr(moved.to_torch_csr()).equal(moved)
    torch.testing.assert_close(moved.to_dense().cpu(), rows.to(torch.float16).to_dense())
    moved.check_contents()


def test_nan_is_kept_and_ranks_first():
    x = torch.tensor([[1.0, float("nan"), 3.0, -1.0, 2.0]])
    assert SparseRows.from_dense(x).indices.tolist() == [[0, 1, 2, 4]]
    best = SparseRows.from_dense(x, k=2)
    assert best.indices.tolist() == [[1, 2]]
    assert best.values.isnan().tolist() == [[True, False]]


def test_infinity_is_kept():
    rows = SparseRows.from_dense(torch.tensor([[1.0, torch.inf, -torch.inf, 2.0]]), k=2)
    assert rows.to_dicts() == [{1: float("inf"), 3: 2.0}]


def test_gradient_reaches_only_kept_entries():
    x = random_dense().requires_grad_()
    rows = SparseRows.from_dense(x, k=2)
    rows.to_dense().sum().backward()
    kept = torch.zeros_like(x)
    for row, entries in enumerate(rows.to_dicts()):
        kept[row, list(entries)] = 1
    assert torch.equal(x.grad, kept)


@pytest.mark.parametrize(
    "selection",
    [
        slice(1, 5),
        slice(None, None, 2),
        torch.tensor([4, 0, 0, -1]),
        torch.tensor([True, False, True, False, True, False, True]),
        [3, 1],
        [],
        np.array([4, 0]),
        np.array([True, False, True, False, True, False, True]),
    ],
)
def test_indexing_is_that_of_the_dense_rows(selection):
    x = random_dense().clamp(min=0)
    expected = x[:0] if isinstance(selection, list) and not selection else x[selection]
    assert torch.equal(SparseRows.from_dense(x)[selection].to_dense(), expected)


@pytest.mark.parametrize("row", [3, np.int64(3)])
def test_one_integer_is_refused(row):
    with pytest.raises(TypeError, match=r"got the int 3; .*rows\[i : i \+ 1\]"):
        SparseRows.from_dense(random_dense())[row]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, np.uint8, np.uint16])
def test_integers_of_every_kind_are_row_numbers(kind):
    rows = SparseRows.from_dense(random_dense())
    numbers = [1, 0, 1]
    given = torch.tensor(numbers, dtype=kind) if kind in (torch.uint8, torch.int32) else None
    found = rows[np.array(numbers, kind) if given is None else given]
    assert found.equal(rows[numbers])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ((0, 1), TypeError, "rows must be a slice, list or tensor, got tuple"),
        (None, TypeError, "rows must be a slice, list or tensor, got NoneType"),
        (0.5, TypeError, "rows must be a slice, list or tensor, got float"),
        ([0.5], TypeError, "rows must be integers or a mask, got torch.float32"),
        ([True], ValueError, "a mask must have one bool per row, 7, got 1"),
        ([[0]], ValueError, r"rows must have one dimension, got shape \(1, 1\)"),
        ([7], IndexError, "out of"),
    ],
)
def test_what_names_no_rows_is_refused(index, error, message):
    with pytest.raises(error, match=message):
        SparseRows.from_dense(random_dense())[index]


def test_cat_pads_to_the_widest():
    x = random_dense()
    narrow, wide = SparseRows.from_dense(x, k=1), SparseRows.from_dense(x)
    both = SparseRows.cat([narrow, wide])
    both.check_contents()
    assert torch.equal(both.to_dense(), torch.cat([narrow.to_dense(), wide.to_dense()]))


def test_cat_refuses_what_does_not_fit():
    rows = SparseRows.from_dense(random_dense())
    with pytest.raises(ValueError, match="parts must hold at least one"):
        SparseRows.cat([])
    with pytest.raises(ValueError, match=r"parts\[1\].num_cols must be 20 .* got 5"):
        SparseRows.cat([rows, SparseRows.from_dense(torch.ones(1, 5))])
    with pytest.raises(ValueError, match=r"parts\[1\].dtype must be torch.float32"):
        SparseRows.cat([rows, rows.to(torch.float64)])


def test_equal_ignores_padding_only():
    rows = SparseRows.from_dense(random_dense())
    wider = SparseRows(
        torch.nn.functional.pad(rows.indices, (0, 2), value=-1),
        torch.nn.functional.pad(rows.values, (0, 2)),
        rows.lengths,
        rows.num_cols,
    )
    assert rows.equal(wider)
    assert not rows.equal(rows[:3])
    assert not rows.equal(rows.to(torch.float64))
    assert not rows.equal(SparseRows.from_dense(random_dense() * 2))


def test_size_and_repr():
    rows = SparseRows.from_dense(torch.ones(2, 3))
    assert rows.nbytes == 2 * 3 * 4 + 2 * 3 * 4 + 2 * 4
    assert repr(rows) == (
        "SparseRows(2 rows, num_cols=3, width=3, dtype=torch.float32, device=cpu)"
    )


INDICES = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)
VALUES = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
LENGTHS = torch.tensor([2, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((INDICES.long(), VALUES, LENGTHS, 3), TypeError, "indices must be int32, got torch.int64"),
        ((INDICES, VALUES.int(), LENGTHS, 3), TypeError, "values must be floating point"),
        ((INDICES, VALUES, LENGTHS.long(), 3), TypeError, "lengths must be int32"),
        ((INDICES.numpy(), VALUES, LENGTHS, 3), TypeError, "indices must be a tensor, got ndarray"),
        ((INDICES, VALUES, [2, 1], 3), TypeError, "lengths must be a tensor, got list"),
        ((INDICES[0], VALUES, LENGTHS, 3), ValueError, r"indices must be \(rows, slots\)"),
        ((INDICES, VALUES[:1], LENGTHS, 3), ValueError, r"values .* \(2, 2\), got \(1, 2\)"),
        ((INDICES, VALUES, LENGTHS[:1], 3), ValueError, r"lengths .* \(2,\), got \(1,\)"),
        ((INDICES, VALUES, LENGTHS, -1), ValueError, "num_cols must be at least 0, got -1"),
        ((INDICES, VALUES, LENGTHS, 3.0), TypeError, "num_cols must be an integer, got float"),
        ((INDICES, VALUES, LENGTHS, 2**31 - 1), ValueError, "num_cols must be .* 2.31 - 2,"),
        ((INDICES, VALUES.to("meta"), LENGTHS, 3), ValueError, "values must be on cpu .*got meta"),
    ],
)
def test_layout_is_checked_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseRows(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"x must be \(rows, columns\)"),
        ((torch.ones(2, 2), -1), "k must be at least 0, got -1"),
    ],
)
def test_from_dense_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseRows.from_dense(*arguments)
    with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
        SparseRows.from_dense(np.ones((2, 2)))


@pytest.mark.parametrize(
    ("criterion", "value"), [("threshold", -0.5), ("max_ratio", 1.5), ("mass", -0.1)]
)
def test_criteria_out_of_range_are_refused(criterion, value):
    with pytest.raises(ValueError, match=f"{criterion} must be .* got {value}"):
        SparseRows.from_dense(torch.ones(2, 2), **{criterion: value})


def test_wider_spaces_than_indices_can_name_are_refused():
    """Columns that int32 cannot represent are refused."""
    with pytest.raises(ValueError, match=r"num_cols must be .* got 4294967301"):
        SparseRows.from_dicts([{2**32 + 3: 1.0}], 2**32 + 5)


@pytest.mark.parametrize("k", [2.5, True, "3"])
def test_k_must_be_an_integer(k):
    x = torch.ones(2, 2)
    message = f"k must be an integer, got {type(k).__name__}"
    with pytest.raises(TypeError, match=message):
        SparseRows.from_dense(x, k)
    with pytest.raises(TypeError, match=message):
        sparse_search(x, SparseRows.from_dense(x), k)


def test_k_of_another_integer_type_is_taken():
    x = random_dense()
    for k in (np.int64(3), torch.tensor(3)):
        assert SparseRows.from_dense(x, k).equal(SparseRows.from_dense(x, 3))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        SparseRows.from_dense(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "position", "entry", "message"),
    [
        ("lengths", (0,), 3, "lengths must be between 0 and 2"),
        ("indices", (0, 1), 3, "indices must be between 0 and 2"),
        ("indices", (0, 1), 0, "indices must ascend"),
        ("indices", (1, 1), 2, "indices must be -1 where unused"),
        ("values", (1, 1), 1.0, "values must be 0 where unused"),
    ],
)
def test_load_checks_every_entry(name, position, entry, message, tmp_path):
    path = tmp_path / "rows.safetensors"
    SparseRows(INDICES, VALUES, LENGTHS, 3).save(path)
    tensors = load_file(path)
    tensors[name][position] = entry
    header = {"format": "splade_fast.SparseRows", "version": 1, "num_cols": 3}
    save_file(tensors, path, metadata={"sparse_rows": json.dumps(header)})
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        SparseRows.load(path)


def resident_kib(kind: str) -> int:
    """Return the resident memory of this process, anonymous ("Anon") or mapped ("File")."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"Rss{kind}:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_load_maps_the_file_and_checks_it_without_a_copy(tmp_path):
    path = tmp_path / "rows.safetensors"
    indices = torch.arange(64, dtype=torch.int32).expand(200_000, 64).contiguous()
    lengths = torch.full((200_000,), 64, dtype=torch.int32)
    SparseRows(indices, torch.ones(200_000, 64), lengths, 64).save(path)
    kib = 2 * indices.nbytes // 1024
    anonymous = resident_kib("Anon")
    mapped = SparseRows.load(path)
    assert resident_kib("Anon") - anonymous < kib // 2
    loaded = SparseRows.load(path, mmap=False)
    assert resident_kib("Anon") - anonymous >= kib // 2
    assert loaded.equal(mapped)
    loaded.values[0, 0] = mapped.values[0, 1] = 5
    assert SparseRows.load(path).values.max() == 1


def test_contents_are_checked_in_every_part(monkeypatch):
    monkeypatch.setattr("splade_fast.ops.sparse_rows.checks._ENTRIES_AT_ONCE", 2)
    rows = SparseRows.from_dense(torch.ones(5, 2))
    rows.check_contents()
    rows.indices[3, 1] = 2
    with pytest.raises(ValueError, match="must be between 0 and 1 where used, got in row 3"):
        rows.check_contents()


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "rows.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        SparseRows.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        SparseRows.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="must hold saved SparseRows"):
        SparseRows.load(path)


def test_save_replaces_only_by_a_complete_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.safetensors"
    rows = SparseRows.from_dense(random_dense())
    rows.save(path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("splade_fast.ops.sparse_rows.file.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        rows[:1].save(path)
    assert SparseRows.load(path).equal(rows)
    assert list(tmp_path.iterdir()) == [path]
