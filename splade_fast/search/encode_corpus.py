"""Encoding of a corpus to a folder, by this process or by workers of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from splade_fast._checks import check_count
from splade_fast.encoders.pretrained import refuse_index
from splade_fast.encoders.text_encoder import TextEncoder, check_vocabularies
from splade_fast.encoders.token_names import name_tokens
from splade_fast.export.formats import EmptyDocuments
from splade_fast.search.chunk_folder import ChunkFolder
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import IndexMeta, join_index, resolve_model
from splade_fast.search.part_folder import Part, PartFolder, PartWriter
from splade_fast.search.part_formats import PartFormat, PartTarget
from splade_fast.search.pieces import Piece, PieceEncoder, checksum_of_pieces, list_pieces
from splade_fast.search.ray_engine import R, Work
from splade_fast.search.work import Engine, check_engine, working


def encode_corpus(
    encoder: TextEncoder,
    corpus: str | os.PathLike[str],
    index: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    k: int | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    chunk_size: int = 4096,
    show_progress: bool = True,
    resume: bool = False,
    engine: Engine = "process",
    query_model: str | os.PathLike[str] | None = None,
    query_encoder: TextEncoder | None = None,
    file_format: Literal["index", PartFormat] = "index",
    empty: EmptyDocuments = "keep",
    scale: float | None = None,
    store_texts: bool = False,
) -> int:
    """Encode a corpus to a folder, holding one chunk of documents and all ids in memory.

    The corpus is read twice: once to check it, then a chunk at a time. The rows of each chunk are
    written to a file beside the index, and these files are joined at the end. The folder appears
    complete or not at all. `Index.load` maps it into memory.

    With another `file_format`, the folder holds numbered files for other programs, each with the
    documents of a chunk, or shards that `splade_fast.search.shards.Shards` searches as one.

    The files of finished chunks stay after an error, and after the end of the program at any time.
    `resume=True` goes on with them, and writes the same bytes as a call without interruption. Any
    other call removes them.

    Workers of Ray may encode the chunks. This process alone writes an index, while the workers
    write all other files, on a file system that all machines share. The files have the same bytes
    for any engine and number of workers, given the same hardware, the same version of torch and the
    same number of threads.

    Args:
        encoder: encoder of the documents.
        corpus: file or folder of texts, local or a URL, in the formats of
            `splade_fast.search.texts.read_texts`: `id<TAB>text` lines, JSON lines or Parquet; not a
            pipe. The workers of an engine read it too.
        index: folder to write; must not exist.
        model: hub name or folder of the model; stored in an index and in shards, with a fingerprint
            of `encoder`.
        k: keep at most the k largest entries of each vector.
        batch_size: number of texts that go through the model together.
        max_length: number of tokens kept of each text, special tokens included; the model's own
            limit applies as well.
        chunk_size: number of documents of a file that are sorted by length and encoded at a time.
        show_progress: draw a progress bar.
        resume: go on with the chunks that an interrupted call has finished, with any engine then
            and now. Without such chunks the encoding starts from the beginning.
        engine: "process": this process; "ray": workers with the defaults of `RayEngine`; or a
            `RayEngine` with other settings.
        query_model: hub name or folder of the model for queries, if it is not `model`; stored in
            an index and in shards.
        query_encoder: encoder of the queries, if it is not `encoder`; an index and shards store its
            fingerprint.
        file_format: "index"; "shards"; or "anserini", "elasticsearch", "npz", "opensearch",
            "parquet", "qdrant" or "seismic", for the files of that function of
            `splade_fast.export`, which joined hold what it writes of the whole index.
        empty: "keep", "skip" or "error" for documents without entries, in the files of an export.
        scale: factor of Anserini's impacts, 100 by default; None for all other formats.
        store_texts: store the texts of the corpus too, in the files of an export: as `text` in
            Parquet, in Qdrant's payload and beside the vector in OpenSearch and Elasticsearch, as
            `contents` for Anserini and `content` for Seismic.

    Returns:
        Number of documents in the folder.

    Raises:
        TypeError: a number is not an integer.
        ValueError: an argument is out of range, the corpus is damaged or changes, the finished
            chunks belong to another corpus, encoder or setting, a document cannot be encoded or has
            a vector with NaN or infinity, the format cannot hold an id or a weight, or this process
            is a rank of torchrun but the first.
        FileExistsError: `index` exists.
        ImportError: a package is not installed that reads the corpus or runs the engine.
        OSError: the file system failed.

    Example::

        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> with open("corpus.tsv", "w") as file:
        ...     _ = file.write("d1\\tquick fox\\nd2\\tlazy dog\\n")
        >>> sf.encode_corpus(encoder, "corpus.tsv", "index", model="CHECKPOINT")
        2
    """
    batch_size = check_count("batch_size", batch_size, 1)
    chunk_size = check_count("chunk_size", chunk_size, 1)
    meta = IndexMeta(resolve_model(model), max_length, k)
    refuse_index("model", model)
    if query_model is not None:
        refuse_index("query_model", query_model)
        meta.query_model = resolve_model(query_model)
    if query_encoder is not None:
        check_vocabularies(encoder, query_encoder)
    check_engine(engine)
    if Path(index).exists():
        raise FileExistsError(f"{index} must not exist yet")
    job = _Job(
        PieceEncoder(encoder, k, batch_size, max_length),
        corpus,
        Path(index),
        meta,
        query_encoder,
        chunk_size,
        resume,
        engine,
        show_progress,
    )
    if file_format == "index":
        if empty != "keep" or scale is not None or store_texts:
            raise ValueError(
                "empty, scale and store_texts must go with another file_format than 'index'"
            )
        return _write_index(job)
    target = PartTarget.choose(file_format, empty, scale, store_texts=store_texts)
    return _write_parts(job, target)


@dataclass
class _Job:
    """Encoding of a corpus.

    Args:
        work: encoder of the pieces.
        target: folder to write.
        corpus, meta, query_encoder, chunk_size, resume, engine, show_progress: see `encode_corpus`.
    """

    work: PieceEncoder
    corpus: str | os.PathLike[str]
    target: Path
    meta: IndexMeta
    query_encoder: TextEncoder | None
    chunk_size: int
    resume: bool
    engine: Engine
    show_progress: bool

    def read(self) -> tuple[list[Piece], list[str], dict[str, Any]]:
        """Return the pieces of the corpus, all ids, and what the bytes of all pieces depend on."""
        pieces, ids = list_pieces(self.corpus, self.chunk_size)
        _add_fingerprints(self.meta, self.work.encoder, self.query_encoder)
        return pieces, ids, _list_settings(self.meta, pieces, self.work.batch_size, self.chunk_size)

    def run(
        self, work: Work[Piece, R], pieces: Sequence[Piece]
    ) -> AbstractContextManager[Iterator[tuple[Piece, R]]]:
        """Give a block the results of the work on some pieces."""
        return working(
            self.engine,
            work,
            pieces,
            device=self.work.encoder.device.type,
            show_progress=self.show_progress,
        )


def _write_index(job: _Job) -> int:
    chunks = ChunkFolder.beside(job.target)
    with chunks.make():
        pieces, ids, settings = job.read()
        chunks.claim({"format": "index", **settings}, should_keep=job.resume)
        finished = chunks.find_finished([piece.count for piece in pieces])
        with job.run(job.work.encode, _select(pieces, finished)) as encoded:
            for piece, rows in encoded:
                rows.save(chunks.file(piece.number))
        join_index(chunks.index, [chunks.file(piece.number) for piece in pieces], ids, job.meta)
        chunks.finish(job.target.resolve())
    return len(ids)


def _write_parts(job: _Job, target: PartTarget) -> int:
    folder = PartFolder.beside(job.target)
    with folder.make():
        pieces, ids, settings = job.read()
        target.check_ids(ids)
        folder.claim({**target.settings, **settings}, should_keep=job.resume)
        writer = target.make_writer(folder, lambda: name_tokens(job.work.encoder.tokenizer))
        finished = folder.find_finished(len(pieces))
        export = partial(_export, job.work, writer)
        with job.run(export, _select(pieces, finished)) as exported:
            for _ in exported:
                pass
        parts = folder.check(len(pieces))
        target.describe(folder.parts, job.meta, parts)
        folder.finish(job.target.resolve())
    return sum(part.documents for part in parts)


def _export(
    work: PieceEncoder, writer: PartWriter, piece: Piece, after_batch: Callable[[int], object]
) -> Part:
    """Encode a piece, and write its part."""
    ids, texts, rows = work.encode_with_texts(piece, after_batch)
    return writer.write_part(piece.number, piece.start, rows, ids, texts)


def _select(pieces: Sequence[Piece], finished: Sequence[object]) -> list[Piece]:
    """Return the pieces that are not finished."""
    return [piece for piece, is_done in zip(pieces, finished, strict=True) if not is_done]


def _add_fingerprints(
    meta: IndexMeta, encoder: TextEncoder, query_encoder: TextEncoder | None
) -> None:
    meta.fingerprint = Fingerprint.of(encoder, "document", meta.max_length)
    if query_encoder is not None:
        meta.query_fingerprint = Fingerprint.of(query_encoder, "query", meta.max_length)


def _list_settings(
    meta: IndexMeta, pieces: Sequence[Piece], batch_size: int, chunk_size: int
) -> dict[str, Any]:
    """Return what the bytes of all chunks depend on."""
    assert meta.fingerprint is not None
    return {
        "k": meta.k,
        "max_length": meta.max_length,
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "number of texts": sum(piece.count for piece in pieces),
        "checksum of the corpus": checksum_of_pieces(pieces),
        **{f"encoder's {name}": digest for name, digest in asdict(meta.fingerprint).items()},
    }
