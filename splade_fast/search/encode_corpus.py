"""A corpus encoded to an index on disk, by one process or all ranks, one chunk in memory each."""

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
from splade_fast.search.index import IndexMeta, join_index, lasting_name
from splade_fast.search.texts import DataError, checked_texts, each_text

# Ranks wait while the first one reads the corpus or joins the index, however long that takes. For
# a rank that died none waits: its connections are closed.
_LONGEST_WAIT = timedelta(days=30)
_SECONDS_TO_SEE_A_FILE = 10.0  # network file systems remember for a while what was not there


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
    """Encode a corpus to an index folder in the memory of one chunk of documents, and all ids.

    The corpus is read twice: whole, to check it before anything is encoded, then a chunk at a time.
    The rows of each chunk go to a file beside the index, and the files are joined at the end, so
    that the disk holds the index and one chunk. The folder appears complete or not at all;
    `Index.load` maps it into memory.

    With torch.distributed initialised all ranks call this, and rank r of R encodes the chunks r,
    r + R, …; only files go between them. Chunks, and so batches, are the same for any number of
    ranks, and the index has the same bytes wherever a batch does: with the same hardware, the same
    torch and the same number of threads.

    Args:
        encoder: of documents; the same on all ranks, each on its own device.
        corpus: a file as `data.read_texts` takes it, seen by all ranks.
        index: the folder to write, on a file system that all ranks share; must not exist.
        model: what queries are to be encoded with, for the index to tell: a hub name or a folder.
        k: keep at most the k largest entries of each vector.
        batch_size: texts of similar length that go through the model together.
        max_length: tokens kept of each text, special ones included; never more than the model's
            own limit.
        chunk_size: documents that are sorted by length together, and that one rank takes.
        show_progress: draw a progress bar, of the first rank's documents.

    Returns:
        How many documents the index holds.

    Raises:
        ValueError: an argument is out of range, or the corpus is damaged (`data.DataError`).
        FileExistsError: `index` exists already.
        OSError: of the file system; the ranks share none.
        RuntimeError: `distributed.OtherRankError`: another rank raised one of these.
    """
    check_positive(batch_size=batch_size, max_length=max_length, k=k, chunk_size=chunk_size)
    prompt = encoder.prompt_text(encoder.settings.prompt_for("document"))
    with _all_ranks() as (group, rank, ranks), ExitStack() as stack:
        pieces = _Pieces(partial_folder(index) / "pieces")
        with fail_together("making the folder of the index", group):
            if rank == 0:
                folder = stack.enter_context(new_folder(index))
                pieces.folder.mkdir()
        if group is not None:
            _check_all_see(pieces.folder, group)
        checked = _Read()
        with fail_together("checking the corpus", group):
            if rank == 0:
                ids = [text_id for text_id, _ in checked.each(checked_texts(corpus))]
        if group is not None:
            checked = checked.on_first_rank(group)

        read = _Read()
        starts = range(0, checked.count, chunk_size)
        share = sum(min(chunk_size, checked.count - start) for start in starts[rank::ranks])
        with (
            fail_together("encoding the corpus", group),
            pieces.while_no_rank_fails(),
            tqdm(
                total=share,
                unit="text",
                desc=f"rank 0 of {ranks}" if ranks > 1 else None,
                disable=not show_progress or rank != 0,
            ) as progress,
        ):

            def after_batch(count: int) -> None:
                progress.update(count)
                pieces.check_no_rank_failed()

            for number, texts in enumerate(_chunks(read.each(each_text(corpus)), chunk_size)):
                if number % ranks == rank:
                    rows = encoder.encode_batches(
                        texts, prompt, k, batch_size, max_length, after_batch
                    )
                    rows.save(pieces.file(number))
            if read != checked:
                raise DataError(
                    f"{corpus} must be the same file for all ranks and stay as it is, got "
                    f"{read.count} texts after {checked.count}, or other ones"
                )

        with fail_together("joining the index", group):
            if rank == 0:
                files = [pieces.file(number) for number in range(len(starts))]
                join_index(folder, files, ids, IndexMeta(lasting_name(model), max_length, k))
                pieces.folder.rmdir()
                stack.close()
    return checked.count


@dataclass
class _Read:
    """How many texts of a corpus have been read, and a checksum of them."""

    count: int = 0
    checksum: int = 0

    def each(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """The texts as they come, counted."""
        for text_id, text in texts:
            self.count += 1
            content = f"{text_id}\t{text}\n".encode("utf-8", "surrogatepass")
            self.checksum = zlib.crc32(content, self.checksum)
            yield text_id, text

    def on_first_rank(self, group: dist.ProcessGroup) -> _Read:
        """What the first rank has read."""
        (told,) = Ranks(group).all_gather(torch.tensor([self.count, self.checksum]))
        return _Read(*told[0].tolist())


class _AnotherRankFailedError(Exception):
    """Ends this rank's part of what fails anyway."""


@dataclass
class _Pieces:
    """A folder that all ranks write to: a file for every chunk, and one where a rank has failed."""

    folder: Path

    def file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    @contextmanager
    def while_no_rank_fails(self) -> Iterator[None]:
        """Tells the other ranks what fails inside, so that they need not go on to their end."""
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
        return self.folder / "failed"


@contextmanager
def _all_ranks() -> Iterator[tuple[dist.ProcessGroup | None, int, int]]:
    """A group of all ranks, this one's number and how many there are; one rank needs no group.

    It is of gloo, whatever moves the tensors of a training: what these ranks tell each other is in
    the host's memory, and NCCL would have a GPU wait.
    """
    if world_size() == 1:
        yield None, 0, 1
        return
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    ranks = Ranks(group)
    try:
        yield group, ranks.rank, ranks.count
    except Exception:
        # None leaves before the first one has cleaned up: torchrun ends all when one has left.
        with suppress(RuntimeError):
            ranks.all_gather(torch.tensor(True))
        raise
    finally:
        dist.destroy_process_group(group)


def _check_all_see(folder: Path, group: dist.ProcessGroup) -> None:
    """Whether what the first rank writes to the folder is there for the others.

    Raises:
        OSError: on all ranks, naming those that do not see it.
    """
    ranks = Ranks(group)
    name = f"seen-{secrets.token_hex(8)}"
    if ranks.rank == 0:
        (folder / name).touch()
    (told,) = ranks.all_gather(torch.tensor(list(name.encode())))
    (sees,) = ranks.all_gather(torch.tensor(_appears(folder / bytes(told[0].tolist()).decode())))
    if not sees.all():
        blind = ", ".join(str(rank) for rank in (~sees).nonzero().flatten().tolist())
        raise OSError(
            "the index must be on a file system that all ranks share, but what rank 0 writes to "
            f"{folder.parent.parent} is not there on rank {blind}"
        )
    if ranks.rank == 0:
        (folder / name).unlink()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _chunks(texts: Iterable[tuple[str, str]], chunk_size: int) -> Iterator[list[str]]:
    remaining = iter(texts)
    while chunk := [text for _, text in islice(remaining, chunk_size)]:
        yield chunk
