"""Points for Qdrant: objects of its client, uploads, and files of JSON lines."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from splade_fast._atomic_files import new_folder
from splade_fast._checks import check_count
from splade_fast.export._documents import (
    FLOAT32,
    Documents,
    check_arguments,
    iterate_documents,
)
from splade_fast.export._ids import DocumentId, plain_id
from splade_fast.export._json_lines import check_payload, number_format, to_json, write_lines
from splade_fast.ops.sparse_rows import SparseRows

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import PointStruct

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://pypi.org/project/splade_fast")
_NUM_IDS = 2**64  # Qdrant's numeric ids are unsigned 64-bit integers


def qdrant_id(document_id: DocumentId) -> DocumentId:
    """Return the id of a document's point: an integer below 2⁶⁴ or a UUID, as Qdrant requires.

    Integers, their decimal text ("17", but not "017") and UUIDs are kept. Any other text is mapped
    to a UUID, always to the same one.

    Args:
        document_id: id of the document.

    Raises:
        TypeError: document_id is neither a string nor an integer.
        ValueError: document_id is a negative or too large integer.

    Example::

        >>> sf.export.qdrant_id("17")
        17
        >>> sf.export.qdrant_id("d1")
        '0d6226ff-31c7-5210-955e-fa79b20e54eb'
    """
    document_id = plain_id(document_id)
    if isinstance(document_id, str):
        return _number_or_uuid(document_id)
    if not 0 <= document_id < _NUM_IDS:
        raise ValueError(f"ids must be between 0 and 2**64 - 1, got {document_id}")
    return document_id


ID_RULES: dict[str, Any] = {"to_stored": qdrant_id}


def qdrant_points(
    rows: SparseRows,
    ids: Sequence[DocumentId] | None = None,
    *,
    payloads: Iterable[Mapping[str, Any]] | None = None,
    vector_name: str = "splade",
    empty: str = "keep",
    show_progress: bool = True,
) -> Iterator[PointStruct]:
    """Return an iterator over a point for each row, made on demand.

    Args:
        rows: (N, V).
        ids: ids of the documents; the row numbers by default. A point has the id `qdrant_id(id)`,
            which must be unique, and the document's id in its payload under "id".
        payloads: a payload for each row; its "id" replaces the document's.
        vector_name: name of the sparse vector in the collection.
        empty: "keep", "skip" or "error" for documents without entries. Qdrant accepts them, but
            never returns them.
        show_progress: draw a progress bar.

    Raises:
        TypeError: rows are not SparseRows.
        ValueError: an argument is invalid, or a weight is not finite in float32.
        ImportError: qdrant-client is not installed.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> points = sf.export.qdrant_points(rows, [17, 18], show_progress=False)
        >>> [point.id for point in points]
        [17, 18]
    """
    models = _import_models()
    _check_name(vector_name)
    ids = check_arguments(rows, ids, empty, payloads, **ID_RULES)
    return _points(
        models,
        iterate_documents(
            rows, ids, empty, extras=payloads, weights=FLOAT32, show_progress=show_progress
        ),
        vector_name,
    )


def upload_to_qdrant(
    client: QdrantClient,
    collection: str,
    rows: SparseRows,
    ids: Sequence[DocumentId] | None = None,
    *,
    payloads: Iterable[Mapping[str, Any]] | None = None,
    vector_name: str = "splade",
    batch_size: int = 256,
    empty: str = "keep",
    show_progress: bool = True,
) -> None:
    """Send `qdrant_points` in batches, after making the collection if it is missing.

    Args:
        client: a connected client, or one in memory.
        collection: name of the collection.
        batch_size: number of points of a request.
        rows, ids, payloads, vector_name, empty, show_progress: see `qdrant_points`.

    Raises:
        TypeError, ValueError, ImportError: see `qdrant_points`; or batch_size is below 1. Invalid
            arguments raise before anything is sent; invalid weights, and invalid payloads of an
            iterator, when their row is reached.

    Example::

        >>> from qdrant_client import QdrantClient
        >>> client = QdrantClient(":memory:")
        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.upload_to_qdrant(client, "documents", rows)
        >>> client.count("documents").count
        2
    """
    models = _import_models()
    batch_size = check_count("batch_size", batch_size, 1)
    if isinstance(payloads, Sequence):
        for row, payload in enumerate(payloads):
            check_payload(payload, row)
            to_json(payload, f"payloads[{row}]")
    points = qdrant_points(
        rows,
        ids,
        payloads=payloads,
        vector_name=vector_name,
        empty=empty,
        show_progress=show_progress,
    )
    if not client.collection_exists(collection):
        client.create_collection(
            collection,
            vectors_config={},
            sparse_vectors_config={vector_name: models.SparseVectorParams()},
        )
    client.upload_points(collection, points, batch_size=batch_size, wait=True)


def write_qdrant(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    payloads: Iterable[Mapping[str, Any]] | None = None,
    vector_name: str = "splade",
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Write the points as JSON lines for Qdrant's REST interface (`PUT .../points`).

    Args:
        path: folder to write, with a file `points.jsonl`; must not exist.
        rows, ids, payloads, vector_name, empty, show_progress: see `qdrant_points`.

    Returns:
        Number of points written.

    Raises:
        FileExistsError: `path` exists.
        TypeError, ValueError: see `qdrant_points`.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_qdrant(rows, "qdrant", [17, 18])
        2
    """
    ids = check_arguments(rows, ids, empty, payloads, **ID_RULES)
    vector_key = _check_name(vector_name)
    chunks = iterate_documents(
        rows, ids, empty, extras=payloads, weights=FLOAT32, show_progress=show_progress
    )
    number = number_format(rows)
    with new_folder(path) as folder:
        return write_lines(
            folder / "points.jsonl",
            (_lines(chunk, vector_key, number) for chunk in chunks),
        )


