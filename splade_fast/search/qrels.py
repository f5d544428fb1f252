"""Reader of relevance judgements in the formats of TREC and BEIR."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex

from splade_fast._checks import check_integer
from splade_fast.search.lines import (
    DataError,
    parse_id,
    parse_json_object,
    parse_lines,
    quote_start,
)

Qrels = dict[str, dict[str, int]]

# Names in headers and JSON, with - as _. A header names the query first, and the document before
# the last.
_QUERY_NAMES = {"query_id", "qid", "query", "topic_id", "topic"}
_DOCUMENT_NAMES = {"corpus_id", "docid", "doc_id", "docno", "document_id", "document", "doc", "pid"}
_RELEVANCE_NAMES = {"score", "relevance", "rel", "label", "grade"}
_NAMES = (_QUERY_NAMES, _DOCUMENT_NAMES, _RELEVANCE_NAMES)
# Measures hold an array with an element for each relevance up to the largest.
_MAX_RELEVANCE = 999_999
_RELEVANCE = re.compile(r"([+-]?[0-9]{1,6})(\.0*)?")
# White space of trec_eval. An id may hold others, such as a no-break space.
_FIELD = re.compile(r"\S+", re.ASCII)


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read judgements as {query id: {document id: relevance}}.

    Lines hold `query document relevance` (BEIR) or `query 0 document relevance` (TREC), with or
    without a header, or JSON objects with the names of such a header as keys. Tabs separate the
    fields of a line that has tabs, else white space of ASCII does. Blanks around a field do not
    belong to it. A file whose name ends in .gz is decompressed.

    Raises:
        DataError: the file cannot be read or has no judgements, a line is malformed, or a pair is
            judged a second time and differently.
    """
    qrels: Qrels = {}
    for location, judgement in parse_lines(Path(path), _parse_line):
        if judgement is None:  # a header
            continue
        query, document, relevance = judgement
        before = qrels.setdefault(query, {}).setdefault(document, relevance)
        if before != relevance:
            raise DataError(
                f"{location}: {query} {document} must be judged {before} as before, got {relevance}"
            )
    if not qrels:
        raise DataError(f"{path} must hold at least one judgement, got none")
    return qrels


def plain_qrels(qrels: Mapping[str, Mapping[str, SupportsIndex]]) -> Qrels:
    """Return judgements as dicts of str and int, also from mappings and integers of NumPy.

    Raises:
        DataError: nothing is judged.
        TypeError: an id is not a str, a relevance is not an integer, or the judgements of a query
            are not a mapping.
        ValueError: a relevance has more than 6 digits.
    """
    if not qrels:
        raise DataError("qrels must judge at least one query, got none")
    return {query: _plain_judgements(query, judged) for query, judged in qrels.items()}


def _plain_judgements(query: str, judged: Mapping[str, SupportsIndex]) -> dict[str, int]:
    if not isinstance(query, str):
        raise TypeError(f"qrels must have ids that are str, got {query!r}")
    if not isinstance(judged, Mapping):
        got = type(judged).__name__
        raise TypeError(f"qrels[{query!r}] must map document ids to relevances, got {got}")
    for document in judged:
        if not isinstance(document, str):
            raise TypeError(f"qrels[{query!r}] must have ids that are str, got {document!r}")
    return {
        document: _check_relevance(f"qrels[{query!r}][{document!r}]", relevance)
        for document, relevance in judged.items()
    }


def _check_relevance(name: str, value: SupportsIndex) -> int:
    relevance = check_integer(name, value)
    if abs(relevance) > _MAX_RELEVANCE:
        raise ValueError(f"{name} must have at most 6 digits, got {relevance}")
    return relevance


def _parse_line(line: str) -> tuple[str, str, int] | None:
    """Return query, document and relevance of a line, or None for a header."""
    fields = _parse_json_fields(line) if line.startswith("{") else _split_fields(line)
    return None if _is_header(*fields) else _parse_fields(*fields)


def _parse_fields(query: Any, document: Any, relevance: Any) -> tuple[str, str, int]:
    shown = str(relevance).strip()
    found = _RELEVANCE.fullmatch(shown)
    if found is None:
        raise DataError(f"expected a whole number of at most 6 digits as relevance, got {shown!r}")
    return parse_id(query), parse_id(document), int(found[1])


def _split_fields(line: str) -> tuple[str, str, str]:
    fields = line.split("\t") if "\t" in line else _FIELD.findall(line)
    if len(fields) == 5 and not fields[-1].strip():  # a tab ends the line
        fields.pop()
    if len(fields) not in (3, 4):
        raise DataError(
            f"expected query document relevance or query 0 document relevance, "
            f"got {quote_start(line)}"
        )
    return fields[0], fields[-2], fields[-1]


def _parse_json_fields(line: str) -> tuple[Any, Any, Any]:
    return _select_fields(parse_json_object(line), quote_start(line))


def parse_judgement(record: Mapping[str, Any], quoted: str) -> tuple[str, str, int]:
    """Return query, document and relevance of an object with the keys that `read_qrels` knows.

    An object without a relevance judges its document relevant, with 1.

    Args:
        record: the object.
        quoted: the object as a message shows it.

    Raises:
        DataError: a key is missing, or its value is of another type.
    """
    has_relevance = any(_normalise(name) in _RELEVANCE_NAMES for name in record)
    fields = _select_fields(record if has_relevance else {**record, "score": 1}, quoted)
    return _parse_fields(*fields)


def _select_fields(record: Mapping[str, Any], quoted: str) -> tuple[Any, Any, Any]:
    record = {_normalise(name): value for name, value in record.items()}
    names = [record.keys() & expected for expected in _NAMES]
    if any(len(found) != 1 for found in names):
        raise DataError(f"expected one key for each of query, document and relevance, got {quoted}")
    query, document, relevance = (record[name] for [name] in names)
    return query, document, relevance


def _is_header(*fields: Any) -> bool:
    pairs = zip(fields, _NAMES, strict=True)
    return all(_normalise(str(field)) in expected for field, expected in pairs)


def _normalise(name: str) -> str:
    return name.strip().lower().replace("-", "_")
