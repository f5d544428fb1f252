"""Export to OpenSearch and Elasticsearch, scored as the engines do, since no server runs here."""

import json

import pytest
import torch

from splade_fast import SparseRows, export
from tests.export.conftest import NAMES, NUM_COLS, make_rows

# A column without a name, or whose name has a dot, is named by its number.
FEATURES = [
    f"[#{column}]" if name is None or "." in name else name for column, name in enumerate(NAMES)
]
WRITERS = {
    ("opensearch", "rank_features"): export.write_opensearch,
    ("elasticsearch", "sparse_vector"): export.write_elasticsearch,
    ("elasticsearch", "rank_features"): lambda *args, **kwargs: export.write_elasticsearch(
        *args, field_type="rank_features", **kwargs
    ),
}


def read_documents(folder):
    """Return {id: source} as the bulk interface reads it, and the mapping."""
    lines = (folder / "bulk.ndjson").read_text(encoding="utf-8").splitlines()
    found = {}
    for action, source in zip(lines[::2], lines[1::2], strict=True):
        [(name, target)] = json.loads(action).items()
        assert name == "index"
        found[target["_id"]] = json.loads(source)
    return found, json.loads((folder / "mapping.json").read_text(encoding="utf-8"))


def score(query, source, field):
    """Return the score that the engines compute for a query: a dot product."""
    [(kind, body)] = query.items()
    if kind == "match_none":
        return 0.0
    if kind == "neural_sparse":
        [(asked, tokens)] = body.items()
        weights = tokens["query_tokens"]
    elif kind == "sparse_vector":
        asked, weights = body["field"], body["query_vector"]
    else:
        clauses = [clause["rank_feature"] for clause in body["should"]]
        assert all(clause["linear"] == {} for clause in clauses)
        # The engines split the name of the feature off at the last dot.
        names = [clause["field"].rpartition(".") for clause in clauses]
        assert {before for before, _, _ in names} == {field}
        asked = field
        weights = {
            token: clause["boost"] for (_, _, token), clause in zip(names, clauses, strict=True)
        }
    assert asked == field
    features = source[field]
    return sum(weight * features.get(token, 0.0) for token, weight in weights.items())


def make_queries(engine, field_type, queries, **options):
    if engine == "opensearch":
        return export.opensearch_query(queries, **options)
    return export.elasticsearch_query(queries, field_type=field_type, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("engine", "field_type"), WRITERS)
def test_documents_and_queries_fit_together(tmp_path, ids, engine, field_type, dtype):
    rows = make_rows(dtype)
    payloads = [{"title": f'"{number}"', "tags": [number]} for number in range(len(rows))]
    count = WRITERS[engine, field_type](
        rows,
        tmp_path / "out",
        ids,
        id_to_token=NAMES,
        payloads=iter(payloads),
        field="weights",
        show_progress=False,
    )
    found, mapping = read_documents(tmp_path / "out")
    assert count == len(found) == len(rows)
    assert list(found) == ids
    assert mapping == {"mappings": {"properties": {"weights": {"type": field_type}}}}
    for source, payload, weights in zip(
        found.values(), payloads, rows.to_dicts(FEATURES), strict=True
    ):
        assert source.keys() == {"weights", "title", "tags"}
        assert {name: source[name] for name in payload} == payload
        features = SparseRows.from_dicts(
            [source["weights"]],
            NUM_COLS,
            dict(zip(FEATURES, range(NUM_COLS), strict=True)),
            dtype=dtype,
        )
        assert features.to_dicts(FEATURES) == [weights]
        assert not any("." in name or not name for name in source["weights"])
    queries = rows[[5, 1, 0]]
    expected = queries.to_dense().double() @ rows.to_dense().double().t()
    asked = make_queries(engine, field_type, queries, id_to_token=NAMES, field="weights")
    for query, scores in zip(asked, expected, strict=True):
        for source, truth in zip(found.values(), scores.tolist(), strict=True):
            assert score(query, source, "weights") == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(("engine", "field_type"), WRITERS)
def test_a_query_without_terms_finds_nothing(engine, field_type):
    """An empty bool query would match all documents; the engines refuse other empty queries."""
    nothing = SparseRows.from_dense(torch.zeros(1, NUM_COLS))
    assert make_queries(engine, field_type, nothing) == [{"match_none": {}}]


def test_columns_name_themselves_without_tokens(tmp_path, rows):
    export.write_opensearch(rows, tmp_path / "out", show_progress=False)
    found, _ = read_documents(tmp_path / "out")
    assert list(found) == [str(row) for row in range(len(rows))]
    assert found["5"]["splade"].keys() == {str(column) for column in range(NUM_COLS)}
    [query] = export.opensearch_query(rows[5:6])
    assert query["neural_sparse"]["splade"]["query_tokens"].keys() == found["5"]["splade"].keys()


def test_bad_arguments_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="field_type must be 'rank_features' or 'sparse_vector'"):
        export.write_elasticsearch(rows, tmp_path / "out", field_type="dense_vector")
    with pytest.raises(ValueError, match="field_type must be 'rank_features' or 'sparse_vector'"):
        export.elasticsearch_query(rows, field_type="dense_vector")
    payloads = [{}] * 7 + [{"splade": 1}] * 33
    with pytest.raises(ValueError, match="payloads must not have the field 'splade', got one of"):
        export.write_opensearch(rows, tmp_path / "out", payloads=payloads, show_progress=False)
    for name in ("splade.x", "_id", "_index", "_routing", "_source", ""):
        payloads = [{"splade_": 1}] * 7 + [{name: 1}] * 33
        message = f"payloads must not have the field '{name}', got one of '7'"
        with pytest.raises(ValueError, match=message):
            export.write_opensearch(rows, tmp_path / "out", payloads=payloads, show_progress=False)
    for name in ("", "_id", " ", ".x", "x.", "x. .y"):
        with pytest.raises(ValueError, match=f"field must .*, got '{name}'"):
            export.write_elasticsearch(rows, tmp_path / "out", field=name)
        with pytest.raises(ValueError, match=f"field must .*, got '{name}'"):
            export.opensearch_query(rows, field=name)
    with pytest.raises(TypeError, match="field must be a str, got int"):
        export.elasticsearch_query(rows, field=5)
    with pytest.raises(TypeError, match="rows must be SparseRows, got Tensor"):
        export.opensearch_query(rows.to_dense())
    assert list(tmp_path.iterdir()) == []


def test_opensearch_refuses_query_weights_above_64():
    """Lucene's `FeatureField.newLinearQuery` does; Elasticsearch gives the weight as a boost."""
    rows = SparseRows.from_dicts([{}, {0: 64.0}, {1: 64.5}], num_cols=2)
    [_, query] = export.opensearch_query(rows[:2])
    assert query == {"neural_sparse": {"splade": {"query_tokens": {"0": 64}}}}
    with pytest.raises(ValueError, match="at most 64 in a query, .* got 64.5 in row 2"):
        export.opensearch_query(rows)
    for field_type in ("sparse_vector", "rank_features"):
        assert len(export.elasticsearch_query(rows, field_type=field_type)) == 3