def _points(models: Any, chunks: Iterable[Documents], vector_name: str) -> Iterator[PointStruct]:
    for chunk in chunks:
        columns, values = chunk.columns.tolist(), chunk.values.tolist()
        for id_, payload, (start, stop) in zip(
            chunk.ids, _payloads(chunk), pairwise(chunk.bounds()), strict=True
        ):
            vector = models.SparseVector(indices=columns[start:stop], values=values[start:stop])
            yield models.PointStruct(
                id=qdrant_id(id_), vector={vector_name: vector}, payload=json.loads(payload)
            )


def _lines(chunk: Documents, vector_name: str, number: str) -> Iterator[str]:
    columns, values = chunk.columns.tolist(), chunk.values.tolist()
    for id_, payload, (start, stop) in zip(
        chunk.ids, _payloads(chunk), pairwise(chunk.bounds()), strict=True
    ):
        indices = ",".join(map(str, columns[start:stop]))
        weights = ",".join([number] * (stop - start)) % tuple(values[start:stop])
        yield (
            f'{{"id":{to_json(qdrant_id(id_), "ids")},"vector":{{{vector_name}:'
            f'{{"indices":[{indices}],"values":[{weights}]}}}},'
            f'"payload":{payload}}}\n'
        )


def _payloads(chunk: Documents) -> Iterator[str]:
    """Yield the payload of each document, with its id, as JSON."""
    for row, id_, payload in zip(chunk.rows, chunk.ids, chunk.extras, strict=True):
        check_payload(payload, row)
        yield to_json({"id": id_, **(payload or {})}, f"payloads[{row}]")


def _check_name(vector_name: str) -> str:
    """Return the name as JSON."""
    if not isinstance(vector_name, str):
        raise TypeError(f"vector_name must be a str, got {type(vector_name).__name__}")
    return to_json(vector_name, "vector_name")


def _number_or_uuid(text: str) -> DocumentId:
    if text.isdecimal() and len(text) <= len(str(_NUM_IDS)):
        number = int(text)
        if text == str(number) and number < _NUM_IDS:
            return number
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, text))


def _import_models() -> Any:
    try:
        from qdrant_client import models
    except ImportError as error:
        raise ImportError(
            "points for Qdrant need qdrant-client: pip install splade_fast[qdrant]"
        ) from error
    return models
