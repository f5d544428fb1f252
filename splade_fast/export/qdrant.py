"""Points for Qdrant: as objects of its client, uploaded, or as JSON lines."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import DocumentId, Documents, check_arguments, documents
from splade_fast.export._json_lines import encoded, number_format, write_lines
from splade_fast.ops.sparse_rows import SparseRows

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import PointStruct

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://pypi.org/project/splade_fast")
_NUMBERS = 2**64  # that Qdrant has


def qdrant_id(document_id: DocumentId) -> DocumentId:
    """The id of a document's point: Qdrant has whole numbers below 2⁶⁴ and UUIDs alone.

    Such a number, also as text ("17", not "017"), and a UUID stay; any other text becomes a UUID
    made from it, always the same.

    Raises:
        ValueError: document_id is a negative or too large int.
    """
    if isinstance(document_id, str):
        return _number_or_uuid(document_id)
    if not 0 <= document_id < _NUMBERS:
        raise ValueError(f"ids must be between 0 and 2**64 - 1, got {document_id}")
    return document_id


def qdrant_points(
    rows: SparseRows,
    ids: Sequence[DocumentId] | None = None,
    *,
    payloads: Iterable[Mapping[str, Any]] | None = None,
    vector_name: str = "splade",
    empty: str = "keep",
    show_progress: bool = True,
) -> Iterator[PointStruct]:
    """A point for each row, made while they are consumed.

    Args:
        rows: (N, V).
        ids: of the documents, unique; the rows' numbers without. A point has the id
            `qdrant_id(id)`, and the document's own in its payload under "id".
        payloads: one for each row; an "id" in it goes before the document's.
        vector_name: of the sparse vector in the collection.
        empty: "keep", "skip" or "error" for documents without entries. Qdrant takes them, and
            never finds them.
        show_progress: draw a progress bar.

    Raises:
        TypeError, ValueError: an argument does not fit, or a weight is not finite.
        ImportError: qdrant-client is not installed.
    """
    models = _models()
    check_arguments(rows, ids, empty, payloads)
    return _points(
        models,
        documents(rows, ids, empty, extras=payloads, show_progress=show_progress),
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
    """Send `qdrant_points` in batches; a collection of that name is made if there is none.

    Args:
        client: connected, or in memory.
        collection: its name.
        batch_size: points of one request.
        rows, ids, payloads, vector_name, empty, show_progress: see `qdrant_points`.

    Raises:
        TypeError, ValueError, ImportError: as `qdrant_points`, before anything is sent but for
            what is wrong with later rows; or batch_size is below 1.
    """
    models = _models()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
    """The points as JSON lines, as Qdrant's REST interface takes them (`PUT …/points`).

    Args:
        path: a folder to write, with `points.jsonl` in it; must not exist.
        rows, ids, payloads, vector_name, empty, show_progress: see `qdrant_points`.

    Returns:
        How many points were written.

    Raises:
        FileExistsError: path exists.
        TypeError, ValueError: as `qdrant_points`.
    """
    check_arguments(rows, ids, empty, payloads)
    chunks = documents(rows, ids, empty, extras=payloads, show_progress=show_progress)
    number = number_format(rows)
    with new_folder(path) as folder:
        return write_lines(
            folder / "points.jsonl",
            (_lines(chunk, encoded(vector_name), number) for chunk in chunks),
        )


def _points(models: Any, chunks: Iterable[Documents], vector_name: str) -> Iterator[PointStruct]:
    for chunk in chunks:
        columns, values = chunk.columns.tolist(), chunk.values.tolist()
        for id_, payload, (start, stop) in zip(
            chunk.ids, chunk.extras, pairwise(chunk.bounds()), strict=True
        ):
            vector = models.SparseVector(indices=columns[start:stop], values=values[start:stop])
            yield models.PointStruct(
                id=qdrant_id(id_), vector={vector_name: vector}, payload=_payload(id_, payload)
            )


def _lines(chunk: Documents, vector_name: str, number: str) -> Iterator[str]:
    columns, values = chunk.columns.tolist(), chunk.values.tolist()
    for id_, payload, (start, stop) in zip(
        chunk.ids, chunk.extras, pairwise(chunk.bounds()), strict=True
    ):
        indices = ",".join(map(str, columns[start:stop]))
        weights = ",".join([number] * (stop - start)) % tuple(values[start:stop])
        yield (
            f'{{"id":{encoded(qdrant_id(id_))},"vector":{{{vector_name}:'
            f'{{"indices":[{indices}],"values":[{weights}]}}}},'
            f'"payload":{encoded(_payload(id_, payload))}}}\n'
        )


def _payload(document_id: DocumentId, payload: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"id": document_id, **(payload or {})}


def _number_or_uuid(text: str) -> DocumentId:
    if text.isdecimal() and len(text) <= len(str(_NUMBERS)):
        number = int(text)
        if text == str(number) and number < _NUMBERS:
            return number
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, text))


def _models() -> Any:
    try:
        from qdrant_client import models
    except ImportError as error:
        raise ImportError(
            "points for Qdrant need its client: pip install splade_fast[qdrant]"
        ) from error
    return models
