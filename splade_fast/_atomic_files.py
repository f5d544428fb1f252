"""Folders and files that appear complete or not at all, even if the program is killed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Files that say which weights a model folder holds. An old one that a newer save does not replace
# would contradict the new weights.
_WEIGHT_FILES = (
    "config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
)

_READ_WRITE = 0o666  # default permissions, before the user's mask


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to write to, and rename it to `path` at the end of the block.

    If `path` exists, the new files are moved there one by one, each atomically. Other files stay,
    except for an earlier model's weights. An error in the block leaves `path` unchanged.

    Args:
        path: the folder; missing parents are made.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    folder = Path(path).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{path} must be a folder, got a file")
    temporary = partial_folder(path)
    parent = temporary.parent
    parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a program that was killed
    temporary.mkdir()
    try:
        with name_in_errors(path):
            yield temporary
            finish_files(temporary)
            if folder.exists():
                _move_files(temporary, folder)
            else:
                temporary.rename(folder)
            flush_folder(parent)
    finally:
        remove_folder(temporary)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder as `whole_folder` does, for a folder that does not exist yet.

    Raises:
        FileExistsError: `path` exists.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} must not exist yet")
    with whole_folder(path) as folder:
        yield folder


def partial_folder(path: str | os.PathLike[str]) -> Path:
    """Return the temporary folder of `whole_folder`, so that other processes can write to it."""
    folder = Path(path).resolve()
    # An existing folder may be a mount point, and files can only be renamed within a file system.
    parent = folder if folder.exists() else folder.parent
    return parent / f".{folder.name}.partial"


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file to write to, and rename it to `path` at the end of the block.

    An error in the block leaves `path` unchanged.

    Args:
        path: the file, in an existing folder.
    """
    path = Path(path)
    # A random name, since another program may write the same file.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode & _READ_WRITE
    try:
        with name_in_errors(path):
            yield temporary
            _finish_file(temporary, permissions)
            os.replace(temporary, path)
            flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add `path` to an error of the system inside the block that names no file.

    A write to an open file does not, for example on a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def finish_files(folder: Path) -> None:
    """Give all files of a folder default permissions, and flush them to disk."""
    permissions = folder.stat().st_mode & _READ_WRITE
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _finish_file(path, permissions)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish_file(path: Path, permissions: int) -> None:
    path.chmod(permissions)  # safetensors 0.8 makes files that only their owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists, even if a signal handler raises in the middle."""
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
        for pattern in _WEIGHT_FILES:
            for stale in (target / folder).glob(pattern):
                if stale.relative_to(target) not in files:
                    stale.unlink()
