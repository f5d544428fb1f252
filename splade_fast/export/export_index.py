"""Export of an index folder in a format given by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

from splade_fast.encoders.pretrained import load_tokenizer
from splade_fast.encoders.settings import read_settings
from splade_fast.export import (
    write_anserini,
    write_bm25s,
    write_elasticsearch,
    write_npz,
    write_opensearch,
    write_parquet,
    write_qdrant,
    write_seismic,
)
from splade_fast.search.fingerprint import digest_vocabulary
from splade_fast.search.index import Index, IndexMeta
from splade_fast.search.lines import DataError, DataWarning

ExportFormat = Literal[
    "anserini", "bm25s", "elasticsearch", "npz", "opensearch", "parquet", "qdrant", "seismic"
]
EmptyDocuments = Literal["keep", "skip", "error"]
_WRITERS: dict[ExportFormat, Callable[..., int]] = {
    "anserini": write_anserini,
    "bm25s": write_bm25s,
    "elasticsearch": write_elasticsearch,
    "npz": write_npz,
    "opensearch": write_opensearch,
    "parquet": write_parquet,
    "qdrant": write_qdrant,
    "seismic": write_seismic,
}
_WITHOUT_TOKENS = ("npz", "parquet", "qdrant")


def export_index(
    index: Index,
    path: str | os.PathLike[str],
    file_format: ExportFormat,
    model: str | os.PathLike[str] | None = None,
    empty: EmptyDocuments = "keep",
    scale: float | None = None,
) -> int:
    """Write an index with the function of `splade_fast.export` for a format.

    Args:
        index: the index.
        path: folder to write; must not exist.
        file_format: name of the format.
        model: model whose tokenizer names the columns; by default the index's model. None for
            formats without names, npz, parquet and qdrant.
        empty: "keep", "skip" or "error" for documents without entries.
        scale: factor of Anserini's impacts, 100 by default; None for all other formats.

    Returns:
        Number of documents written.

    Raises:
        DataError: the index's own model has another vocabulary than when the index was made.
        OSError, TypeError, ValueError: see the function of the format; or there is no such model,
            or the format knows no `model` or `scale`.
    """
    if model is not None and file_format in _WITHOUT_TOKENS:
        raise ValueError(f"model must not be given for {file_format}, which names no columns")
    if scale is not None and file_format != "anserini":
        raise ValueError(f"scale must be given for anserini alone, got {scale} for {file_format}")
    options: dict[str, Any] = {"empty": empty}
    if file_format not in _WITHOUT_TOKENS:
        options["id_to_token"] = _read_tokens(index.meta, model)
    if scale is not None:
        options["scale"] = scale
    return _WRITERS[file_format](index.rows, path, index.ids, **options)


def _read_tokens(meta: IndexMeta, model: str | os.PathLike[str] | None) -> dict[int, str]:
    """Return {column: token} of a model's tokenizer, which may know fewer than the columns.

    Args:
        meta: settings of the index, whose model is the default.
        model: hub name or folder of another model.
    """
    name = os.fspath(model or meta.model)
    hub: dict[str, Any] = {"subfolder": read_settings(name, {}).subfolder}
    tokenizer = load_tokenizer(name, hub)
    if meta.fingerprint is not None and meta.fingerprint.vocabulary != digest_vocabulary(tokenizer):
        message = f"{name} must have the vocabulary that the index was made with, got another"
        if model is None:
            raise DataError(message)
        warnings.warn(message, DataWarning, stacklevel=3)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {column: token for token, column in vocabulary.items()}
