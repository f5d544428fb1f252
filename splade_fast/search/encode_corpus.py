"""Encoding of a corpus to an index folder, by this process or by workers of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from tqdm.auto import tqdm

from splade_fast._checks import check_count
from splade_fast._distributed import is_distributed
from splade_fast.encoders.pretrained import refuse_index
from splade_fast.encoders.text_encoder import TextEncoder, check_vocabularies
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.chunk_folder import ChunkFolder
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import IndexMeta, join_index, resolve_model
from splade_fast.search.pieces import Piece, PieceEncoder, checksum_of_pieces, list_pieces
from splade_fast.search.ray_engine import RayEngine


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
    engine: Literal["process", "ray"] | RayEngine = "process",
    query_model: str | os.PathLike[str] | None = None,
    query_encoder: TextEncoder | None = None,
) -> int:
    """Encode a corpus to an index folder, holding one chunk of documents and all ids in memory.

    The corpus is read twice: once to check it, then a chunk at a time. The rows of each chunk are
    written to a file beside the index, and these files are joined at the end. The folder appears
    complete or not at all. `Index.load` maps it into memory.

    The files of finished chunks stay after an error, and after the end of the program at any time.
    `resume=True` goes on with them, and writes the same bytes as a call without interruption. Any
    other call removes them.

    Workers of Ray may encode the chunks. This process alone writes files. The index has the same
    bytes for any engine and number of workers, given the same hardware, the same version of torch
    and the same number of threads.

    Args:
        encoder: encoder of the documents.
        corpus: file or folder of texts, local or a URL, in the formats of
            `splade_fast.search.texts.read_texts`: `id<TAB>text` lines, JSON lines or Parquet; not a
            pipe. The workers of an engine read it too.
        index: folder to write; must not exist.
        model: hub name or folder of the model; stored in the index with a fingerprint of
            `encoder`.
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
            the index.
        query_encoder: encoder of the queries, if it is not `encoder`; the index stores its
            fingerprint.

    Returns:
        Number of documents in the index.

    Raises:
        TypeError: a number is not an integer.
        ValueError: an argument is out of range, the corpus is damaged or changes, the finished
            chunks belong to another corpus, encoder or setting, a document cannot be encoded or has
            a vector with NaN or infinity, or this process is a rank of torchrun but the first.
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
    encode = _choose_engine(engine)
    _refuse_other_ranks()
    if Path(index).exists():
        raise FileExistsError(f"{index} must not exist yet")
    chunks = ChunkFolder.beside(index)
    with chunks.make():
        pieces, ids = list_pieces(corpus, chunk_size)
        _add_fingerprints(meta, encoder, query_encoder)
        chunks.claim(_list_settings(meta, pieces, batch_size, chunk_size), should_keep=resume)
        finished = chunks.find_finished([piece.count for piece in pieces])
        remaining = [piece for piece, is_done in zip(pieces, finished, strict=True) if not is_done]
        work = PieceEncoder(encoder, meta.k, batch_size, meta.max_length)
        total = sum(piece.count for piece in remaining)
        with (
            tqdm(total=total, unit="text", disable=not show_progress) as progress,
            closing(encode(work, remaining, progress.update)) as encoded,
        ):
            for piece, rows in encoded:
                rows.save(chunks.file(piece.number))
        join_index(chunks.index, [chunks.file(piece.number) for piece in pieces], ids, meta)
        chunks.finish(Path(index).resolve())
    return len(ids)


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


_Encode = Callable[
    [PieceEncoder, Sequence[Piece], Callable[[int], object]], Generator[tuple[Piece, SparseRows]]
]


def _choose_engine(engine: Literal["process", "ray"] | RayEngine) -> _Encode:
    """Return the function that encodes pieces, each of which it yields with its vectors."""
    if isinstance(engine, RayEngine):
        return engine.encode
    if engine not in ("process", "ray"):
        raise ValueError(f"engine must be 'process', 'ray' or a RayEngine, got {engine!r}")
    return RayEngine().encode if engine == "ray" else _encode_here


def _encode_here(
    work: PieceEncoder, pieces: Sequence[Piece], after_texts: Callable[[int], object]
) -> Generator[tuple[Piece, SparseRows]]:
    for piece in pieces:
        yield piece, work.encode(piece, after_texts)


def _refuse_other_ranks() -> None:
    """Raise ValueError on all ranks but the first, since only one process may write the index."""
    rank = dist.get_rank() if is_distributed() else int(os.environ.get("RANK", "0"))
    if rank > 0:
        raise ValueError(
            "engine must be 'ray' to encode with several processes, in a program that is started "
            f"once, got a call on rank {rank} of torchrun"
        )
