"""Encoders of a model's documents and queries, and of the queries for an index."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Protocol

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.modules_list import read_modules
from splade_fast.encoders.query_encoder import load_query_encoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder, has_term_weights
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import IndexMeta, is_model_folder, resolve_model
from splade_fast.search.lines import DataError, DataWarning

QUERY_FOLDER = "query"  # in the folder of a model that was trained with another for queries


def find_query_model(model: str | os.PathLike[str]) -> str:
    """Return the folder `query` that training has written into a model's folder, else the model.

    Args:
        model: hub name or folder of the model.
    """
    folder = Path(model) / QUERY_FOLDER
    return str(folder) if is_model_folder(folder) else os.fspath(model)


def load_document_encoder(model: str | os.PathLike[str]) -> TextEncoder:
    """Load the encoder of a model's documents: a TermWeightEncoder or a SpladeEncoder.

    Args:
        model: hub name or folder of the model.

    Raises:
        ImportError, OSError, ValueError: see `from_pretrained` of these classes.
    """
    name = os.fspath(model)
    if has_term_weights(name, {}):
        return TermWeightEncoder.from_pretrained(name)
    return SpladeEncoder.from_pretrained(name)


def load_own_query_encoder(
    model: str | os.PathLike[str], query_model: str | os.PathLike[str] | None = None
) -> tuple[str, TextEncoder] | None:
    """Load the encoder of a model's queries if it is another than that of the documents.

    Args:
        model: hub name or folder of the model.
        query_model: hub name or folder of the model for queries; by default the model's own, which
            `find_query_model` or a Router names.

    Returns:
        Name of the model for queries and its encoder; None for the encoder of the documents.

    Raises:
        ImportError, OSError, ValueError: see `load_query_encoder`.
    """
    name = find_query_model(model) if query_model is None else os.fspath(query_model)
    if resolve_model(name) == resolve_model(model) and not _has_query_route(name):
        return None
    return name, load_query_encoder(name)


def load_encoders(
    model: str | os.PathLike[str], query_model: str | os.PathLike[str] | None = None
) -> tuple[TextEncoder, TextEncoder]:
    """Load the encoders of a model's documents and of its queries, which may be the same.

    Args:
        model, query_model: see `load_own_query_encoder`.

    Raises:
        ImportError, OSError, ValueError: see `load_document_encoder` and `load_query_encoder`.
    """
    documents = load_document_encoder(model)
    own = load_own_query_encoder(model, query_model)
    return documents, documents if own is None else own[1]


class Searched(Protocol):
    """Documents that were encoded with known settings."""

    @property
    def meta(self) -> IndexMeta:
        """Settings of the encoding."""
        ...

    @property
    def num_cols(self) -> int:
        """Number of columns of the vectors."""
        ...


def load_query_encoder_of_index(
    index: Searched,
    *,
    model: str | os.PathLike[str] | None = None,
    query_model: str | os.PathLike[str] | None = None,
) -> TextEncoder:
    """Load the encoder of the queries for an index, and compare it with the index's fingerprints.

    A model that the caller names may differ from the index's own; a warning says so. A
    BagOfWordsQueryEncoder of the same vocabulary always fits.

    Args:
        index: an `Index` or `Shards`.
        model: hub name or folder of the model; by default the index's own models.
        query_model: hub name or folder of the model for queries; by default that of `model`.

    Raises:
        DataError: the index's own model has changed since the index was made, or a model has
            another vocabulary.
        ImportError, OSError, ValueError: see `load_query_encoder`.

    Example::

        >>> from splade_fast.search.index import Index
        >>> from splade_fast.search.models import load_query_encoder_of_index
        >>> with open("fox.tsv", "w") as file:
        ...     _ = file.write("d1\\tquick fox\\n")
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> _ = sf.encode_corpus(encoder, "fox.tsv", "fox", model="CHECKPOINT")
        >>> queries = load_query_encoder_of_index(Index.load("fox"))
        >>> queries.vocab_size == encoder.vocab_size
        True
    """
    is_own = model is None and query_model is None
    if is_own:
        query_model = index.meta.query_model
    if query_model is None:
        query_model = find_query_model(model or index.meta.model)
    name = os.fspath(query_model)
    encoder = load_query_encoder(name)
    if encoder.vocab_size != index.num_cols:
        raise DataError(
            f"the model must have the index's vocabulary of {index.num_cols} entries, "
            f"got {encoder.vocab_size}"
        )
    differences = _find_differences(index.meta, encoder, name, is_own)
    changes = f"other {' and '.join(differences)}"
    if differences and is_own:
        raise DataError(
            f"{name} must be as it was when the index was made, got {changes}; encode the corpus "
            "again, or name the right model"
        )
    if differences:
        made_with = index.meta.query_model or index.meta.model
        warnings.warn(
            f"{name} has {changes} than the model that the index was made with, {made_with}",
            DataWarning,
            stacklevel=2,
        )
    return encoder


def is_index_of(encoder: TextEncoder, meta: IndexMeta) -> bool:
    """Return whether an encoder made the documents of an index, as far as the index tells.

    Args:
        encoder: encoder of documents.
        meta: the settings of the index.
    """
    if meta.fingerprint is None:
        return False
    return not _compare(meta.fingerprint, encoder, "document", meta)


def _find_differences(meta: IndexMeta, encoder: TextEncoder, name: str, is_own: bool) -> list[str]:
    """Return in what an encoder of queries differs from the encoders that an index was made with.

    Args:
        meta: the settings of the index.
        encoder: the encoder of the queries.
        name: its hub name or folder.
        is_own: whether the index, and not the caller, names it.
    """
    if meta.query_fingerprint is not None:
        differences = _compare(meta.query_fingerprint, encoder, "query", meta)
        if is_own or not differences:
            return differences
    if meta.fingerprint is None:
        return []
    differences = _compare(meta.fingerprint, encoder, "document", meta)
    # An encoder of queries alone differs from that of the documents in all but the vocabulary. The
    # index does not know one that came to its model later.
    if differences and (
        isinstance(encoder, BagOfWordsQueryEncoder)
        or (is_own and (name != meta.model or _has_same_documents(meta.fingerprint, name, meta)))
    ):
        return [part for part in differences if part == "vocabulary"]
    return differences


def _has_same_documents(expected: Fingerprint, name: str, meta: IndexMeta) -> bool:
    """Return whether a Router's route for documents, beside that for queries, is as expected."""
    return _has_query_route(name) and not _compare(
        expected, load_document_encoder(name), "document", meta
    )


def _compare(expected: Fingerprint, encoder: TextEncoder, role: str, meta: IndexMeta) -> list[str]:
    return Fingerprint.of(encoder, role, meta.max_length, expected.dtype).differences(expected)


def _has_query_route(name: str) -> bool:
    return read_modules(name, {}, "query") != read_modules(name, {}, "document")
