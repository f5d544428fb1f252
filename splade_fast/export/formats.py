"""Formats of exports by name, and what a program must know to write one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from splade_fast.export import (
    anserini,
    qdrant,
    search_engine,
    write_anserini,
    write_bm25s,
    write_elasticsearch,
    write_npz,
    write_opensearch,
    write_parquet,
    write_qdrant,
    write_seismic,
)
from splade_fast.export._ids import plain_ids

ExportFormat = Literal[
    "anserini", "bm25s", "elasticsearch", "npz", "opensearch", "parquet", "qdrant", "seismic"
]
EmptyDocuments = Literal["keep", "skip", "error"]


@dataclass(frozen=True)
class Format:
    """Format of an export.

    Args:
        write: function of rows, the folder to write, ids and options.
        has_tokens: whether its files name the columns.
        has_scale: whether it stores integers, which weights are scaled to.
        texts: what its function does with a text of each document: its argument for texts or for
            payloads, or None if it takes neither.
        shared: names of the files that are the same for all rows.
        is_splittable: whether several files may each hold some of the rows.
        id_rules: rules for ids, see `splade_fast.export._ids.plain_ids`.
    """

    write: Callable[..., int]
    has_tokens: bool = True
    has_scale: bool = False
    texts: Literal["texts", "payloads"] | None = None
    shared: Collection[str] = ()
    is_splittable: bool = True
    id_rules: Mapping[str, Any] = field(default_factory=dict)

    def store_texts(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the argument of `write` that stores a text of each document."""
        if self.texts == "payloads":
            return {"payloads": [{"text": text} for text in texts]}
        return {"texts": texts}

    def check_ids(self, ids: Sequence[str]) -> None:
        """Check ids of documents, of which each part of an export sees only its own.

        Raises:
            TypeError, ValueError: the format cannot hold an id, or two are stored as the same.
        """
        plain_ids(ids, len(ids), **self.id_rules)


_ENGINE: dict[str, Any] = {
    "texts": "payloads",
    "shared": ("mapping.json",),
    "id_rules": search_engine.ID_RULES,
}
FORMATS: dict[ExportFormat, Format] = {
    "anserini": Format(write_anserini, has_scale=True, texts="texts", id_rules=anserini.ID_RULES),
    "bm25s": Format(write_bm25s, is_splittable=False),
    "elasticsearch": Format(write_elasticsearch, **_ENGINE),
    "npz": Format(write_npz, has_tokens=False),
    "opensearch": Format(write_opensearch, **_ENGINE),
    "parquet": Format(write_parquet, has_tokens=False, texts="texts"),
    "qdrant": Format(write_qdrant, has_tokens=False, texts="payloads", id_rules=qdrant.ID_RULES),
    "seismic": Format(write_seismic, texts="texts"),
}


def make_options(
    file_format: ExportFormat, empty: EmptyDocuments, scale: float | None
) -> dict[str, Any]:
    """Return the options of a format's function, but for the names of columns.

    Raises:
        TypeError: `scale` is not a number.
        ValueError: the format knows no `scale`, or it is not finite and above 0.
    """
    if scale is None:
        return {"empty": empty}
    if not FORMATS[file_format].has_scale:
        raise ValueError(f"scale must be given for anserini alone, got {scale} for {file_format}")
    return {"empty": empty, "scale": anserini.check_scale(scale)}
