"""Files and folders of texts, local and behind URLs."""

import fsspec
import pytest

from splade_fast.search.source_files import list_files, open_file
from splade_fast.search.texts import DataError, read_texts

NAMES = ["b.tsv", "a/z.tsv", "a/c d.tsv", "_SUCCESS", ".hidden.tsv", "a/.crc/x.tsv", "_old/y.tsv"]
SHOWN = ["a/c d.tsv", "a/z.tsv", "b.tsv"]


def write_folder(system, folder):
    for name in NAMES:
        parent, _, _ = f"{folder}/{name}".rpartition("/")
        system.makedirs(parent, exist_ok=True)
        system.pipe_file(f"{folder}/{name}", f"{name}\tquick fox of {name}\n".encode())


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/corpus", recursive=True)


def check_texts(path):
    found = read_texts(path)
    assert found.ids == SHOWN
    assert found.texts == [f"quick fox of {name}" for name in SHOWN]


def test_a_folder_stands_for_its_files_by_name(tmp_path):
    write_folder(fsspec.filesystem("file"), tmp_path / ".parent" / "corpus")
    folder = tmp_path / ".parent" / "corpus"
    assert list_files(folder) == [str(folder / name) for name in SHOWN]
    check_texts(folder)
    check_texts(f"{folder}/")
    check_texts(f"file://{folder}")


def test_a_folder_behind_a_url(memory):
    write_folder(memory, "/corpus")
    assert list_files("memory://corpus") == [f"memory://corpus/{name}" for name in SHOWN]
    check_texts("memory://corpus/")
    assert read_texts("memory://corpus/b.tsv").ids == ["b.tsv"]


def test_pyarrow_reads_where_fsspec_lacks_a_package(tmp_path, monkeypatch):
    def lack(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", lack)
    write_folder(fsspec.filesystem("file"), tmp_path / "corpus")
    check_texts(f"file://{tmp_path}/corpus")
    with pytest.raises(DataError, match="no such file: file:///missing.tsv"):
        open_file("file:///missing.tsv")
    with pytest.raises(ImportError, match="cannot read unknown://corpus: Install s3fs"):
        list_files("unknown://corpus")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_folders_without_files_and_missing_files(tmp_path, prefix):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty must hold files, got none"):
        list_files(f"{prefix}{tmp_path}/empty")
    missing = f"{prefix}{tmp_path}/missing.tsv"
    assert list_files(missing) == [missing]
    with pytest.raises(DataError, match=f"no such file: {missing}"):
        open_file(missing)
