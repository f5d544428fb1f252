"""Writers of bulk files and queries for OpenSearch and Elasticsearch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import (
    LUCENE_QUERY,
    POSITIVE_NORMAL_FLOAT32,
    Documents,
    WeightRange,
    check_arguments,
    iterate_documents,
)
from splade_fast.export._ids import DocumentId
from splade_fast.export._json_lines import (
    check_payload,
    format_vectors,
    make_templates,
    name_columns,
    number_format,
    to_json,
    write_lines,
)
from splade_fast.ops.sparse_rows import SparseRows

ID_RULES: dict[str, Any] = {"max_bytes": 512}  # limit of both engines
_RESERVED = ("", "_id", "_index", "_routing", "_source")  # names of no field of a document
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
    """Write documents with a `rank_features` field for OpenSearch; `opensearch_query` queries it.

    `mapping.json` creates the index (`PUT /NAME`), `bulk.ndjson` fills it (`POST /NAME/_bulk`, in
    parts of an even number of lines). OpenSearch keeps 9 significant bits of a weight. In a query
    a dot ends the field's name, so a token that contains a dot is named `[#column]`.

    Args:
        rows: (N, V), weights above 0, and normal numbers of float32.
        path: folder to write; must not exist.
        ids: ids of the documents, unique, of at most 512 bytes; the row numbers by default.
        id_to_token: names of the columns; the column numbers by default.
        payloads: further fields of each document, with other names than `field`, its parts such as
            `field.x`, and the engines' own `_id`, `_index`, `_routing` and `_source`.
        field: name of the field.
        empty: "keep", "skip" or "error" for documents without entries. OpenSearch accepts them.
        show_progress: draw a progress bar.

    Returns:
        Number of documents written.

    Raises:
        FileExistsError: `path` exists.
        TypeError: rows are not SparseRows.
        ValueError: an argument is invalid, a weight is not such a number, or a payload has one of
            these names.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_opensearch(rows, "opensearch", ["d1", "d2"])
        2
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
    """Write documents as `write_opensearch` does, for Elasticsearch and `elasticsearch_query`.

    Args:
        field_type: "sparse_vector" (Elasticsearch 8.11 and later) or "rank_features".
        rows, path, ids, id_to_token, payloads, field, empty, show_progress: see `write_opensearch`.

    Returns:
        Number of documents written.

    Raises:
        FileExistsError, TypeError, ValueError: see `write_opensearch`; or field_type is unknown.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_elasticsearch(rows, "elasticsearch", ["d1", "d2"])
        2
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
    """Return a `neural_sparse` query for each row; the score of a document is the dot product.

    Args:
        queries: (Q, V), weights above 0 and at most 64.
        id_to_token: the names that the documents were written with.
        field: name of the field that the documents were written with.

    Raises:
        TypeError, ValueError: see `write_opensearch`.

    Example::

        >>> queries = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5]]))
        >>> sf.export.opensearch_query(queries, id_to_token=["fox", "dog"])
        [{'neural_sparse': {'splade': {'query_tokens': {'dog': 1.5}}}}]
    """
    _check_field(field)
    return _make_queries(
        queries,
        id_to_token,
        LUCENE_QUERY,
        lambda weights: {"neural_sparse": {field: {"query_tokens": weights}}},
    )


def elasticsearch_query(
    queries: SparseRows,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    field: str = "splade",
    field_type: str = "sparse_vector",
) -> list[Query]:
    """Return a query for each row; the score of a document is the dot product.

    Args:
        queries: (Q, V), weights above 0.
        id_to_token: the names that the documents were written with.
        field: name of the field that the documents were written with.
        field_type: type of the field that the documents were written with. For "rank_features" the
            query has a clause for each token, which OpenSearch without its neural plugin answers
            as well.

    Raises:
        TypeError, ValueError: see `write_elasticsearch`.

    Example::

        >>> queries = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5]]))
        >>> sf.export.elasticsearch_query(queries, id_to_token=["fox", "dog"])
        [{'sparse_vector': {'field': 'splade', 'query_vector': {'dog': 1.5}}}]
    """
    _check_field(field)
    _check_field_type(field_type)
    if field_type == "sparse_vector":
        return _make_queries(
            queries,
            id_to_token,
            POSITIVE_NORMAL_FLOAT32,
            lambda weights: {"sparse_vector": {"field": field, "query_vector": weights}},
        )
    return _make_queries(
        queries,
        id_to_token,
        POSITIVE_NORMAL_FLOAT32,
        lambda weights: {"bool": {"should": _clauses(weights, field)}},
    )


def _clauses(weights: dict[str, float], field: str) -> list[Query]:
    return [
        {"rank_feature": {"field": f"{field}.{token}", "boost": weight, "linear": {}}}
        for token, weight in weights.items()
    ]


def _make_queries(
    queries: SparseRows,
    id_to_token: Sequence[str] | Mapping[int, str] | None,
    allowed: WeightRange,
    query: Callable[[dict[str, float]], Query],
) -> list[Query]:
    check_arguments(queries, None, "keep")
    names = _feature_names(id_to_token, queries.num_cols)
    chunks = iterate_documents(queries, None, "keep", weights=allowed, show_progress=False)
    fields = make_templates(names, number_format(queries))
    vectors = (json.loads(vector) for chunk in chunks for vector in format_vectors(chunk, fields))
    # A bool query without clauses matches all documents; the other kinds are errors when empty.
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
    ids = check_arguments(rows, ids, empty, payloads, **ID_RULES)
    _check_field(field)
    _check_field_type(field_type)
    fields = make_templates(_feature_names(id_to_token, rows.num_cols), number_format(rows))
    chunks = iterate_documents(
        rows,
        ids,
        empty,
        extras=payloads,
        weights=POSITIVE_NORMAL_FLOAT32,
        show_progress=show_progress,
    )
    mapping = {"mappings": {"properties": {field: {"type": field_type}}}}
    with new_folder(path) as folder:
        (folder / "mapping.json").write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
        return write_lines(
            folder / "bulk.ndjson", (_bulk_lines(chunk, fields, field) for chunk in chunks)
        )


def _bulk_lines(chunk: Documents, fields: Sequence[str], field: str) -> Iterator[str]:
    name = to_json(field, "field")
    vectors = format_vectors(chunk, fields)
    for row, id_, payload, vector in zip(chunk.rows, chunk.ids, chunk.extras, vectors, strict=True):
        check_payload(payload, row)
        others = ""
        if payload:
            others = "," + to_json(payload, f"payloads[{row}]")[1:-1]
            _check_fields(payload, field, id_)
        yield f'{{"index":{{"_id":{to_json(str(id_), "ids")}}}}}\n{{{name}:{vector}{others}}}\n'


def _check_fields(payload: Mapping[str, Any], field: str, document_id: DocumentId) -> None:
    """Raise ValueError for a field that the engines refuse, or that is a part of `field`."""
    for name in payload:
        if name in _RESERVED or name == field or name.startswith(f"{field}."):
            raise ValueError(
                f"payloads must not have the field {name!r}, got one of {document_id!r}"
            )


def _feature_names(
    id_to_token: Sequence[str] | Mapping[int, str] | None, num_cols: int
) -> list[str]:
    return name_columns(id_to_token, num_cols, lambda name: "." not in name)


def _check_field(field: str) -> None:
    """Raise if the engines refuse a name of a field."""
    if not isinstance(field, str):
        raise TypeError(f"field must be a str, got {type(field).__name__}")
    to_json(field, "field")
    if field in _RESERVED:
        raise ValueError(f"field must be a name that the engines do not reserve, got {field!r}")
    if not all(part.strip() for part in field.split(".")):
        raise ValueError(f"field must have a name before and after each dot, got {field!r}")


def _check_field_type(field_type: str) -> None:
    if field_type not in _FIELD_TYPES:
        expected = " or ".join(map(repr, _FIELD_TYPES))
        raise ValueError(f"field_type must be {expected}, got {field_type!r}")
