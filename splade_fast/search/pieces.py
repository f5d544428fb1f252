"""Pieces of a corpus: where they stand, their texts, and their vectors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.checksum import count_and_checksum
from splade_fast.search.lines import DataError, Place
from splade_fast.search.source_files import check_rereadable, list_files
from splade_fast.search.texts import TextFile, iterate_checked_texts


class DocumentError(ValueError):
    """Error of a document that cannot be encoded; the message names it."""


@dataclass(frozen=True)
class Piece:
    """Consecutive texts of one file of a corpus, which are encoded together.

    Args:
        number: number of the piece in the corpus.
        file: path or URL of the file.
        place: place of the first text in the file.
        start: number of texts of the corpus before the piece.
        count: number of texts.
        checksum: checksum of the ids and texts.
        is_last: whether the file ends behind the piece.
    """

    number: int
    file: str
    place: Place
    start: int
    count: int
    checksum: int
    is_last: bool = False

    def describe(self) -> str:
        """Return where the texts stand in the corpus."""
        return f"texts {self.start + 1} to {self.start + self.count} of the corpus, in {self.file}"


def list_pieces(corpus: str | os.PathLike[str], size: int) -> tuple[list[Piece], list[str]]:
    """Check a corpus, and return its pieces and the ids of all texts.

    Args:
        corpus: file or folder, see `read_texts`.
        size: largest number of texts of a piece.

    Raises:
        DataError, ImportError, OSError: see `read_texts`, or a file is a pipe.
    """
    for name in list_files(corpus):
        check_rereadable(name)
    pieces: list[Piece] = []
    ids: list[str] = []
    for name, texts in groupby(iterate_checked_texts(corpus), lambda text: text.file):
        while chunk := list(islice(texts, size)):
            _, checksum = count_and_checksum((text.id, text.text) for text in chunk)
            pieces.append(Piece(len(pieces), name, chunk[0].place, len(ids), len(chunk), checksum))
            ids += [text.id for text in chunk]
        pieces[-1] = replace(pieces[-1], is_last=True)
    return pieces, ids


def checksum_of_pieces(pieces: Sequence[Piece]) -> int:
    """Return a checksum of all texts and of where pieces begin."""
    return zlib.crc32(json.dumps([(piece.count, piece.checksum) for piece in pieces]).encode())


class PieceEncoder:
    """Encoder of the pieces of a corpus.

    Args:
        encoder: encoder of the documents.
        k, batch_size, max_length: see `TextEncoder.encode`.
    """

    def __init__(
        self, encoder: TextEncoder, k: int | None, batch_size: int, max_length: int
    ) -> None:
        self.encoder = encoder
        self.k, self.batch_size, self.max_length = k, batch_size, max_length
        self._reader = PieceReader()

    def encode(self, piece: Piece, after_batch: Callable[[int], object]) -> SparseRows:
        """Return the vectors of a piece; see `encode_with_texts`."""
        return self.encode_with_texts(piece, after_batch)[2]

    def encode_with_texts(
        self, piece: Piece, after_batch: Callable[[int], object]
    ) -> tuple[list[str], list[str], SparseRows]:
        """Return the ids, the texts and the vectors of a piece.

        Args:
            piece: the piece.
            after_batch: function that is called after each batch with its number of texts.

        Raises:
            DataError: the corpus has changed.
            DocumentError: the encoder raised an error for a text, or its vector is not finite.
            OSError: the corpus cannot be read.
        """
        ids, texts = self._reader.read(piece)

        def describe(row: int) -> str:
            return f"document {ids[row]!r} (text {piece.start + row + 1} of the corpus)"

        try:
            rows = self._encode(texts, after_batch)
        except OSError:
            raise
        except Exception as error:
            bad = self._find_bad(texts)
            if bad is None:
                raise
            raise DocumentError(f"{describe(bad)} cannot be encoded: {error}") from error
        bad_mask = ~rows.values.isfinite().all(1)
        if bad_mask.any():  # it would rank nonsense
            raise DocumentError(
                "the encoder must give finite weights, got NaN or infinity for "
                f"{describe(int(bad_mask.nonzero()[0]))} with weights in "
                f"{str(rows.dtype).removeprefix('torch.')}"
            )
        return ids, texts, rows

    def _encode(self, texts: Sequence[str], after_batch: Callable[[int], object]) -> SparseRows:
        prompt = self.encoder.prompt_text(self.encoder.settings.prompt_for("document"))
        return self.encoder.encode_batches(
            texts, prompt, self.k, self.batch_size, self.max_length, after_batch
        )

    def _find_bad(self, texts: Sequence[str]) -> int | None:
        """Return the number of a text that the encoder does not take alone, or None."""
        start, stop = 0, len(texts)
        while stop - start > 1:
            middle = (start + stop) // 2
            start, stop = (start, middle) if self._fails(texts[start:middle]) else (middle, stop)
        return start if self._fails(texts[start:stop]) else None

    def _fails(self, texts: Sequence[str]) -> bool:
        try:
            self._encode(texts, lambda count: None)
        except Exception:
            return True
        return False


class PieceReader:
    """Reader of pieces, which keeps a file open between two of its pieces."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._file: TextFile | None = None

    def __reduce__(self) -> tuple[type[PieceReader], tuple[()]]:
        return type(self), ()  # another process opens files itself

    def read(self, piece: Piece) -> tuple[list[str], list[str]]:
        """Return the ids and the texts of a piece.

        Raises:
            DataError: they are others than before.
        """
        if self._file is None or self._name != piece.file:
            self.close()
            self._name, self._file = piece.file, TextFile(piece.file)
        # A text behind the last one has been added.
        found = islice(self._file.read(piece.place), piece.count + piece.is_last)
        pairs = [pair for _, _, pair in found]
        if piece.is_last:
            self.close()
        if count_and_checksum(pairs) != (piece.count, piece.checksum):
            raise DataError(
                f"{piece.file} must stay as it is while it is encoded, got other texts behind "
                f"text {piece.start} of the corpus"
            )
        return [text_id for text_id, _ in pairs], [text for _, text in pairs]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
