"""Which column of a source of training data holds what, and its rows in one common form."""

from __future__ import annotations

import math
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
# What a row can be made of: part -> names under which sources are known to have it.
_TEXTS = {
    "query": ("query", "anchor", "question", "sentence1", "sentence_a"),
    "document": (
        *("document", "doc", "passage", "answer", "sentence2", "sentence_b"),
        *("positive", "positives", "pos", "positive_passages"),
    ),
    "negatives": ("negatives", "negative", "neg", "hard_negatives", "negative_passages"),
    "documents": ("documents", "docs", "passages"),
}
_NUMBERS = {
    "scores": ("scores", "score", "label", "labels", "teacher_scores"),
    "positive_scores": ("positive_scores", "positive_score", "pos_scores", "pos_score"),
    "negative_scores": ("negative_scores", "negative_score", "neg_scores", "neg_score"),
}
_IDS = {
    "query": ("query_id", "query-id", "qid"),
    "document": (
        *("document_id", "doc_id", "docid", "passage_id", "corpus-id", "pid"),
        *("positive_id", "pos_id", "pos_pid", "pid_pos"),
    ),
    "negatives": ("negative_id", "neg_id", "neg_pid", "pid_neg", "negative_ids", "neg_pids"),
    "documents": ("document_ids", "doc_ids", "docids", "passage_ids", "pids"),
}
_NUMBERED_NEGATIVE = re.compile(r"(negative|neg)_\d+")
_PARTS = (*_TEXTS, *_NUMBERS, "label", IGNORED)


@dataclass(frozen=True)
class Lookups:
    """Texts of the ids that stand in the place of texts; None: no ids, but the texts themselves."""

    queries: Mapping[str, str] | None = None
    documents: Mapping[str, str] | None = None

    def of(self, part: str) -> Mapping[str, str] | None:
        return self.queries if part == "query" else self.documents


@dataclass(frozen=True)
class Layout:
    """The kind of a source's rows, and the columns of the source that each part comes from."""

    kind: Kind
    parts: dict[str, tuple[str, ...]]


def layout_of(names: Iterable[str], *, renamed: Mapping[str, str] | None, ids: Lookups) -> Layout:
    """Find out what the columns of a source hold.

    Args:
        names: the source's own names.
        renamed: {name: part} where the names do not tell it; "-" ignores a column.
        ids: which parts are ids.

    Raises:
        DataError: the columns make none of the kinds, or two columns the same part.
    """
    names, renamed = list(names), dict(renamed or {})
    for name, part in renamed.items():
        if name not in names:
            raise DataError(f"columns names {name!r}, which is not there: {_listed(names)}")
        if part not in _PARTS:
            raise DataError(f"columns must map to one of {_listed(_PARTS)}, got {part!r}")
    parts: dict[str, tuple[str, ...]] = {}
    for name in names:
        held = renamed[name] if name in renamed else part_of(name, ids)
        if held is not None and held != IGNORED:
            held = "scores" if held == "label" else held
            parts[held] = (*parts.get(held, ()), name)
    for part, found in parts.items():
        if len(found) > 1 and part != "negatives":
            raise DataError(f"expected one column for {part}, got {_listed(found)}; see columns=")
    kind = _kind_of_parts(set(parts))
    if kind is None:
        expected = "; or ".join(", ".join(columns) for columns in COLUMNS.values())
        raise DataError(f"expected the columns {expected} (or synonyms), got {_listed(names)}")
    return Layout(kind, parts)


def part_of(name: str, ids: Lookups) -> str | None:
    """What a column of that name holds; None for a name that means nothing."""
    name = name.strip().lower()
    for part, known in _TEXTS.items():
        if ids.of(part) is not None and name in _IDS[part]:
            return part
        if name in known or (part == "negatives" and _NUMBERED_NEGATIVE.fullmatch(name)):
            return part
    return next((part for part, known in _NUMBERS.items() if name in known), None)


def _kind_of_parts(parts: set[str]) -> Kind | None:
    texts = parts & _TEXTS.keys()
    numbers = parts & _NUMBERS.keys()
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


def row_of(record: Mapping[str, Any], layout: Layout, ids: Lookups) -> dict[str, Any]:
    """One example in the columns of its kind (see COLUMNS).

    Args:
        record: one row of the source.
        layout: of the source.
        ids: the texts of ids, where the source holds ids.

    Raises:
        DataError: a part is missing, empty, or out of range.
    """
    values: dict[str, Any] = {}
    for part, names in layout.parts.items():
        missing = [name for name in names if name not in record]
        if missing:
            raise DataError(f"expected the columns of the first row, {_listed(missing)} is missing")
        found = [record[name] for name in names]
        if part in _NUMBERS:
            values[part] = _numbers(found[0], part)
        else:
            values[part] = _texts(found, part, ids.of(part))
    row: dict[str, Any] = {"query": values["query"][0]}
    if layout.kind == "scored lists":
        return row | _scored_list(values)
    row["document"] = values["document"][0]
    if layout.kind == "hard negatives":
        row["negatives"] = values["negatives"]
    if layout.kind == "labelled pairs":
        row["label"] = _label(values["scores"])
    return row


def _scored_list(values: dict[str, Any]) -> dict[str, Any]:
    if "documents" in values:
        documents, scores = values["documents"], values["scores"]
    else:
        documents = [values["document"][0], *values["negatives"]]
        if "scores" in values:
            scores = values["scores"]
            if len(scores) == len(documents) - 1:  # margins: how much better the positive is
                scores = [0.0, *(-margin for margin in scores)]
        else:
            scores = [values["positive_scores"][0], *values["negative_scores"]]
    if len(documents) != len(scores):
        raise DataError(f"expected {len(documents)} scores, one per document, got {len(scores)}")
    if len(documents) < 2:
        raise DataError(f"expected at least 2 scored documents, got {len(documents)}")
    return {"documents": documents, "scores": scores}


def _label(numbers: list[float]) -> float:
    if len(numbers) != 1 or not 0 <= numbers[0] <= 1:
        raise DataError(f"label must be one number from 0 to 1, got {_listed(numbers)}")
    return numbers[0]


def _texts(found: list[Any], part: str, texts_of_ids: Mapping[str, str] | None) -> list[str]:
    """All texts of a part, of which `query` and `document` use the first."""
    values = [v for value in found for v in (value if isinstance(value, list | tuple) else [value])]
    if not values:
        raise DataError(f"{part} must hold at least one text, got none")
    return [_text(value, part, texts_of_ids) for value in values]


def _text(value: Any, part: str, texts_of_ids: Mapping[str, str] | None) -> str:
    if texts_of_ids is not None:
        text = texts_of_ids.get(str(value))
        if text is None:
            raise DataError(f"{part} must be an id of the given texts, got {value!r}")
    else:
        text = _text_of_passage(value) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise DataError(f"{part} must be text, got {value!r}")
    if not text.strip():
        raise DataError(f"{part} must not be empty, got {text!r}")
    return text


def _text_of_passage(passage: Mapping[str, Any]) -> Any:
    """A passage of the form {docid, title, text}: the title goes before the text."""
    title, text = passage.get("title"), passage.get("text")
    return f"{title} {text}" if title and text else text


def _numbers(value: Any, part: str) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    numbers = []
    for given in values:
        try:
            number = float(given)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{part} must be numbers, got {given!r}") from None
        if not math.isfinite(number):
            raise DataError(f"{part} must be finite, got {number}")
        numbers.append(number)
    if not numbers:
        raise DataError(f"{part} must hold at least one number, got none")
    return numbers


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
