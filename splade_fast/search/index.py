"""An encoded corpus in a folder: vectors, document ids and how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splade_fast._atomic_files import new_folder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.join_files import join_files

_FORMAT_VERSION = 1
_META_TYPES = {"model": (str,), "max_length": (int,), "k": (int, type(None))}
_VECTORS, _IDS, _META = "vectors.safetensors", "ids.json", "meta.json"


@dataclass
class IndexMeta:
    """What has to be the same when queries are encoded for this index."""

    model: str
    max_length: int
    k: int | None
    format_version: int = _FORMAT_VERSION


@dataclass
class Index:
    """N document vectors, the id of each, and how they were made."""

    rows: SparseRows
    ids: list[str]
    meta: IndexMeta

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`; it appears complete or not at all.

        Raises:
            FileExistsError: `path` exists already.
        """
        with new_folder(path) as folder:
            self.rows.save(folder / _VECTORS)
            _write_description(folder, self.ids, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Index:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no index at `path`.
            ValueError: its parts do not fit together.
        """
        path = Path(path)
        for name in (_VECTORS, _IDS, _META):
            if not (path / name).is_file():
                raise FileNotFoundError(f"no index at {path}: {name} is missing")
        meta, ids = (_json_of(path / name) for name in (_META, _IDS))
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version != _FORMAT_VERSION:
            raise ValueError(f"{path} must have format version {_FORMAT_VERSION}, got {version}")
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
            raise ValueError(f"{path / _IDS} is damaged: expected a list of ids")
        try:
            described = IndexMeta(**meta)
        except TypeError as error:
            raise ValueError(f"{path / _META} is damaged: {error}") from error
        for name, kinds in _META_TYPES.items():
            if type(value := getattr(described, name)) not in kinds:
                raise ValueError(f"{path / _META} is damaged: {name} cannot be {value!r}")
        rows = SparseRows.load(path / _VECTORS)
        if len(ids) != len(rows):
            raise ValueError(f"{path} must have one id per vector, got {len(ids)} for {len(rows)}")
        return cls(rows, ids, described)


def join_index(folder: Path, pieces: Sequence[Path], ids: list[str], meta: IndexMeta) -> None:
    """Write into `folder` what `Index.save` would of all rows of the pieces, to the byte.

    Args:
        folder: exists, and has nothing of an index in it.
        pieces: files of `SparseRows.save`, deleted one by one as they are copied.
        ids: one for each row.
        meta: how the rows were made.

    Raises:
        OSError, ValueError: as `join_files`.
    """
    join_files(pieces, folder / _VECTORS)
    _write_description(folder, ids, meta)


def lasting_name(model: str | os.PathLike[str]) -> str:
    """A hub name as it is, a folder by its full path: the index may be searched from elsewhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else os.fspath(model)


def _write_description(folder: Path, ids: list[str], meta: IndexMeta) -> None:
    (folder / _IDS).write_text(json.dumps(ids), encoding="utf-8")
    (folder / _META).write_text(json.dumps(asdict(meta)), encoding="utf-8")


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
