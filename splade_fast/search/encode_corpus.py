"""Encoding of a corpus to an index folder, by one process or by all ranks of torch.distributed."""

from __future__ import annotations

import os
import secrets
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from splade_fast._checks import check_count
from splade_fast._distributed import Ranks, fail_together, world_size
from splade_fast.encoders.pretrained import refuse_index
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.chunk_folder import ChunkFolder
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import IndexMeta, join_index, resolve_model
from splade_fast.search.lines import check_rereadable
from splade_fast.search.texts import DataError, iterate_checked_texts, iterate_texts

# The other ranks wait while the first rank reads the corpus or joins the index, however long that
# takes. They do not wait for a rank that has died, since its connections are closed.
_TIMEOUT = timedelta(days=30)
# Network file systems cache for some seconds that a file is missing.
_SECONDS_TO_SEE_A_FILE = 10.0


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

    If torch.distributed is initialised, all ranks must call the function. Rank r of R encodes the
    chunks r, r + R and so on. The index has the same bytes for any number of ranks, given the same
    hardware, the same version of torch and the same number of threads.

    Args:
        encoder: encoder of the documents, the same on all ranks, each on its own device.
        corpus: a file of texts that all ranks can read: `id<TAB>text` lines, or JSON lines in the
            formats of `splade_fast.search.texts.read_texts`; not a pipe.
        index: folder to write, on a file system that all ranks share; must not exist.
        model: hub name or folder of the model; stored in the index with a fingerprint of
            `encoder`.
        k: keep at most the k largest entries of each vector.
        batch_size: number of texts that go through the model together.
        max_length: number of tokens kept of each text, special tokens included; the model's own
            limit applies as well.
        chunk_size: number of documents that a rank sorts by length and encodes at a time.
        show_progress: draw a progress bar of the first rank's documents.
        resume: go on with the chunks that an interrupted call has finished, with any number of
            ranks then and now. Without such chunks the encoding starts from the beginning.
        query_model: hub name or folder of the model for queries, if it is not `model`; stored in
            the index.
        query_encoder: encoder of the queries, if it is not `encoder`; the index stores its
            fingerprint.

    Returns:
        Number of documents in the index.

    Raises:
        TypeError: a number is not an integer.
        ValueError: an argument is out of range, the corpus is damaged, the finished chunks belong
            to another corpus, encoder or setting, or a vector holds NaN or infinity.
        FileExistsError: `index` exists.
        OSError: the file system failed, or the ranks do not share one.
        RuntimeError: another rank raised one of these errors.

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
    prompt = encoder.prompt_text(encoder.settings.prompt_for("document"))
    chunks = ChunkFolder.beside(index)
    with (
        _gloo_group() as group,
        # torchrun ends all processes when one has left, so all wait until the files are removed.
        fail_together("encoding the corpus", group),
        ExitStack() as stack,
    ):
        rank = dist.get_rank(group) if group is not None else 0
        ranks = world_size()
        with fail_together("making the folder of the index", group):
            if rank == 0:
                if Path(index).exists():
                    raise FileExistsError(f"{index} must not exist yet")
                stack.enter_context(chunks.make())
        if group is not None:
            _check_shared(chunks.path, group)
        checked = _Checksums(chunk_size)
        finished: list[int] = []
        with fail_together("checking the corpus", group):
            if rank == 0:
                check_rereadable(corpus)
                ids = [text_id for text_id, _ in checked.track(iterate_checked_texts(corpus))]
                _add_fingerprints(meta, encoder, query_encoder)
                chunks.claim(_list_settings(meta, checked, batch_size), should_keep=resume)
                finished = [int(done) for done in chunks.find_finished(checked.chunk_counts())]
        checked.share(group)
        finished = _of_first_rank(finished, group)

        remaining = [number for number, is_finished in enumerate(finished) if not is_finished]
        own = set(remaining[rank::ranks])
        counts = checked.chunk_counts()
        read = _Checksums(chunk_size)
        with (
            fail_together("encoding the corpus", group),
            chunks.flag_failure(),
            tqdm(
                total=sum(counts[number] for number in own),
                unit="text",
                desc=f"rank 0 of {ranks}" if ranks > 1 else None,
                disable=not show_progress or rank != 0,
            ) as progress,
        ):

            def after_batch(count: int) -> None:
                progress.update(count)
                chunks.check_no_rank_failed()

            # Every rank reads the whole corpus, and encodes its own chunks.
            for number, texts in enumerate(_split(read.track(iterate_texts(corpus)), chunk_size)):
                checked.check_next(read, corpus)
                if number in own:
                    rows = encoder.encode_batches(
                        texts, prompt, meta.k, batch_size, meta.max_length, after_batch
                    )
                    _check_finite(rows, number * chunk_size)
                    rows.save(chunks.file(number))
            checked.check_end(read, corpus)

        with fail_together("joining the index", group):
            if rank == 0:
                files = [chunks.file(number) for number in range(len(finished))]
                join_index(chunks.index, files, ids, meta)
                chunks.finish(Path(index).resolve())
    return checked.count


def check_vocabularies(encoder: TextEncoder, query_encoder: TextEncoder) -> None:
    """Raise ValueError if the encoders of documents and queries have other numbers of columns."""
    if query_encoder.vocab_size != encoder.vocab_size:
        raise ValueError(
            f"query_encoder must have the vocab_size of encoder, {encoder.vocab_size}, "
            f"got {query_encoder.vocab_size}"
        )


