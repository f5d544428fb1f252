"""Reading of index files: any bytes either load as a consistent index or raise a clear error."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

import splade_fast as sf
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import Index, IndexMeta

INDEX_FILES = ("meta.json", "ids.json", "vectors.safetensors")


def sound_file(rows: int = 3, num_cols: int = 9) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        _sound_rows(rows, num_cols).save(path)
        return path.read_bytes()


def sound_index() -> dict[str, bytes]:
    """Return the files of an index."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        fingerprint = Fingerprint("float32", "00", "11", "22")
        meta = IndexMeta("model", 256, None, fingerprint=fingerprint, query_model="queries")
        Index(_sound_rows(3, 9), ["a", "b", "c"], meta).save(path)
        return {name: (path / name).read_bytes() for name in INDEX_FILES}


def _sound_rows(rows: int, num_cols: int) -> sf.SparseRows:
    return sf.SparseRows.from_dense(torch.arange(rows * num_cols).view(rows, num_cols) % 4 / 2)


def build_file(tensors: dict[str, torch.Tensor], header: object) -> bytes:
    """Return a well-formed safetensors file with given content."""
    text = header if isinstance(header, str) else json.dumps(header)
    return save(tensors, metadata={"sparse_rows": text})


def load_or_refuse(content: bytes) -> sf.SparseRows | None:
    """Return the rows, or None if they are refused with a message that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        path.write_bytes(content)
        try:
            rows = sf.SparseRows.load(path)
        except ValueError as error:
            if str(path) not in str(error):
                raise
            return None
        rows.check_contents()
        assert sf.sparse_scores(rows, rows).shape == (len(rows), len(rows))
        assert len(rows.to_dicts()) == len(rows)
        return rows


def load_index_or_refuse(files: dict[str, bytes]) -> Index | None:
    """Return the index, or None if it is refused with a message that names the folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            loaded = Index.load(folder)
        except ValueError as error:
            if folder not in str(error):
                raise
            return None
        assert len(loaded.ids) == len(loaded.rows)
        meta = loaded.meta
        assert isinstance(meta.model, str)
        assert isinstance(meta.max_length, int)
        assert meta.k is None or isinstance(meta.k, int)
        assert meta.fingerprint is None or isinstance(meta.fingerprint, Fingerprint)
        return loaded
