"""Index folder of an encoded corpus: vectors, document ids and the settings of the encoding."""

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
    """Settings of the encoding, which queries for the index must share.

    Args:
        model: hub name or folder of the model.
        max_length: number of tokens kept of each text.
        k: largest number of entries of each document; None without a limit.
        format_version: version of the folder's format.
    """

    model: str
    max_length: int
    k: int | None
    format_version: int = _FORMAT_VERSION


@dataclass
class Index:
    """Document vectors (N, V), the N ids of the documents, and the settings of the encoding."""

    rows: SparseRows
    ids: list[str]
    meta: IndexMeta

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`, which appears complete or not at all.

        Raises:
            FileExistsError: `path` exists.
        """
        with new_folder(path) as folder:
            self.rows.save(folder / _VECTORS)
            _write_description(folder, self.ids, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Index:
        """Read an index folder; the vectors are mapped into memory.

        Raises:
            FileNotFoundError: there is no index at `path`.
            ValueError: a file is damaged, or the files do not fit together.
        """
        path = Path(path)
        for name in (_VECTORS, _IDS, _META):
            if not (path / name).is_file():
                raise FileNotFoundError(f"no index at {path}: {name} is missing")
        meta, ids = (_read_json(path / name) for name in (_META, _IDS))
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version != _FORMAT_VERSION:
            raise ValueError(f"{path} must have format version {_FORMAT_VERSION}, got {version}")
        if not isinstance(ids, list) or not all(isinstance(doc_id, str) for doc_id in ids):
            raise ValueError(f"{path / _IDS} is damaged: expected a list of ids")
        try:
            checked_meta = IndexMeta(**meta)
        except TypeError as error:
            raise ValueError(f"{path / _META} is damaged: {error}") from error
        for name, kinds in _META_TYPES.items():
            if type(value := getattr(checked_meta, name)) not in kinds:
                raise ValueError(f"{path / _META} is damaged: {name} cannot be {value!r}")
        rows = SparseRows.load(path / _VECTORS)
        if len(ids) != len(rows):
            raise ValueError(f"{path} must have one id per vector, got {len(ids)} for {len(rows)}")
        return cls(rows, ids, checked_meta)


def join_index(folder: Path, files: Sequence[Path], ids: list[str], meta: IndexMeta) -> None:
    """Write the index of all rows of several files, with the same bytes as `Index.save`.

    Args:
        folder: an existing folder without an index.
        files: files of `SparseRows.save`; each is deleted once it is copied.
        ids: ids of the documents, one for each row.
        meta: settings of the encoding.

    Raises:
        OSError, ValueError: see `join_files`.
    """
    join_files(files, folder / _VECTORS)
    _write_description(folder, ids, meta)


def resolve_model(model: str | os.PathLike[str]) -> str:
    """Return the absolute path of a model folder, or a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else os.fspath(model)


def _write_description(folder: Path, ids: list[str], meta: IndexMeta) -> None:
    (folder / _IDS).write_text(json.dumps(ids), encoding="utf-8")
    (folder / _META).write_text(json.dumps(asdict(meta)), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