def _check_finite(rows: SparseRows, start: int) -> None:
    """Raise ValueError for a vector with NaN or infinities, which would rank nonsense.

    Args:
        rows: vectors of consecutive texts.
        start: number of the first one in the corpus.
    """
    bad_mask = ~rows.values.isfinite().all(1)
    if bad_mask.any():
        row = int(bad_mask.nonzero()[0])
        raise ValueError(
            f"the encoder must give finite weights, got NaN or infinity for text {start + row + 1} "
            f"of the corpus with weights in {str(rows.dtype).removeprefix('torch.')}"
        )


def _add_fingerprints(
    meta: IndexMeta, encoder: TextEncoder, query_encoder: TextEncoder | None
) -> None:
    meta.fingerprint = Fingerprint.of(encoder, "document", meta.max_length)
    if query_encoder is not None:
        meta.query_fingerprint = Fingerprint.of(query_encoder, "query", meta.max_length)


def _list_settings(meta: IndexMeta, corpus: _Checksums, batch_size: int) -> dict[str, Any]:
    """Return what the bytes of all chunks depend on."""
    assert meta.fingerprint is not None
    return {
        "k": meta.k,
        "max_length": meta.max_length,
        "batch_size": batch_size,
        "chunk_size": corpus.chunk_size,
        "number of texts": corpus.count,
        "checksum of the corpus": corpus.checksum,
        **{f"encoder's {name}": digest for name, digest in asdict(meta.fingerprint).items()},
    }


@dataclass
class _Checksums:
    """Checksums of the texts that were read from a corpus, from its start to the end of each chunk.

    Args:
        chunk_size: number of texts of a chunk.
        count: number of texts that were read.
        checksum: checksum of all these texts.
        after_chunks: checksum at the end of each chunk.
    """

    chunk_size: int
    count: int = 0
    checksum: int = 0
    after_chunks: list[int] = field(default_factory=list)

    def track(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield the texts and add each to the checksums."""
        for text_id, text in texts:
            self.count += 1
            content = f"{text_id}\t{text}\n".encode("utf-8", "surrogatepass")
            self.checksum = zlib.crc32(content, self.checksum)
            if self.count % self.chunk_size == 0:
                self.after_chunks.append(self.checksum)
            yield text_id, text
        if self.count % self.chunk_size:
            self.after_chunks.append(self.checksum)

    def chunk_counts(self) -> list[int]:
        """Return the number of texts of each chunk."""
        starts = range(0, self.count, self.chunk_size)
        return [min(self.chunk_size, self.count - start) for start in starts]

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Replace the values of all ranks by those of the first."""
        [self.count] = _of_first_rank([self.count], group)
        self.after_chunks = _of_first_rank(self.after_chunks, group)

    def check_next(self, read: _Checksums, corpus: str | os.PathLike[str]) -> None:
        """Check the texts up to the last chunk that was read again.

        Raises:
            DataError: the corpus has changed.
        """
        number = len(read.after_chunks)
        if read.after_chunks[-1:] != self.after_chunks[number - 1 : number]:
            raise self._change(read, corpus)

    def check_end(self, read: _Checksums, corpus: str | os.PathLike[str]) -> None:
        """Check the number of texts, as `check_next` does at the end of the corpus."""
        if read.count != self.count:
            raise self._change(read, corpus)

    def _change(self, read: _Checksums, corpus: str | os.PathLike[str]) -> DataError:
        return DataError(
            f"{corpus} must be the same file for all ranks and stay as it is, got other texts up "
            f"to text {read.count} of {self.count}"
        )


@contextmanager
def _gloo_group() -> Iterator[dist.ProcessGroup | None]:
    """Make a group of all ranks inside the block; yield None if there is one rank.

    The group uses gloo whatever the default group uses: its tensors are in host memory, and NCCL
    would occupy a GPU while ranks wait.
    """
    if world_size() == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _check_shared(folder: Path, group: dist.ProcessGroup) -> None:
    """Check that all ranks see a file that the first rank writes to the folder.

    Raises:
        OSError: on all ranks, if one of them does not see the file.
    """
    ranks = Ranks(group)
    name = f"seen-{secrets.token_hex(8)}"
    if ranks.rank == 0:
        (folder / name).touch()
    (names,) = ranks.all_gather(torch.tensor(list(name.encode())))
    is_seen = _wait_for_file(folder / bytes(names[0].tolist()).decode())
    (seen_mask,) = ranks.all_gather(torch.tensor(is_seen))
    if not seen_mask.all():
        blind = ", ".join(str(rank) for rank in (~seen_mask).nonzero().flatten().tolist())
        raise OSError(
            "the index must be on a file system that all ranks share, but what rank 0 writes to "
            f"{folder.parent} is not there on rank {blind}"
        )
    if ranks.rank == 0:
        (folder / name).unlink()


def _wait_for_file(path: Path) -> bool:
    """Return whether the file appears within `_SECONDS_TO_SEE_A_FILE`."""
    deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _of_first_rank(numbers: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """Return the numbers of the first rank, however many there are."""
    if group is None:
        return numbers
    ranks = Ranks(group)
    (counts,) = ranks.all_gather(torch.tensor(len(numbers)))
    own = numbers if ranks.rank == 0 else [0] * int(counts[0])
    (gathered,) = ranks.all_gather(torch.tensor(own, dtype=torch.int64))
    first: list[int] = gathered[0].tolist()
    return first


def _split(texts: Iterable[tuple[str, str]], chunk_size: int) -> Iterator[list[str]]:
    remaining = iter(texts)
    while chunk := [text for _, text in islice(remaining, chunk_size)]:
        yield chunk
