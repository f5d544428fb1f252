"""Layouts of training data: the kind of examples, and the columns that make them up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from splade_fast.search.texts import DataError

Kind = Literal["pairs", "labelled pairs", "hard negatives", "scored lists"]
Columns = Sequence[str] | Mapping[str, str]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("query", "document"),
    "labelled pairs": ("query", "document", "label"),
    "hard negatives": ("query", "document", "negatives"),
    "scored lists": ("query", "documents", "scores"),
}

IGNORED = "-"
# Parts of an example, and the names that sources give their columns.
_TEXTS = {
    "query": ("query", "anchor", "question", "sentence1", "sentence_a"),
    "document": (
        *("document", "doc", "passage", "answer", "sentence2", "sentence_b"),
        *("positive", "positives", "pos", "positive_passages"),
    ),
    "negatives": ("negatives", "negative", "neg", "hard_negatives", "negative_passages"),
    "documents": ("documents", "docs", "passages"),
}
NUMBERS = {
    "scores": ("scores", "score", "label", "labels", "teacher_scores"),
    "positive_scores": ("positive_scores", "positive_score", "pos_scores", "pos_score"),
    "negative_scores": ("negative_scores", "negative_score", "neg_scores", "neg_score"),
}
_IDS = {
    "query": ("query_id", "query-id", "qid"),
    "document": (
        *("document_id", "doc_id", "docid", "docno", "passage_id", "corpus-id", "pid"),
        *("positive_id", "pos_id", "pos_pid", "pid_pos"),
    ),
    "negatives": ("negative_id", "neg_id", "neg_pid", "pid_neg", "negative_ids", "neg_pids"),
    "documents": ("document_ids", "doc_ids", "docids", "docnos", "passage_ids", "pids"),
}
_NUMBERED_NEGATIVE = re.compile(r"(negative|neg)_\d+")
_PARTS = (*_TEXTS, *NUMBERS, "label", IGNORED)


@dataclass(frozen=True)
class TextLookups:
    """Mappings from ids to texts, for sources that hold ids; None where a source holds texts."""

    queries: Mapping[str, str] | None = None
    documents: Mapping[str, str] | None = None

    def for_part(self, part: str) -> Mapping[str, str] | None:
        """Return the texts of a part's ids."""
        return self.queries if part == "query" else self.documents


@dataclass(frozen=True)
class Layout:
    """Kind of the examples, and the columns of the source for each part."""

    kind: Kind
    parts: dict[str, tuple[str, ...]]


def infer_layout(
    names: Iterable[str], *, renamed: Mapping[str, str] | None, lookups: TextLookups
) -> Layout:
    """Infer what the columns of a source hold.

    Args:
        names: names of the source's columns.
        renamed: {name: part} for names that do not tell the part; "-" ignores a column.
        lookups: texts of the parts that are ids.

    Raises:
        DataError: the columns make up no kind, or two columns hold the same part.
    """
    names = list(names)
    parts = infer_parts(names, renamed=renamed, lookups=lookups)
    kind = _infer_kind_of_parts(set(parts))
    if kind is None:
        expected = "; or ".join(", ".join(columns) for columns in COLUMNS.values())
        raise DataError(f"expected the columns {expected} (or synonyms), got {join_names(names)}")
    return Layout(kind, parts)


def infer_parts(
    names: Iterable[str], *, renamed: Mapping[str, str] | None, lookups: TextLookups
) -> dict[str, tuple[str, ...]]:
    """Return the columns of each part of an example; see `infer_layout`.

    Raises:
        DataError: two columns hold the same part, or `renamed` names unknown columns or parts.
    """
    names, renamed = list(names), dict(renamed or {})
    for name, part in renamed.items():
        if name not in names:
            raise DataError(f"columns names {name!r}, which is not there: {join_names(names)}")
        if part not in _PARTS:
            raise DataError(f"columns must map to one of {join_names(_PARTS)}, got {part!r}")
    parts: dict[str, tuple[str, ...]] = {}
    for name in names:
        held = renamed[name] if name in renamed else infer_part(name, lookups)
        if held is not None and held != IGNORED:
            held = "scores" if held == "label" else held
            parts[held] = (*parts.get(held, ()), name)
    for part, found in parts.items():
        if len(found) > 1 and part != "negatives":
            raise DataError(
                f"expected one column for {part}, got {join_names(found)}; see columns="
            )
    return parts


def find_id_name(part: str, names: Iterable[str]) -> str | None:
    """Return the column that holds the ids of a part, or None."""
    return next((name for name in names if name.strip().lower() in _IDS[part]), None)


def infer_part(name: str, lookups: TextLookups) -> str | None:
    """Return the part that a column of this name holds, or None for an unknown name."""
    name = name.strip().lower()
    for part, known in _TEXTS.items():
        if lookups.for_part(part) is not None and name in _IDS[part]:
            return part
        if name in known or (part == "negatives" and _NUMBERED_NEGATIVE.fullmatch(name)):
            return part
    return next((part for part, known in NUMBERS.items() if name in known), None)


def infer_named_part(name: str) -> str | None:
    """Return the part that a column of this name holds as texts, ids or numbers, or None."""
    texts_or_numbers = infer_part(name, TextLookups())
    if texts_or_numbers is not None:
        return texts_or_numbers
    name = name.strip().lower()
    return next((part for part, known in _IDS.items() if name in known), None)


def infer_kind(columns: Iterable[str]) -> Kind:
    """Return the kind of examples that have these columns of load_training_data.

    Raises:
        DataError: no kind has these columns.
    """
    found = set(columns)
    for kind, expected in COLUMNS.items():
        if found == set(expected):
            return kind
    raise DataError(f"expected the columns of load_training_data, got {join_names(sorted(found))}")


def _infer_kind_of_parts(parts: set[str]) -> Kind | None:
    texts = parts & _TEXTS.keys()
    numbers = parts & NUMBERS.keys()
    both_scores = {"positive_scores", "negative_scores"}
    if texts == {"query", "documents"} and numbers == {"scores"}:
        return "scored lists"
    if texts == {"query", "document", "negatives"} and numbers in ({"scores"}, both_scores):
        return "scored lists"
    if texts == {"query", "document", "negatives"} and not numbers:
        return "hard negatives"
    if texts == {"query", "document"} and numbers == {"scores"}:
        return "labelled pairs"
    return "pairs" if texts == {"query", "document"} and not numbers else None


def join_names(values: Iterable[Any]) -> str:
    """Return the values as a list for a message."""
    return ", ".join(map(str, values)) or "none"
