"""Reading of index files: any bytes either load as a consistent index or raise a clear error."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

import splade_fast as sf
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import Index, IndexMeta

_MAX_COLS = 2**20  # of a damaged index that is searched
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


def sound_search_file(rows: int = 40, num_cols: int = 3) -> bytes:
    """Return the file of a SparseIndex, which has entries with lists and with bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.safetensors"
        index = sf.SparseIndex.build(_sound_rows(rows, num_cols), show_progress=False)
        index.save(path)
        return path.read_bytes()


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


def load_search_file_or_refuse(content: bytes) -> sf.SparseIndex | None:
    """Return a SparseIndex that finds what its postings say, or None if its file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.safetensors"
        path.write_bytes(content)
        _search_without_check(path)
        try:
            index = sf.SparseIndex.load(path)
        except ValueError as error:
            if str(path) not in str(error):
                raise
            return None
        documents = _documents_of_search_file(path)
        queries = sf.SparseRows.from_dense(torch.rand(2, index.num_cols).to(index.dtype))
        found = index.search(queries, 5)
        expected = sf.sparse_search(queries, documents, 5)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        return index


def _search_without_check(path: Path) -> None:
    """Any numbers may give wrong results or an error, but no access outside the file."""
    with contextlib.suppress(ValueError, RuntimeError):
        index = sf.SparseIndex.load(path, should_check=False)
        if index.num_cols < _MAX_COLS:
            index.search(torch.ones(2, index.num_cols, dtype=index.dtype), 5)


def _documents_of_search_file(path: Path) -> sf.SparseRows:
    """Read the postings one by one, as docs/search.md describes them."""
    tensors = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    starts, num_cols = tensors["start"], len(tensors["step"])
    documents: list[dict[int, float]] = [{} for _ in tensors["id"]]
    for column in range(num_cols):
        for entry in range(tensors["term_start"][column], tensors["term_start"][column + 1]):
            postings = slice(starts[entry], starts[entry + 1])
            places = tensors["document"][postings]
            if len(places) >= 32:
                places = [place for place in range(256) if places[place // 8] >> (place % 8) & 1]
            for place, value in zip(places, tensors["value"][postings], strict=True):
                number = tensors["id"][256 * tensors["group"][entry] + place]
                documents[number][column] = value
    dtype = load_file(path)["value"].dtype
    return sf.SparseRows.from_dicts(documents, num_cols=num_cols, dtype=dtype)


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
