"""Teachers: models whose scores of queries and documents a student learns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from splade_fast._checks import check_count
from splade_fast.encoders.modules_list import read_modules
from splade_fast.encoders.pretrained import load_config, read_json_object
from splade_fast.encoders.term_weights import has_term_weights
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.score import sparse_scores
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.index import Index
from splade_fast.search.models import is_index_of, load_encoders
from splade_fast.search.queries import encode_queries
from splade_fast.search.texts import DataError, Texts

BM25 = "bm25"
KINDS = ("splade", "cross-encoder", "sparse-encoder", "sentence-transformer")
_KINDS_OF_FOLDERS = {
    "CrossEncoder": "cross-encoder",
    "SparseEncoder": "sparse-encoder",
    "SentenceTransformer": "sentence-transformer",
}


class Teacher(Protocol):
    """Function that scores lists of documents; `name` says which one it is.

    Args:
        queries: B texts.
        documents: for each query its documents.

    Returns:
        Scores (number of documents) for each query.

    Example::

        >>> class WordsInCommon:
        ...     name = "words in common"
        ...
        ...     def __call__(self, queries, documents):
        ...         return [
        ...             torch.tensor([len({*query.split()} & {*text.split()}) for text in texts])
        ...             for query, texts in zip(queries, documents)
        ...         ]
        >>> WordsInCommon()(["quick fox"], [["a quick fox", "the lazy dog"]])
        [tensor([2, 0])]
    """

    name: str

    def __call__(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]]
    ) -> list[Tensor]: ...


class EncoderTeacher:
    """Teacher that scores by the inner product of an encoder's vectors.

    Args:
        encoder: encoder of the documents.
        query_encoder: encoder of the queries; None uses `encoder`.
        batch_size: number of texts that go through the model together.
        max_length: number of tokens kept of each text.
        name: name for messages.

    Example::

        >>> from splade_fast.recipe import EncoderTeacher
        >>> teacher = EncoderTeacher(sf.SpladeEncoder.from_pretrained("CHECKPOINT"))
        >>> [scores] = teacher(["quick fox"], [["a quick fox", "the lazy dog"]])
        >>> scores.shape
        torch.Size([2])
    """

    def __init__(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        batch_size: int = 32,
        max_length: int = 256,
        name: str = "encoder",
    ) -> None:
        self.encoder = encoder
        self.query_encoder = encoder if query_encoder is None else query_encoder
        self.batch_size = check_count("batch_size", batch_size, 1)
        self.max_length = check_count("max_length", max_length, 1)
        self.name = name
        self._stored: tuple[dict[str, int], SparseRows] | None = None

    def __call__(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[Tensor]:
        query_rows = encode_queries(
            self.query_encoder, list(queries), self.max_length, self.batch_size
        )
        numbers, rows = self._stored or self._encode(documents)
        for texts in documents:
            _check_known(numbers, texts, self.name)
        return [
            sparse_scores(query_rows[i : i + 1], rows[_select(numbers, texts)])[0]
            for i, texts in enumerate(documents)
        ]

    def use_index(self, index: str | os.PathLike[str], corpus: Texts) -> None:
        """Take the vectors of documents from an index, in place of encoding them.

        All scored documents must then be in the corpus. The index's max_length holds for queries.

        Args:
            index: folder that `encode_corpus` has written with this encoder.
            corpus: ids and texts of the documents of the index.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: the index is damaged, is of another encoder, or holds other documents than
                the corpus.
        """
        stored = Index.load(index)
        if not is_index_of(self.encoder, stored.meta):
            raise DataError(f"index must be of the encoder of {self.name}, got that of another one")
        texts = dict(zip(corpus.ids, corpus.texts, strict=True))
        missing = next((doc_id for doc_id in stored.ids if doc_id not in texts), None)
        if missing is not None or len(texts) != len(stored.ids):
            got = f"{len(stored.ids)} of {len(texts)}" if missing is None else repr(missing)
            raise DataError(f"index must hold the documents of the corpus, got {got}")
        numbers = {texts[doc_id]: number for number, doc_id in enumerate(stored.ids)}
        self._stored = numbers, stored.rows
        self.max_length = stored.meta.max_length
        if stored.meta.k is not None:
            self.name += f" with {stored.meta.k} entries a document"

    def _encode(self, documents: Sequence[Sequence[str]]) -> tuple[dict[str, int], SparseRows]:
        """Return the numbers and the vectors of the distinct texts."""
        numbers = _number_texts(text for texts in documents for text in texts)
        rows = self.encoder.encode(
            list(numbers),
            batch_size=self.batch_size,
            max_length=self.max_length,
            show_progress=False,
            prompt_name=self.encoder.settings.prompt_for("document"),
        )
        return numbers, rows


class SentenceTransformerTeacher:
    """Teacher that scores by the similarity of a SentenceTransformer or SparseEncoder.

    Args:
        model: the model, whose own similarity function counts.
        batch_size: number of texts that go through the model together.
        name: name for messages.

    Example::

        >>> from sentence_transformers import SparseEncoder
        >>> from splade_fast.recipe import SentenceTransformerTeacher
        >>> teacher = SentenceTransformerTeacher(SparseEncoder("CHECKPOINT"))
        >>> [scores] = teacher(["quick fox"], [["a quick fox", "the lazy dog"]])
        >>> scores.shape
        torch.Size([2])
    """

    def __init__(
        self, model: Any, *, batch_size: int = 32, name: str = "sentence-transformer"
    ) -> None:
        self.model = model
        self.batch_size = check_count("batch_size", batch_size, 1)
        self.name = name

    def __call__(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[Tensor]:
        numbers = _number_texts(text for texts in documents for text in texts)
        options = {
            "batch_size": self.batch_size,
            "convert_to_tensor": True,
            "show_progress_bar": False,
        }
        query_vectors = _Vectors(self.model.encode_query(list(queries), **options))
        vectors = _Vectors(self.model.encode_document(list(numbers), **options))
        return [
            self.model.similarity(
                query_vectors.take(torch.tensor([i])), vectors.take(_select(numbers, texts))
            )[0]
            for i, texts in enumerate(documents)
        ]


class CrossEncoderTeacher:
    """Teacher that scores by the logit of a sentence-transformers CrossEncoder.

    The logit is what margin_mse is defined for; an activation of the model, such as a sigmoid, does
    not apply.

    Args:
        model: a CrossEncoder with one label.
        batch_size: number of pairs that go through the model together.
        name: name for messages.

    Raises:
        ValueError: the model has another number of labels.

    Example::

        >>> from sentence_transformers import CrossEncoder
        >>> from splade_fast.recipe import CrossEncoderTeacher
        >>> teacher = CrossEncoderTeacher(CrossEncoder("CHECKPOINT", num_labels=1))
        >>> [scores] = teacher(["quick fox"], [["a quick fox", "the lazy dog"]])
        >>> scores.shape
        torch.Size([2])
    """

    def __init__(self, model: Any, *, batch_size: int = 32, name: str = "cross-encoder") -> None:
        if model.num_labels != 1:
            raise ValueError(f"{name} must have one label, got {model.num_labels}")
        self.model = model
        self.batch_size = check_count("batch_size", batch_size, 1)
        self.name = name

    def __call__(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[Tensor]:
        pairs = [
            (query, text) for query, texts in zip(queries, documents, strict=True) for text in texts
        ]
        scores = self.model.predict(
            pairs,
            activation_fn=torch.nn.Identity(),
            batch_size=self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return list(scores.split([len(texts) for texts in documents]))


class BM25Teacher:
    """Teacher that scores by BM25, with English stop words and without stemming.

    Args:
        corpus: texts whose terms are counted; all scored documents must be among them.
        name: name for messages.

    Raises:
        ImportError: bm25s is not installed.
        ValueError: there is no text.

    Example::

        >>> from splade_fast.recipe import BM25Teacher
        >>> teacher = BM25Teacher(["a quick fox", "the lazy dog", "an old tree"])
        >>> [scores] = teacher(["lazy fox"], [["an old tree", "the lazy dog"]])
        >>> scores[1] > scores[0]
        tensor(True)
    """

    def __init__(self, corpus: Iterable[str], *, name: str = BM25) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError(
                "the teacher bm25 needs the package bm25s: pip install splade_fast[recipe]"
            ) from error
        self.name = name
        self._numbers = _number_texts(corpus)
        if not self._numbers:
            raise ValueError("corpus must hold at least one text, got none")
        self._bm25s = bm25s
        self._retriever = bm25s.BM25()
        tokens = bm25s.tokenize(list(self._numbers), stopwords="en", show_progress=False)
        self._retriever.index(tokens, show_progress=False)

    def __call__(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[Tensor]:
        tokens = self._bm25s.tokenize(
            list(queries), stopwords="en", return_ids=False, show_progress=False
        )
        return [self._score(words, texts) for words, texts in zip(tokens, documents, strict=True)]

    def _score(self, words: list[str], texts: Sequence[str]) -> Tensor:
        _check_known(self._numbers, texts, self.name)
        if not self._retriever.get_tokens_ids(words):
            return torch.zeros(len(texts))
        scores = torch.from_numpy(self._retriever.get_scores(words))
        return scores[_select(self._numbers, texts)]


def load_teacher(
    name: str | os.PathLike[str],
    *,
    corpus: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    max_length: int = 256,
) -> Teacher:
    """Load a teacher by its name.

    Args:
        name: "bm25", or hub name or folder of a model: a CrossEncoder, SparseEncoder or
            SentenceTransformer of sentence-transformers, or a model that splade_fast encodes with.
            "KIND:NAME" names its kind, where the files do not tell: splade, cross-encoder,
            sparse-encoder or sentence-transformer.
        corpus: texts that BM25 counts the terms of.
        device: device of the model.
        batch_size: number of texts or pairs that go through the model together.
        max_length: number of tokens kept of each text by a model that splade_fast encodes with;
            others have their own.

    Raises:
        ImportError: sentence-transformers or bm25s is not installed.
        OSError, ValueError: there is no such model, or no teacher can be made of it.

    Example::

        >>> from splade_fast.recipe import load_teacher
        >>> load_teacher("CHECKPOINT")(["quick fox"], [["a quick fox", "the lazy dog"]])[0].shape
        torch.Size([2])
    """
    name = os.fspath(name)
    if name == BM25:
        if corpus is None:
            raise ValueError("corpus must be given for the teacher bm25, got None")
        return BM25Teacher(corpus)
    kind, colon, folder = name.partition(":")
    if not colon or kind not in KINDS:
        kind, folder = _find_kind(name), name
    if kind == "splade":
        encoder, query_encoder = load_encoders(folder)
        return EncoderTeacher(
            encoder.to(device),
            query_encoder.to(device),
            batch_size=batch_size,
            max_length=max_length,
            name=name,
        )
    classes = _import_sentence_transformers()
    if kind == "cross-encoder":
        model = classes.CrossEncoder(folder, device=str(device))
        return CrossEncoderTeacher(model, batch_size=batch_size, name=name)
    make = classes.SparseEncoder if kind == "sparse-encoder" else classes.SentenceTransformer
    return SentenceTransformerTeacher(
        make(folder, device=str(device)), batch_size=batch_size, name=name
    )


def _find_kind(name: str) -> str:
    """Return the kind of a model from its files.

    Raises:
        ValueError: the model is of another kind.
    """
    if has_term_weights(name, {}):
        return "splade"
    modules = read_modules(name, {}, "document")
    if not modules:
        architectures = load_config(name, {}).architectures or []
        is_classifier = any("ForSequenceClassification" in found for found in architectures)
        return "cross-encoder" if is_classifier else "splade"
    if modules[-1].kind == "SpladePooling":
        return "splade"
    config = read_json_object(name, "config_sentence_transformers.json", {})
    model_type = str(config.get("model_type", "SentenceTransformer"))
    if model_type not in _KINDS_OF_FOLDERS:
        raise ValueError(
            f"a teacher must be one of {', '.join(_KINDS_OF_FOLDERS)}, got {model_type} in {name}"
        )
    return _KINDS_OF_FOLDERS[model_type]


def _import_sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError(
            "this teacher needs sentence-transformers: pip install splade_fast[recipe]"
        ) from error
    return sentence_transformers


class _Vectors:
    """Dense rows of a dense or sparse matrix of vectors."""

    def __init__(self, vectors: Tensor) -> None:
        self._rows: SparseRows | Tensor = (
            SparseRows.from_torch_csr(vectors.cpu().to_sparse_csr())
            if vectors.is_sparse
            else vectors.float().cpu()
        )

    def take(self, numbers: Tensor) -> Tensor:
        """Return the rows of these numbers, (len(numbers), dim)."""
        rows = self._rows[numbers]
        return rows.to_dense() if isinstance(rows, SparseRows) else rows


def _number_texts(texts: Iterable[str]) -> dict[str, int]:
    """Return the distinct texts with their numbers, in the order of their first occurrence."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _check_known(numbers: dict[str, int], texts: Sequence[str], name: str) -> None:
    unknown = next((text for text in texts if text not in numbers), None)
    if unknown is not None:
        raise DataError(f"the corpus of {name} must hold all documents, got {unknown!r}")


def _select(numbers: dict[str, int], texts: Sequence[str]) -> Tensor:
    return torch.tensor([numbers[text] for text in texts])
