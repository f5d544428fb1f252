"""Folders and files that appear whole or not at all, whatever ends the program that writes them."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What says which weights a model folder holds: one that a newer save lacks would contradict it.
_DESCRIBE_WEIGHTS = (
    "config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
)

_READ_WRITE = 0o666  # what a program asks for; the user's mask takes some of it away


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write to, which becomes `path` when the block is through.

    A folder that is already there gets the new files one by one, each in one step, and keeps what
    it has beside them; of a model's weights it keeps none. An error in the block, a full disk among
    them, leaves `path` as it was.

    Args:
        path: the folder; those above it are made.

    Raises:
        NotADirectoryError: path is a file.
    """
    folder = Path(path).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{path} must be a folder, got a file")
    temporary = partial_folder(path)
    parent = temporary.parent
    parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a program that was killed
    temporary.mkdir()
    try:
        yield temporary
        finish_files(temporary)
        if folder.exists():
            _move_files(temporary, folder)
        else:
            temporary.rename(folder)
        flush_folder(parent)
    finally:
        _remove(temporary)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `whole_folder`, for a folder that is not there yet.

    Raises:
        FileExistsError: it is.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} must not exist yet")
    with whole_folder(path) as folder:
        yield folder


def partial_folder(path: str | os.PathLike[str]) -> Path:
    """The temporary folder of `whole_folder`, which other processes may write to as well."""
    folder = Path(path).resolve()
    # Inside a folder that is there: what is beside it may be another file system.
    parent = folder if folder.exists() else folder.parent
    return parent / f".{folder.name}.partial"


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file to write, which becomes `path` when the block is through.

    An error in the block leaves `path` as it was.

    Args:
        path: the file, in a folder that is there.
    """
    path = Path(path)
    # A name of its own: another program may be writing the same file.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode & _READ_WRITE
    try:
        yield temporary
        _finish_file(temporary, permissions)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def finish_files(folder: Path) -> None:
    """Give the files of a new folder the permissions of any new file, and flush them.

    They would survive a loss of power then.
    """
    permissions = folder.stat().st_mode & _READ_WRITE
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _finish_file(path, permissions)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Wait until the names in the folder would survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish_file(path: Path, permissions: int) -> None:
    path.chmod(permissions)  # safetensors 0.8 writes for the owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Remove the folder even if a signal, whose handler raises, comes in the middle."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    for folder in {file.parent for file in files}:
        for pattern in _DESCRIBE_WEIGHTS:
            for stale in (target / folder).glob(pattern):
                if stale.relative_to(target) not in files:
                    stale.unlink()
