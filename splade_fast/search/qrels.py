"""Reader of relevance judgements in the formats of TREC and BEIR."""

from __future__ import annotations

import os
import re
from pathlib import Path

from splade_fast.search.lines import DataError, parse_id, parse_lines, quote_start

Qrels = dict[str, dict[str, int]]

# Names in headers, with - as _. A header names the query first, and the document before the last.
_QUERY_NAMES = {"query_id", "qid", "query", "topic_id", "topic"}
_DOCUMENT_NAMES = {"corpus_id", "docid", "doc_id", "docno", "document_id", "document", "doc", "pid"}
_RELEVANCE_NAMES = {"score", "relevance", "rel", "label", "grade"}
# Measures hold an array with an element for each relevance up to the largest.
_RELEVANCE = re.compile(r"([+-]?[0-9]{1,6})(\.0*)?")


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read judgements as {query id: {document id: relevance}}.

    Lines hold `query document relevance` (BEIR) or `query 0 document relevance` (TREC), with or
    without a header. Tabs separate the fields of a line that has tabs, else white space does. A
    file whose name ends in .gz is decompressed.

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


def _parse_line(line: str) -> tuple[str, str, int] | None:
    fields = line.split("\t") if "\t" in line else line.split()
    if len(fields) not in (3, 4):
        raise DataError(
            f"expected query document relevance or query 0 document relevance, "
            f"got {quote_start(line)}"
        )
    query, document, relevance = fields[0], fields[-2], fields[-1].strip()
    if _is_header(query, document, relevance):
        return None
    found = _RELEVANCE.fullmatch(relevance)
    if found is None:
        raise DataError(
            f"expected a whole number of at most 6 digits as relevance, got {relevance!r}"
        )
    return parse_id(query), parse_id(document), int(found[1])


def _is_header(*fields: str) -> bool:
    query, document, relevance = (field.strip().lower().replace("-", "_") for field in fields)
    return query in _QUERY_NAMES and document in _DOCUMENT_NAMES and relevance in _RELEVANCE_NAMES
