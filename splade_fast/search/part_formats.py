"""Formats of folders whose files each hold some of the documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from splade_fast.export.formats import FORMATS, EmptyDocuments, Format, make_options
from splade_fast.search.index import IndexMeta
from splade_fast.search.part_folder import Part, PartFolder, PartWriter
from splade_fast.search.shards import describe_shards, write_shard

PartFormat = Literal[
    "anserini", "elasticsearch", "npz", "opensearch", "parquet", "qdrant", "seismic", "shards"
]
_SHARDS = Format(write_shard, has_tokens=False)


@dataclass(frozen=True)
class PartTarget:
    """Format of a folder, and its options.

    Args:
        name: name of the format.
        options: options of the function that writes a part, but for the names of columns.
        has_texts: whether the texts of the documents are stored as well.
    """

    name: PartFormat
    options: dict[str, Any]
    has_texts: bool = False

    @classmethod
    def choose(
        cls,
        name: PartFormat,
        empty: EmptyDocuments = "keep",
        scale: float | None = None,
        *,
        store_texts: bool = False,
    ) -> PartTarget:
        """Return the target of a format.

        Raises:
            ValueError: there is no such format, or it knows no such option.
        """
        if name not in get_args(PartFormat):
            expected = ", ".join(map(repr, get_args(PartFormat)))
            raise ValueError(f"file_format must be one of {expected}, got {name!r}")
        if name == "shards":
            if empty != "keep" or scale is not None:
                raise ValueError("empty and scale must go with another file_format than 'shards'")
            options = {}
        else:
            options = make_options(name, empty, scale)
        target = cls(name, options, store_texts)
        if store_texts and target._format.texts is None:
            raise ValueError(f"store_texts must be False for {name}, which has no place for texts")
        return target

    @property
    def has_tokens(self) -> bool:
        """Return whether the files name the columns."""
        return self._format.has_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that all parts share, by the name that a message gives them."""
        return {
            "format": self.name,
            "empty": None,
            "scale": None,
            **self.options,
            "store_texts": self.has_texts,
        }

    def check_ids(self, ids: Sequence[str]) -> None:
        """Raise ValueError if the format cannot hold an id, or two are stored as the same."""
        self._format.check_ids(ids)

    def make_writer(
        self, folder: PartFolder, id_to_token: Callable[[], Mapping[int, str]]
    ) -> PartWriter:
        """Return the writer of the parts.

        Args:
            folder: folder of the parts.
            id_to_token: function that returns the names of the columns.
        """
        tokens = {"id_to_token": id_to_token()} if self.has_tokens else {}
        return PartWriter(
            folder,
            self._format.write,
            {**self.options, **tokens},
            self._format.shared,
            self._format.store_texts if self.has_texts else None,
        )

    def describe(self, folder: Path, meta: IndexMeta, parts: Sequence[Part]) -> None:
        """Write what belongs to all parts together.

        Args:
            folder: folder of the files.
            meta: settings of the encoding.
            parts: all parts.
        """
        if self.name == "shards":
            describe_shards(folder, meta, [part.documents for part in parts])

    @property
    def _format(self) -> Format:
        return _SHARDS if self.name == "shards" else FORMATS[self.name]
