"""Bulk lines, mapping and queries for OpenSearch and Elasticsearch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import DocumentId, Documents, check_arguments, documents
from splade_fast.export._json_lines import (
    encoded,
    named_vectors,
    number_format,
    templates,
    token_names,
    write_lines,
)
from splade_fast.ops.sparse_rows import SparseRows

_FIELD_TYPES = ("rank_features", "sparse_vector")
Query = dict[str, Any]


def write_opensearch(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    payloads: Iterable[Mapping[str, Any]] | None = None,
    field: str = "splade",
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Bulk lines for OpenSearch, a `rank_features` field; to be asked by `opensearch_query`.

    `mapping.json` creates the index (`PUT /NAME`), `bulk.ndjson` fills it (`POST /NAME/_bulk`, in
    pieces of an even number of lines). The store keeps 9 significant bits of a weight. In a query
    a dot ends the field's name, so a token with a dot in it goes by `[#column]`.

    Args:
        rows: (N, V), weights above 0.
        path: a folder to write; must not exist.
        ids: of the documents, unique; the rows' numbers without.
        id_to_token: names of the columns; their numbers without.
        payloads: one for each row, further fields of its document.
        field: the field's name.
        empty: "keep", "skip" or "error" for documents without entries. The store takes them.
        show_progress: draw a progress bar.

    Returns:
        How many documents were written.

    Raises:
        FileExistsError: path exists.
        TypeError, ValueError: an argument does not fit, a weight is not finite and above 0, or a
            payload has the field itself.
    """
    return _write_bulk(
        rows, path, ids, id_to_token, payloads, field, "rank_features", empty, show_progress
    )


def write_elasticsearch(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    payloads: Iterable[Mapping[str, Any]] | None = None,
    field: str = "splade",
    field_type: str = "sparse_vector",
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Bulk lines for Elasticsearch; as `write_opensearch`, to be asked by `elasticsearch_query`.

    Args:
        field_type: "sparse_vector" (Elasticsearch 8.11 and later) or "rank_features".
        rows, path, ids, id_to_token, payloads, field, empty, show_progress: see `write_opensearch`.

    Returns:
        How many documents were written.

    Raises:
        FileExistsError, TypeError, ValueError: as `write_opensearch`, or field_type is unknown.
    """
    return _write_bulk(
        rows, path, ids, id_to_token, payloads, field, field_type, empty, show_progress
    )


def opensearch_query(
    queries: SparseRows,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    field: str = "splade",
) -> list[Query]:
    """A `neural_sparse` query of each row, whose score is the dot product.

    Args:
        queries: (Q, V), weights above 0.
        id_to_token: as the documents were written with.
        field: likewise.

    Raises:
        TypeError, ValueError: as `write_opensearch`.
    """
    return _queries(
        queries, id_to_token, lambda weights: {"neural_sparse": {field: {"query_tokens": weights}}}
    )


def elasticsearch_query(
    queries: SparseRows,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    field: str = "splade",
    field_type: str = "sparse_vector",
) -> list[Query]:
    """A query of each row, whose score is the dot product.

    Args:
        queries: (Q, V), weights above 0.
        id_to_token: as the documents were written with.
        field: likewise.
        field_type: likewise. With "rank_features" the query is one clause a token, which suits
            OpenSearch without its neural plugin as well.

    Raises:
        TypeError, ValueError: as `write_elasticsearch`.
    """
    _check_field_type(field_type)
    if field_type == "sparse_vector":
        return _queries(
            queries,
            id_to_token,
            lambda weights: {"sparse_vector": {"field": field, "query_vector": weights}},
        )
    return _queries(
        queries, id_to_token, lambda weights: {"bool": {"should": _clauses(weights, field)}}
    )


def _clauses(weights: dict[str, float], field: str) -> list[Query]:
    return [
        {"rank_feature": {"field": f"{field}.{token}", "boost": weight, "linear": {}}}
        for token, weight in weights.items()
    ]


def _queries(
    queries: SparseRows,
    id_to_token: Sequence[str] | Mapping[int, str] | None,
    query: Callable[[dict[str, float]], Query],
) -> list[Query]:
    check_arguments(queries, None, "keep")
    names = _feature_names(id_to_token, queries.num_cols)
    chunks = documents(queries, None, "keep", positive=True, show_progress=False)
    fields = templates(names, number_format(queries))
    vectors = (json.loads(vector) for chunk in chunks for vector in named_vectors(chunk, fields))
    # Without clauses a bool query would find everything, and the others are errors there.
    return [query(weights) if weights else {"match_none": {}} for weights in vectors]


def _write_bulk(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None,
    id_to_token: Sequence[str] | Mapping[int, str] | None,
    payloads: Iterable[Mapping[str, Any]] | None,
    field: str,
    field_type: str,
    empty: str,
    show_progress: bool,
) -> int:
    check_arguments(rows, ids, empty, payloads)
    _check_field_type(field_type)
    fields = templates(_feature_names(id_to_token, rows.num_cols), number_format(rows))
    chunks = documents(
        rows, ids, empty, extras=payloads, positive=True, show_progress=show_progress
    )
    mapping = {"mappings": {"properties": {field: {"type": field_type}}}}
    with new_folder(path) as folder:
        (folder / "mapping.json").write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
        return write_lines(
            folder / "bulk.ndjson", (_bulk_lines(chunk, fields, field) for chunk in chunks)
        )


def _bulk_lines(chunk: Documents, fields: Sequence[str], field: str) -> Iterator[str]:
    name = encoded(field)
    vectors = named_vectors(chunk, fields)
    for id_, payload, vector in zip(chunk.ids, chunk.extras, vectors, strict=True):
        others = ""
        if payload:
            if field in payload:
                raise ValueError(f"payloads must not have the field {field!r}, got one of {id_!r}")
            others = "," + encoded(dict(payload))[1:-1]
        yield f'{{"index":{{"_id":{encoded(str(id_))}}}}}\n{{{name}:{vector}{others}}}\n'


def _feature_names(
    id_to_token: Sequence[str] | Mapping[int, str] | None, num_cols: int
) -> list[str]:
    return token_names(id_to_token, num_cols, lambda name: "." not in name)


def _check_field_type(field_type: str) -> None:
    if field_type not in _FIELD_TYPES:
        expected = " or ".join(map(repr, _FIELD_TYPES))
        raise ValueError(f"field_type must be {expected}, got {field_type!r}")
