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
    """Yield a temporary file to write to, and give it the name `path` at the end of the block.

    An error in the block leaves `path` unchanged. Where the file system has files without names,
    the temporary one has none, and a program that is killed leaves nothing behind. It must be
    written in place: no other file can be renamed to it.

    Args:
        path: the file, in an existing folder.
    """
    path = Path(path)
    handle = _open_unnamed_file(path.parent)
    temporary = _named_file(path) if handle is None else _unnamed_file(path, handle)
    with name_in_errors(path):
        with temporary as file:
            yield file
        flush_folder(path.parent)


def _open_unnamed_file(folder: Path) -> int | None:
    """Open a new file without a name, or return None where a folder cannot hold one."""
    try:
        handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, _READ_WRITE)
    except (AttributeError, OSError):  # another system than Linux, or another file system
        return None
    if _path_of(handle).exists():
        return handle
    os.close(handle)  # /proc is missing
    return None


def _path_of(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}")


@contextmanager
def _unnamed_file(path: Path, handle: int) -> Iterator[Path]:
    """Yield the path of an open file without a name, and name it `path`."""
    try:
        yield _path_of(handle)
        os.fsync(handle)
        try:
            _name_file(handle, path)
        except FileExistsError:  # only a rename replaces a file
            temporary = _partial_file(path)
            _name_file(handle, temporary)
            try:
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _name_file(handle: int, path: Path) -> None:
    # Python follows the link to the open file only if a folder is given, which has no effect here.
    os.link(_path_of(handle), path, src_dir_fd=handle, follow_symlinks=True)


@contextmanager
def _named_file(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, and rename it to `path`."""
    temporary = _partial_file(path)
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode & _READ_WRITE
    try:
        yield temporary
        _finish_file(temporary, permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _partial_file(path: Path) -> Path:
    # A random name, since another program may write the same file.
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"


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
