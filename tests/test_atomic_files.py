import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splade_fast import _atomic_files
from splade_fast._atomic_files import new_folder, whole_file, whole_folder
from splade_fast.negative_cache.checkpoint import save_sharded
from splade_fast.ops.sparse_rows import SparseRows
from tests.new_process import fork_server


def write_tensors(path):
    save_file({"weight": torch.ones(2)}, path)


def write_half(path):
    path.write_text("half")
    raise OSError("disk full")


def save_in_a_folder(path):
    with whole_folder(path.parent) as folder:
        write_tensors(folder / path.name)


@pytest.mark.skipif(os.name != "posix", reason="the permissions are those of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("rows.safetensors", SparseRows.from_dense(torch.ones(2, 2)).save),
        ("model.safetensors", save_in_a_folder),
        (
            "shard-00000-of-00001.safetensors",
            lambda path: save_sharded(torch.nn.Linear(2, 2), path.parent),
        ),
    ],
)
def test_files_have_the_permissions_of_any_new_file(tmp_path, temporary_kind, name, save, mask):
    """Whoever may read other new files may read an index or a model."""
    before = os.umask(mask)
    try:
        save(tmp_path / name)
        (tmp_path / "another").touch()
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes == {name: modes["another"], "another": modes["another"]}


@pytest.fixture(params=["unnamed", "named", "without /proc"])
def temporary_kind(request, monkeypatch):
    """Kind of the temporary files of the test."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE")
    elif request.param == "without /proc":
        monkeypatch.setattr(_atomic_files, "_path_of", lambda _: Path("/missing"))
    return request.param


def test_a_file_appears_at_the_end(tmp_path, temporary_kind):
    path = tmp_path / "some.txt"
    for content in ("first", "second"):  # a new file, and another in its place
        before = path.read_text() if path.exists() else None
        with whole_file(path) as temporary:
            temporary.write_text(content)
            assert (path.read_text() if path.exists() else None) == before
            assert temporary.name.isdecimal() == (temporary_kind == "unnamed")
        assert path.read_text() == content
        assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_the_file(tmp_path, temporary_kind):
    path = tmp_path / "some.txt"
    path.mkdir()
    with pytest.raises(IsADirectoryError), whole_file(path) as temporary:
        temporary.touch()
    assert list(tmp_path.iterdir()) == [path]


def write_and_die(path):
    with whole_file(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_program_leaves_nothing(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("before")
    process = fork_server().Process(target=write_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was(tmp_path, temporary_kind):
    path = tmp_path / "some.txt"
    path.write_text("before")
    with pytest.raises(OSError, match="disk full"), whole_file(path) as temporary:
        write_half(temporary)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "some"
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"), whole_folder(folder) as temporary:
            write_half(temporary / "half")
        assert not (folder / "half").exists()
        folder.mkdir(exist_ok=True)
    assert list(folder.iterdir()) == []


def test_a_new_folder_must_not_exist(tmp_path):
    with pytest.raises(FileExistsError, match="must not exist yet"), new_folder(tmp_path):
        pass
