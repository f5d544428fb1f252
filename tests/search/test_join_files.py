"""join_files, compared with one file of all rows that safetensors has written."""

import pytest
import torch
from safetensors.torch import save_file

import splade_fast as sf
from splade_fast.search.join_files import join_files
from tests.selection import pairwise

NUM_COLS = 40


def make_parts(folder, rows, sizes):
    """Write files of consecutive rows, each as wide as its own longest row."""
    assert sum(sizes) == len(rows)
    files, start = [], 0
    for number, size in enumerate(sizes):
        part = sf.SparseRows.from_dense(rows.to_dense()[start : start + size])
        part.save(folder / f"{number}.safetensors")
        files.append(folder / f"{number}.safetensors")
        start += size
    return files


def make_rows(count, dtype=torch.float32):
    x = torch.randn(count, NUM_COLS).relu() * (torch.rand(count, 1) > 0.2)
    x *= torch.arange(NUM_COLS) < torch.randint(NUM_COLS + 1, (count, 1))
    return sf.SparseRows.from_dense(x.to(dtype))


@pairwise(
    sizes=[[1], [23], [0], [0, 0], [5, 5, 3], [1, 1, 1, 20], [0, 7, 0, 1, 0]],
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    entries=[1, 2**20],
)
def test_joined_as_one_save(tmp_path, monkeypatch, dtype, sizes, entries):
    monkeypatch.setattr("splade_fast.search.join_files._ENTRIES_AT_A_TIME", entries)
    rows = make_rows(sum(sizes), dtype)
    rows.save(tmp_path / "expected")
    files = make_parts(tmp_path, rows, sizes)
    join_files(files, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "joined"]


def test_many_rows_as_one_save(tmp_path):
    # Longer numbers in the header change its padding.
    rows = sf.SparseRows.from_dense(torch.rand(3000, NUM_COLS))
    rows.save(tmp_path / "expected")
    join_files(make_parts(tmp_path, rows, [1000, 1999, 1]), tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "expected").read_bytes()


def test_empty_vectors_as_one_save(tmp_path):
    rows = sf.SparseRows.from_dense(torch.zeros(5, NUM_COLS))
    rows.save(tmp_path / "expected")
    join_files(make_parts(tmp_path, rows, [2, 3]), tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        sf.SparseRows.from_dense(torch.ones(2, NUM_COLS + 1)),
        sf.SparseRows.from_dense(torch.ones(2, NUM_COLS, dtype=torch.bfloat16)),
    ],
    ids=["num_cols", "dtype"],
)
def test_parts_that_differ_are_refused(tmp_path, other):
    files = make_parts(tmp_path, make_rows(3), [3])
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="other must hold .* as .*0.safetensors does, got"):
        join_files([*files, tmp_path / "other"], tmp_path / "joined")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "other"]


def test_damaged_parts_are_refused(tmp_path):
    files = make_parts(tmp_path, make_rows(6), [3, 3])
    files[1].write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="1.safetensors is damaged"):
        join_files(files, tmp_path / "joined")
    save_file({"weight": torch.ones(2)}, files[1])
    with pytest.raises(ValueError, match="1.safetensors is damaged: .*indices"):
        join_files(files, tmp_path / "joined")
    save_file({"indices": torch.ones(2)}, files[1])
    with pytest.raises(ValueError, match="1.safetensors is damaged: not enough values"):
        join_files(files, tmp_path / "joined")


def test_a_target_that_exists_is_refused(tmp_path):
    files = make_parts(tmp_path, make_rows(3), [3])
    (tmp_path / "joined").write_text("mine")
    with pytest.raises(FileExistsError, match="joined"):
        join_files(files, tmp_path / "joined")
    assert (tmp_path / "joined").read_text() == "mine"
    assert files[0].exists()
