import os

import pytest
import torch
from safetensors.torch import save_file

from splade_fast._atomic_files import new_folder, whole_file, whole_folder
from splade_fast.negative_cache.checkpoint import save_sharded
from splade_fast.ops.sparse_rows import SparseRows


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
def test_files_have_the_permissions_of_any_new_file(tmp_path, name, save, mask):
    """Whoever may read other new files may read an index or a model."""
    before = os.umask(mask)
    try:
        save(tmp_path / name)
        (tmp_path / "another").touch()
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes == {name: modes["another"], "another": modes["another"]}


def test_an_error_leaves_the_file_as_it_was(tmp_path):
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
