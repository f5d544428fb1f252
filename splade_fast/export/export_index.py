"""Export of an index folder in a format given by name."""

from __future__ import annotations

import os
import warnings
from typing import Any

from splade_fast.encoders.pretrained import load_tokenizer
from splade_fast.encoders.settings import read_settings
from splade_fast.encoders.token_names import name_tokens
from splade_fast.export.formats import FORMATS, EmptyDocuments, ExportFormat, make_options
from splade_fast.search.fingerprint import digest_vocabulary
from splade_fast.search.index import Index, IndexMeta
from splade_fast.search.lines import DataError, DataWarning


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
    chosen = FORMATS[file_format]
    refuse_model(model, file_format, has_tokens=chosen.has_tokens)
    options = make_options(file_format, empty, scale)
    if chosen.has_tokens:
        options["id_to_token"] = read_tokens(index.meta, model)
    return chosen.write(index.rows, path, index.ids, **options)


def refuse_model(
    model: str | os.PathLike[str] | None, file_format: str, *, has_tokens: bool
) -> None:
    """Raise ValueError for the model of a format that names no columns."""
    if model is not None and not has_tokens:
        raise ValueError(f"model must not be given for {file_format}, which names no columns")


def read_tokens(meta: IndexMeta, model: str | os.PathLike[str] | None) -> dict[int, str]:
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
    return name_tokens(tokenizer)
