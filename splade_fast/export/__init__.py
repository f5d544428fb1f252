"""Writers of SparseRows for search engines, vector stores and libraries (docs/exports.md)."""

from splade_fast.export.anserini import write_anserini
from splade_fast.export.bm25s import write_bm25s
from splade_fast.export.npz import write_npz
from splade_fast.export.parquet import parquet_rows, write_parquet
from splade_fast.export.qdrant import qdrant_id, qdrant_points, upload_to_qdrant, write_qdrant
from splade_fast.export.search_engine import (
    elasticsearch_query,
    opensearch_query,
    write_elasticsearch,
    write_opensearch,
)
from splade_fast.export.seismic import write_seismic

__all__ = [
    "elasticsearch_query",
    "opensearch_query",
    "parquet_rows",
    "qdrant_id",
    "qdrant_points",
    "upload_to_qdrant",
    "write_anserini",
    "write_bm25s",
    "write_elasticsearch",
    "write_npz",
    "write_opensearch",
    "write_parquet",
    "write_qdrant",
    "write_seismic",
]
