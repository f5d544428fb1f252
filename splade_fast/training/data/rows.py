"""Conversion of a source's rows to examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from splade_fast._checks import check_unicode
from splade_fast.search.texts import DataError
from splade_fast.training.data.layout import NUMBERS, Layout, TextLookups, join_names


def convert_row(record: Mapping[str, Any], layout: Layout, lookups: TextLookups) -> dict[str, Any]:
    """Return one example in the columns of its kind (see COLUMNS).

    Args:
        record: one row of the source.
        layout: layout of the source.
        lookups: texts of the parts that are ids.

    Raises:
        DataError: a part is missing, empty or out of range.
    """
    values: dict[str, Any] = {}
    for part, names in layout.parts.items():
        missing = [name for name in names if name not in record]
        if missing:
            raise DataError(
                f"expected the columns of the first row, {join_names(missing)} is missing"
            )
        found = [record[name] for name in names]
        if part in NUMBERS:
            values[part] = parse_numbers(found[0], part)
        else:
            values[part] = parse_texts(found, part, lookups.for_part(part))
    row: dict[str, Any] = {"query": values["query"][0]}
    if layout.kind == "scored lists":
        return row | _make_scored_list(values)
    row["document"] = values["document"][0]
    if layout.kind == "hard negatives":
        row["negatives"] = values["negatives"]
    if layout.kind == "labelled pairs":
        row["label"] = parse_label(values["scores"])
    return row


def _make_scored_list(values: dict[str, Any]) -> dict[str, Any]:
    if "documents" in values:
        documents, scores = values["documents"], values["scores"]
    else:
        documents = [values["document"][0], *values["negatives"]]
        if "scores" in values:
            scores = values["scores"]
            if len(scores) == len(documents) - 1:  # margins of the positive over each negative
                scores = [0.0, *(-margin for margin in scores)]
        else:
            scores = [values["positive_scores"][0], *values["negative_scores"]]
    if len(documents) != len(scores):
        raise DataError(f"expected {len(documents)} scores, one per document, got {len(scores)}")
    if len(documents) < 2:
        raise DataError(f"expected at least 2 scored documents, got {len(documents)}")
    return {"documents": documents, "scores": scores}


def parse_label(numbers: list[float]) -> float:
    """Return the label of a pair, which is the only number, from 0 to 1.

    Raises:
        DataError: it is not.
    """
    if len(numbers) != 1 or not 0 <= numbers[0] <= 1:
        raise DataError(f"label must be one number from 0 to 1, got {join_names(numbers)}")
    return numbers[0]


def parse_texts(found: list[Any], part: str, texts_by_id: Mapping[str, str] | None) -> list[str]:
    """Return all texts of a part; query and document use the first.

    Args:
        found: texts, passages {title, text} or ids, and lists of them.
        part: name of the part, for messages.
        texts_by_id: texts of the ids; None if there are texts.

    Raises:
        DataError: there is none, one is empty or no text, or an id is unknown.
    """
    values = [v for value in found for v in (value if isinstance(value, list | tuple) else [value])]
    if not values:
        raise DataError(f"{part} must hold at least one text, got none")
    return [_parse_text(value, part, texts_by_id) for value in values]


def _parse_text(value: Any, part: str, texts_by_id: Mapping[str, str] | None) -> str:
    if texts_by_id is not None:
        text = texts_by_id.get(str(value).strip(" ")) if _is_id(value) else None
        if text is None:
            raise DataError(f"{part} must be an id of the given texts, got {value!r}")
    else:
        text = _join_passage(value) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise DataError(f"{part} must be text, got {value!r}")
    if not text.strip():
        raise DataError(f"{part} must not be empty, got {text!r}")
    check_unicode(part, text)
    return text


def _is_id(value: Any) -> bool:
    return isinstance(value, str | Integral) and not isinstance(value, bool)


def _join_passage(passage: Mapping[str, Any]) -> Any:
    """Return title and text of a passage {docid, title, text}."""
    title, text = passage.get("title"), passage.get("text")
    return f"{title} {text}" if title and text else text


def parse_numbers(value: Any, part: str) -> list[float]:
    """Return the numbers of a part, one or a list of them.

    Raises:
        DataError: there is none, or one is not finite.
    """
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
