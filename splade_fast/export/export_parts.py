"""Export of an index folder to files that each hold some of its documents."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from splade_fast._checks import check_count
from splade_fast.export.export_index import read_tokens, refuse_model
from splade_fast.export.formats import EmptyDocuments
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.checksum import count_and_checksum
from splade_fast.search.index import VECTORS, Index
from splade_fast.search.part_folder import Part, PartFolder, PartWriter
from splade_fast.search.part_formats import PartFormat, PartTarget
from splade_fast.search.ray_engine import RayEngine
from splade_fast.search.work import Engine, check_engine, working


def export_parts(
    index: str | os.PathLike[str],
    path: str | os.PathLike[str],
    file_format: PartFormat,
    *,
    model: str | os.PathLike[str] | None = None,
    empty: EmptyDocuments = "keep",
    scale: float | None = None,
    part_size: int = 65_536,
    engine: Engine = "process",
    resume: bool = False,
    show_progress: bool = True,
) -> int:
    """Write numbered files, each with some documents of an index, or shards for fast searches.

    Joined in the order of their names, the files hold what `export_index` writes. The folder
    appears complete or not at all. Workers of Ray read the index and write the files themselves, so
    all machines must share the file systems of both.

    The finished files stay after an error, and after the end of the program at any time.
    `resume=True` goes on with them; any other call removes them.

    Args:
        index: an index folder.
        path: folder to write; must not exist.
        file_format: "anserini", "elasticsearch", "npz", "opensearch", "parquet", "qdrant",
            "seismic", or "shards" for `splade_fast.search.shards.Shards`.
        model: model whose tokenizer names the columns; by default the index's model. None for
            formats without names.
        empty: "keep", "skip" or "error" for documents without entries.
        scale: factor of Anserini's impacts, 100 by default; None for all other formats.
        part_size: number of documents of a file.
        engine: "process": this process; "ray": workers on all CPUs of the cluster or of this
            machine; or a `RayEngine` with other settings.
        resume: go on with the files that an interrupted call has finished.
        show_progress: draw a progress bar.

    Returns:
        Number of documents written.

    Raises:
        DataError: the finished files belong to another index or other settings, or the index's
            model has another vocabulary than when the index was made.
        FileExistsError: `path` exists.
        OSError, TypeError, ValueError: see `Index.load` and the function of the format.
        ImportError: a package is not installed that writes the files or runs the engine.

    Example::

        >>> from splade_fast.export.export_parts import export_parts
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> with open("animals.tsv", "w") as file:
        ...     _ = file.write("d1\\tquick fox\\nd2\\tlazy dog\\n")
        >>> _ = sf.encode_corpus(encoder, "animals.tsv", "animals", model="CHECKPOINT")
        >>> export_parts("animals", "points", "qdrant", part_size=1)
        2
        >>> sorted(path.name for path in pathlib.Path("points").iterdir())
        ['points-000000.jsonl', 'points-000001.jsonl']
    """
    part_size = check_count("part_size", part_size, 1)
    target = PartTarget.choose(file_format, empty, scale)
    refuse_model(model, file_format, has_tokens=target.has_tokens)
    check_engine(engine)
    if Path(path).exists():
        raise FileExistsError(f"{path} must not exist yet")
    loaded = Index.load(index, should_check=False)  # each part is checked where it is read
    target.check_ids(loaded.ids)
    vectors = Path(index).resolve() / VECTORS
    folder = PartFolder.beside(path)
    with folder.make():
        writer = target.make_writer(folder, lambda: read_tokens(loaded.meta, model))
        settings = {
            **target.settings,
            "model": None if model is None else os.fspath(model),
            "number of documents of a file": part_size,
            **_describe(vectors, loaded),
        }
        folder.claim(settings, should_keep=resume)
        ranges = _split(loaded.ids, part_size, vectors)
        finished = folder.find_finished(len(ranges))
        left = [one for one, part in zip(ranges, finished, strict=True) if part is None]
        with working(
            RayEngine(threads=1) if engine == "ray" else engine,  # a writer uses one thread
            partial(_export, RangeReader(vectors, len(loaded.ids)), writer),
            left,
            show_progress=show_progress,
        ) as exported:
            for _ in exported:
                pass
        parts = folder.check(len(ranges))
        target.describe(folder.parts, loaded.meta, parts)
        folder.finish(Path(path).resolve())
    return sum(part.documents for part in parts)


@dataclass(frozen=True)
class RowRange:
    """Consecutive documents of an index, which are written to one file.

    Args:
        number: number of the file.
        start: number of documents before them.
        ids: their ids.
        source: file of the vectors.
    """

    number: int
    start: int
    ids: list[str]
    source: Path

    @property
    def count(self) -> int:
        """Number of documents."""
        return len(self.ids)

    def describe(self) -> str:
        """Return where the documents stand in the index."""
        return f"documents {self.start + 1} to {self.start + self.count} of {self.source}"


class RangeReader:
    """Reader of ranges of rows, which keeps their file mapped into memory.

    Args:
        vectors: file of the rows.
        count: number of rows in it.
    """

    def __init__(self, vectors: Path, count: int) -> None:
        self._vectors, self._count = vectors, count
        self._rows: SparseRows | None = None

    def __reduce__(self) -> tuple[type[RangeReader], tuple[Path, int]]:
        return type(self), (self._vectors, self._count)  # another process maps the file itself

    def read(self, wanted: RowRange) -> SparseRows:
        """Return some rows, after a check of their numbers.

        Raises:
            FileNotFoundError: this machine does not see the file.
            ValueError: the file is damaged, or has another number of rows.
        """
        if self._rows is None:
            self._rows = SparseRows.load(self._vectors, should_check=False)
        if len(self._rows) != self._count:
            raise ValueError(f"{self._vectors} must keep its {self._count} rows, got another file")
        rows = self._rows[wanted.start : wanted.start + wanted.count]
        try:
            rows.check_contents()
        except ValueError as error:
            raise ValueError(
                f"{self._vectors} is damaged: {error}, counted from row {wanted.start} on"
            ) from error
        return rows


def _export(
    reader: RangeReader,
    writer: PartWriter,
    wanted: RowRange,
    after_documents: Callable[[int], object],
) -> Part:
    rows = reader.read(wanted)
    part = writer.write_part(wanted.number, wanted.start, rows, wanted.ids)
    after_documents(wanted.count)
    return part


def _split(ids: list[str], size: int, source: Path) -> list[RowRange]:
    """Return the ranges of all rows; an index without documents has one."""
    starts = range(0, max(len(ids), 1), size)
    return [
        RowRange(number, start, ids[start : start + size], source)
        for number, start in enumerate(starts)
    ]


def _describe(vectors: Path, index: Index) -> dict[str, Any]:
    """Return what tells an index from another one."""
    state = vectors.stat()
    count, checksum = count_and_checksum([id_] for id_ in index.ids)
    return {
        "number of documents": count,
        "checksum of the ids": checksum,
        "size of the vectors": state.st_size,
        "time of the vectors": state.st_mtime_ns,
    }
