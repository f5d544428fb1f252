"""Index folder of an encoded corpus: vectors, document ids and the settings of the encoding."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splade_fast._atomic_files import name_in_errors, new_folder
from splade_fast._checks import check_count
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.join_files import find_joined, join_files
from splade_fast.search.lines import check_ids

_FORMAT_VERSION = 1
_META_TYPES = {
    "model": (str,),
    "max_length": (int,),
    "k": (int, type(None)),
    "query_model": (str, type(None)),
}
_FINGERPRINTS = ("fingerprint", "query_fingerprint")
VECTORS = "vectors.safetensors"
SHARDS = "shards.json"  # of a folder that holds no index
_IDS, _META = "ids.json", "meta.json"
# Files that a model folder holds and an index lacks.
_MODEL_FILES = ("config.json", "modules.json", "adapter_config.json")


@dataclass
class IndexMeta:
    """Settings of the encoding, which queries for the index must share.

    Args:
        model: hub name or folder of the model.
        max_length: number of tokens kept of each text.
        k: largest number of entries of each document; None without a limit.
        format_version: version of the folder's format.
        fingerprint: fingerprint of the encoder of the documents; None in indexes that were written
            without one.
        query_model: hub name or folder of another model for the queries; None for `model`.
        query_fingerprint: fingerprint of the encoder of the queries; None if it is the encoder of
            the documents, or unknown.

    Raises:
        TypeError: a number is not an integer, or a name is not a path.
        ValueError: a number is less than 1.
    """

    model: str
    max_length: int
    k: int | None
    format_version: int = _FORMAT_VERSION
    fingerprint: Fingerprint | None = None
    query_model: str | None = None
    query_fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        # JSON takes neither paths nor integers of NumPy.
        self.model = os.fspath(self.model)
        self.max_length = check_count("max_length", self.max_length, 1)
        self.k = None if self.k is None else check_count("k", self.k, 1)
        self.query_model = None if self.query_model is None else os.fspath(self.query_model)


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
            OSError: the file system failed.
            TypeError: an id is not a str.
            ValueError: there is not one id for each vector, or an id is repeated.
        """
        if len(self.ids) != len(self.rows):
            raise ValueError(f"ids must be one per row, {len(self.rows)}, got {len(self.ids)}")
        check_ids("ids", self.ids)
        with new_folder(path) as folder:
            self.rows.save(folder / VECTORS)
            _write_description(folder, self.ids, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, should_check: bool = True) -> Index:
        """Read an index folder; the vectors are mapped into memory.

        Args:
            path: the folder.
            should_check: check the numbers of all vectors; False for those that are known to be as
                they were when somebody checked them.

        Raises:
            FileNotFoundError: there is no index at `path`.
            ValueError: a file is damaged, or the files do not fit together.
        """
        path = Path(path)
        for name in (VECTORS, _IDS, _META):
            if not (path / name).is_file():
                raise FileNotFoundError(f"no index at {path}: {_describe_lack(path, name)}")
        meta, ids = (_read_json(path / name) for name in (_META, _IDS))
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version != _FORMAT_VERSION:
            raise ValueError(f"{path} must have format version {_FORMAT_VERSION}, got {version}")
        if not isinstance(ids, list) or not all(isinstance(doc_id, str) for doc_id in ids):
            raise ValueError(f"{path / _IDS} is damaged: expected a list of ids")
        checked_meta = parse_meta(path / _META, meta)
        rows = SparseRows.load(path / VECTORS, should_check=should_check)
        if len(ids) != len(rows):
            raise ValueError(f"{path} must have one id per vector, got {len(ids)} for {len(rows)}")
        return cls(rows, ids, checked_meta)

    @property
    def num_cols(self) -> int:
        """Number of columns, V."""
        return self.rows.num_cols


def join_index(folder: Path, files: Sequence[Path], ids: list[str], meta: IndexMeta) -> None:
    """Write the index of all rows of several files, with the same bytes as `Index.save`.

    A call with the same arguments goes on where an interrupted one has stopped.

    Args:
        folder: a folder that no other index uses; made if it is missing.
        files: files of `SparseRows.save`; each is deleted once it is copied.
        ids: ids of the documents, one for each row.
        meta: settings of the encoding.

    Raises:
        OSError, ValueError: see `join_files`.
    """
    folder.mkdir(exist_ok=True)
    if not (folder / VECTORS).exists():
        join_files(files, folder / VECTORS)
    with name_in_errors(folder):
        _write_description(folder, ids, meta)


def find_joined_parts(folder: Path, files: Sequence[Path]) -> list[bool]:
    """Return whether an interrupted `join_index` has copied each file."""
    return find_joined(files, folder / VECTORS)


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds the configuration of a model."""
    return any((folder / name).is_file() for name in _MODEL_FILES)


def resolve_model(model: str | os.PathLike[str]) -> str:
    """Return the absolute path of a model folder, or a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else os.fspath(model)


def parse_meta(path: Path, content: dict[str, Any]) -> IndexMeta:
    """Return the settings that a file holds.

    Raises:
        ValueError: a setting is missing, unknown or of another type.
    """
    try:
        for name, kinds in _META_TYPES.items():
            if type(value := content.get(name)) not in kinds:
                raise TypeError(f"{name} cannot be {value!r}")
        prints = {
            name: Fingerprint.parse(content[name])
            for name in _FINGERPRINTS
            if content.get(name) is not None
        }
        return IndexMeta(**(content | prints))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _write_description(folder: Path, ids: list[str], meta: IndexMeta) -> None:
    (folder / _IDS).write_text(json.dumps(list(ids)), encoding="utf-8")
    (folder / _META).write_text(json.dumps(asdict(meta)), encoding="utf-8")


def _describe_lack(folder: Path, missing: str) -> str:
    if (folder / SHARDS).is_file():
        return "the folder holds shards, which `search` takes"
    return "the folder holds a model" if is_model_folder(folder) else f"{missing} is missing"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
