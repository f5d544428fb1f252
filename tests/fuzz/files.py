"""Reading index files: whatever the bytes, they load whole and sound, or a clear error says why."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

import splade_fast as sf


def sound_file(rows: int = 3, num_cols: int = 9) -> bytes:
    dense = torch.arange(rows * num_cols).view(rows, num_cols) % 4 / 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        sf.SparseRows.from_dense(dense).save(path)
        return path.read_bytes()


def file_of(tensors: dict[str, torch.Tensor], header: object) -> bytes:
    """A well-formed safetensors file of any content."""
    text = header if isinstance(header, str) else json.dumps(header)
    return save(tensors, metadata={"sparse_rows": text})


def load_or_refuse(content: bytes) -> sf.SparseRows | None:
    """None: refused, with a message that names the file."""
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
