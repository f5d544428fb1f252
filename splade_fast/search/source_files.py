"""Files of texts, local or behind a URL: which a folder holds, and their bytes."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import quote

_HIDDEN = (".", "_")  # Spark and others write such names beside the data
_BUFFER_BYTES = 2**20
_IN_URLS = "/:?&=@%[]~+,"  # what quoting leaves; a blank of a name is quoted


class DataError(ValueError):
    """Error in a file of texts or judgements; the message names the line and the reason."""


def list_files(path: str | os.PathLike[str]) -> list[str]:
    """Return the files of a folder and of the folders in it by name, or the path of a file itself.

    Names that start with a dot or an underscore are left out.

    Args:
        path: file or folder, local or a URL of fsspec or pyarrow.

    Raises:
        DataError: the folder holds no file.
        ImportError: no installed package knows the scheme of the URL.
    """
    name, query = os.fspath(path), ""
    if _is_url(name):
        system, folder = _file_system(name)
        if not system.isdir(folder):
            return [name]
        name, mark, options = name.partition("?")
        query = mark + options
        found = system.find(folder)
    elif Path(name).is_dir():
        folder = Path(name).as_posix()
        found = [file.as_posix() for file in Path(name).rglob("*") if file.is_file()]
    else:
        return [name]
    depth = len(PurePosixPath(folder).parts)
    inner = sorted(PurePosixPath(file).parts[depth:] for file in found)
    shown = [parts for parts in inner if not any(part.startswith(_HIDDEN) for part in parts)]
    if not shown:
        raise DataError(f"{path} must hold files, got none")
    return ["/".join((name.rstrip("/"), *parts)) + query for parts in shown]


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file, local or behind a URL, for reading.

    Raises:
        DataError: there is no such file, or it is a folder.
        OSError: the file may not be read.
        ImportError: no installed package knows the scheme of the URL.
    """
    if not _is_url(path):
        check_readable(path)
        return Path(path).open("rb")
    system, name = _file_system(os.fspath(path))
    try:
        return cast(BinaryIO, io.BufferedReader(system.open(name, "rb"), _BUFFER_BYTES))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None


def file_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a file in lower case, without its folders and the options of its URL."""
    name = os.fspath(path)
    return PurePosixPath(name.partition("?")[0] if _is_url(name) else name).name.lower()


def check_readable(path: str | os.PathLike[str]) -> None:
    """Check that a local path is a file, pipe or device.

    Raises:
        DataError: there is none, or it is a folder.
        OSError: the file system refuses to tell.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no such file: {path}") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} must be a file, got a folder")


def check_rereadable(path: str | os.PathLike[str]) -> None:
    """Check that a path is a file that can be read several times.

    Raises:
        DataError, OSError: see `check_readable`, or it is a pipe or device.
    """
    if _is_url(path):
        return
    check_readable(path)
    if not Path(path).is_file():
        raise DataError(
            f"{path} must be a file, since it is read several times, got a pipe or device"
        )


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, of fsspec or else of pyarrow, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return cast(tuple[Any, str], url_to_fs(url))
    except (ImportError, ValueError) as error:  # fsspec lacks a package, or the scheme
        try:
            from fsspec.implementations.arrow import ArrowFSWrapper
            from pyarrow.fs import FileSystem

            system, path = FileSystem.from_uri(quote(url, safe=_IN_URLS))
        except (ImportError, ValueError):
            raise ImportError(f"cannot read {url}: {error}") from error
        return ArrowFSWrapper(system), path
