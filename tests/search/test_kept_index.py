"""KeptIndex: the search index in an index folder is built once, and again for other vectors."""

import os
import re
import shutil
import signal
import threading

import pytest
import torch

import splade_fast as sf
from splade_fast.search import kept_index
from splade_fast.search.index import Index, IndexMeta
from splade_fast.search.kept_index import KeptIndex
from splade_fast.search.lines import DataWarning
from splade_fast.search.sparse_index import sparse_index
from tests.new_process import fork_server

FILES = {"vectors.safetensors", "ids.json", "meta.json"}
KEPT_FILES = FILES | {"search.safetensors", "search.json"}


def draw_rows(seed, count=40):
    dense = torch.rand(count, 12, generator=torch.Generator().manual_seed(seed))
    return sf.SparseRows.from_dense(dense.where(dense > 0.6, 0.0))


QUERIES = draw_rows(99, 3)


@pytest.fixture
def folder(tmp_path):
    rows = draw_rows(0)
    Index(rows, [f"d{i}" for i in range(len(rows))], IndexMeta("model", 8, None)).save(
        tmp_path / "index"
    )
    return tmp_path / "index"


@pytest.fixture
def builds(monkeypatch):
    """List that grows with each build."""
    found = []
    build = sf.SparseIndex.build

    def count(rows, **options):
        found.append(len(rows))
        return build(rows, **options)

    monkeypatch.setattr(sf.SparseIndex, "build", count)
    return found


def search(folder):
    """Search as a new process would, compare with a scan, and return the names of the files."""
    kept = KeptIndex(folder)
    found, expected = kept.search(QUERIES, 7), sf.sparse_search(QUERIES, kept.index.rows, 7)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    return {path.name for path in folder.iterdir()}


def test_the_first_search_builds_and_later_ones_load(folder, builds, monkeypatch):
    assert search(folder) == KEPT_FILES
    assert builds == [40]

    def check_again(*_):
        raise AssertionError("a whole file is checked at each load")

    monkeypatch.setattr(sf.SparseRows, "check_contents", check_again)
    monkeypatch.setattr(kept_index, "_digest", check_again)
    assert search(folder) == KEPT_FILES
    assert builds == [40]


def test_other_vectors_are_indexed_again(folder, builds):
    search(folder)
    for seed in (1, 2):  # of about the same size
        draw_rows(seed).save(folder / "vectors.safetensors")
        assert search(folder) == KEPT_FILES
    assert len(builds) == 3


@pytest.mark.parametrize("has_index", [False, True])
def test_vectors_that_are_replaced_while_they_are_searched(folder, builds, has_index):
    if has_index:
        search(folder)
    kept, rows = KeptIndex(folder), draw_rows(0)
    draw_rows(1).save(folder / "vectors.safetensors")
    assert torch.equal(kept.search(QUERIES, 7)[1], sf.sparse_search(QUERIES, rows, 7)[1])
    assert search(folder) == KEPT_FILES


def test_a_copied_folder_keeps_its_index(folder, builds, monkeypatch):
    search(folder)
    shutil.copytree(folder, copy := folder.parent / "copy", copy_function=shutil.copyfile)
    assert search(copy) == KEPT_FILES
    monkeypatch.setattr(kept_index, "_digest", None)  # the copy was stamped
    assert search(copy) == KEPT_FILES
    assert builds == [40]


@pytest.mark.parametrize("name", ["search.safetensors", "search.json"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b'{"search.safetensors": 1}', b"\xff"]
)
def test_damaged_files_are_replaced(folder, builds, name, content):
    search(folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert search(folder) == KEPT_FILES
    assert len(builds) == 2


def test_a_file_with_the_stamps_of_another_format_is_replaced(folder, builds, monkeypatch):
    monkeypatch.setattr(sf.SparseIndex, "save", lambda self, path: QUERIES.save(path))
    search(folder)
    monkeypatch.undo()
    assert search(folder) == KEPT_FILES


def test_a_folder_that_cannot_be_written_is_scanned(folder, builds, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(kept_index, "whole_file", refuse)
    message = f"{re.escape(str(folder))} is scanned, since it cannot be written: .*denied"
    with pytest.warns(DataWarning, match=message):
        assert search(folder) == FILES
    assert builds == []


def test_a_full_disk(folder, builds, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("splade_fast._tensor_files.map_bytes", fail)
    message = f"{re.escape(str(folder))} is scanned, since it cannot be written: .*No space left"
    with pytest.warns(DataWarning, match=message):
        assert search(folder) == FILES
    monkeypatch.undo()
    monkeypatch.setattr(KeptIndex, "_take_stamps", fail)
    with pytest.warns(DataWarning, match="builds its search index each time, since it cannot be"):
        assert search(folder) == FILES | {"search.safetensors"}


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_documents_and_queries_without_bounds_are_scanned(folder, builds, value):
    queries = draw_rows(99, 3)
    queries.values[0, 0] = value
    found, expected = (
        KeptIndex(folder).search(queries, 7),
        sf.sparse_search(queries, draw_rows(0), 7),
    )
    assert torch.equal(found[1], expected[1])
    rows = draw_rows(0)
    rows.values[5, 0] = value
    rows.save(folder / "vectors.safetensors")
    with pytest.warns(DataWarning, match="SparseIndex takes values that are finite and at least 0"):
        found = KeptIndex(folder).search(QUERIES, 7)
    assert torch.equal(found[1], sf.sparse_search(QUERIES, rows, 7)[1])
    assert builds == []


def test_one_of_several_builds(folder, builds):
    threads = [threading.Thread(target=search, args=(folder,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [40]
    assert search(folder) == KEPT_FILES


def _search_and_die(folder, has_unnamed_files):
    if not has_unnamed_files:
        del os.O_TMPFILE
    sparse_index._Build.fill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    search(folder)


@pytest.mark.parametrize("has_unnamed_files", [True, False])
def test_a_killed_build_leaves_nothing_to_later_searches(folder, builds, has_unnamed_files):
    process = fork_server().Process(target=_search_and_die, args=(folder, has_unnamed_files))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in folder.iterdir()} - FILES
    assert len(left) == (0 if has_unnamed_files else 2), left
    assert search(folder) == KEPT_FILES
    assert builds == [40]


def test_a_file_system_without_locks(folder, builds, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(kept_index.fcntl, "flock", refuse)
    assert search(folder) == KEPT_FILES
    assert builds == [40]
