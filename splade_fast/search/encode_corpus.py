"""Encoding of a corpus to an index folder, by one process or by all ranks of torch.distributed."""

from __future__ import annotations

import os
import secrets
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from splade_fast._atomic_files import new_folder, partial_folder
from splade_fast._distributed import Ranks, fail_together, world_size
from splade_fast.encoders.text_encoder import TextEncoder, check_positive
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
) -> int:
    """Encode a corpus to an index folder, holding one chunk of documents and all ids in memory.

    The corpus is read twice: once to check it, then a chunk at a time. The rows of each chunk are
    written to a file beside the index, and these files are joined at the end. The folder appears
    complete or not at all. `Index.load` maps it into memory.

    If torch.distributed is initialised, all ranks must call the function. Rank r of R encodes the
    chunks r, r + R and so on. The index has the same bytes for any number of ranks, given the same
    hardware, the same version of torch and the same number of threads.

    Args:
        encoder: encoder of the documents, the same on all ranks, each on its own device.
        corpus: a file of texts that all ranks can read: `id<TAB>text` lines, or JSON lines in the
            formats of `splade_fast.search.texts.read_texts`; not a pipe.
        index: folder to write, on a file system that all ranks share; must not exist.
        model: hub name or folder of the model for queries; stored in the index.
        k: keep at most the k largest entries of each vector.
        batch_size: number of texts that go through the model together.
        max_length: number of tokens kept of each text, special tokens included; the model's own
            limit applies as well.
        chunk_size: number of documents that a rank sorts by length and encodes at a time.
        show_progress: draw a progress bar of the first rank's documents.

    Returns:
        Number of documents in the index.

    Raises:
        ValueError: an argument is out of range, or the corpus is damaged.
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
    check_positive(batch_size=batch_size, max_length=max_length, k=k, chunk_size=chunk_size)
    prompt = encoder.prompt_text(encoder.settings.prompt_for("document"))
    with (
        _gloo_group() as group,
        # torchrun ends all processes when one has left, so all wait until the files are removed.
        fail_together("encoding the corpus", group),
        ExitStack() as stack,
    ):
        rank = dist.get_rank(group) if group is not None else 0
        ranks = world_size()
        chunks = _ChunkFolder(partial_folder(index) / "chunks")
        with fail_together("making the folder of the index", group):
            if rank == 0:
                folder = stack.enter_context(new_folder(index))
                chunks.path.mkdir()
        if group is not None:
            _check_shared(chunks.path, group)
        checked = _Fingerprint()
        with fail_together("checking the corpus", group):
            if rank == 0:
                check_rereadable(corpus)
                ids = [text_id for text_id, _ in checked.track(iterate_checked_texts(corpus))]
        if group is not None:
            checked = checked.of_first_rank(group)

        read = _Fingerprint()
        starts = range(0, checked.count, chunk_size)
        share = sum(min(chunk_size, checked.count - start) for start in starts[rank::ranks])
        with (
            fail_together("encoding the corpus", group),
            chunks.flag_failure(),
            tqdm(
                total=share,
                unit="text",
                desc=f"rank 0 of {ranks}" if ranks > 1 else None,
                disable=not show_progress or rank != 0,
            ) as progress,
        ):

            def after_batch(count: int) -> None:
                progress.update(count)
                chunks.check_no_rank_failed()

            # Every rank reads the whole corpus, and encodes its own chunks.
            numbered = enumerate(_split(read.track(iterate_texts(corpus)), chunk_size))
            for number, texts in islice(numbered, rank, None, ranks):
                rows = encoder.encode_batches(texts, prompt, k, batch_size, max_length, after_batch)
                rows.save(chunks.file(number))
            if read != checked:
                raise DataError(
                    f"{corpus} must be the same file for all ranks and stay as it is, got "
                    f"{read.count} texts after {checked.count}, or other texts"
                )

        with fail_together("joining the index", group):
            if rank == 0:
                files = [chunks.file(number) for number in range(len(starts))]
                join_index(folder, files, ids, IndexMeta(resolve_model(model), max_length, k))
                chunks.path.rmdir()
                stack.close()
    return checked.count


@dataclass
class _Fingerprint:
    """Number and checksum of the texts that were read from a corpus."""

    count: int = 0
    checksum: int = 0

    def track(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield the texts and add each to the fingerprint."""
        for text_id, text in texts:
            self.count += 1
            content = f"{text_id}\t{text}\n".encode("utf-8", "surrogatepass")
            self.checksum = zlib.crc32(content, self.checksum)
            yield text_id, text

    def of_first_rank(self, group: dist.ProcessGroup) -> _Fingerprint:
        """Return the fingerprint of the first rank."""
        (gathered,) = Ranks(group).all_gather(torch.tensor([self.count, self.checksum]))
        return _Fingerprint(*gathered[0].tolist())


class _AnotherRankFailedError(Exception):
    """Stop the encoding of this rank, because another rank has failed."""


@dataclass
class _ChunkFolder:
    """Folder that all ranks write to: a file for each chunk, and a file that flags a failure."""

    path: Path

    def file(self, number: int) -> Path:
        return self.path / f"{number}.safetensors"

    @contextmanager
    def flag_failure(self) -> Iterator[None]:
        """Flag an error of the block to the other ranks, so that they stop before their own end.

        If another rank has failed, the block ends early and without an error.
        """
        try:
            yield
        except _AnotherRankFailedError:
            return
        except BaseException:
            with suppress(OSError):
                self._failed.touch()
            raise

    def check_no_rank_failed(self) -> None:
        if self._failed.exists():
            raise _AnotherRankFailedError

    @property
    def _failed(self) -> Path:
        return self.path / "failed"


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
            f"{folder.parent.parent} is not there on rank {blind}"
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


def _split(texts: Iterable[tuple[str, str]], chunk_size: int) -> Iterator[list[str]]:
    remaining = iter(texts)
    while chunk := [text for _, text in islice(remaining, chunk_size)]:
        yield chunk
