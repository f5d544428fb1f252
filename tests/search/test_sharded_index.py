"""ShardedIndex finds what one SparseIndex of all documents finds, to the bit."""

import random

import pytest
import torch

import splade_fast as sf
from tests.search.test_sparse_index import assert_same, build, draw_case


def split(docs, seed):
    """Return indexes of consecutive documents, of which some have none."""
    draws = random.Random(seed)
    cuts = sorted(draws.choices(range(len(docs) + 1), k=draws.randint(0, 4)))
    bounds = zip([0, *cuts], [*cuts, len(docs)], strict=True)
    return sf.ShardedIndex([build(docs[start:stop]) for start, stop in bounds])


def test_random_corpora():
    for seed in range(150):
        queries, docs, k = draw_case(seed)
        sharded = split(docs, seed)
        assert (len(sharded), sharded.num_cols, sharded.dtype) == (*docs.shape, docs.dtype)
        assert_same(sharded.search(queries, k), sf.sparse_search(queries, docs, k))


def test_filters():
    for seed in range(60):
        queries, docs, k = draw_case(seed)
        index, sharded = build(docs), split(docs, seed)
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(docs), generator=generator) < torch.rand(1, generator=generator)
        ids = mask.nonzero().flatten().flip(0).tolist()
        some_score = sf.sparse_scores(queries, docs).flatten()[:1]
        min_score = float(some_score) if len(some_score) else 0.0
        for filters in (
            {"min_score": min_score},
            {"allowed": mask},
            {"allowed": ids},
            {"min_score": min_score, "allowed": ids},
        ):
            assert_same(sharded.search(queries, k, **filters), index.search(queries, k, **filters))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_that_are_equal_when_rounded(dtype):
    docs = sf.SparseRows.from_dicts([{0: 256.0}, {0: 256.0, 1: 0.25}], num_cols=2)
    docs, queries = docs.to(dtype=dtype), torch.tensor([[1.0, 1.0]], dtype=dtype)
    scores, ids = sf.ShardedIndex([build(docs[:1]), build(docs[1:])]).search(queries, 2)
    assert ids.tolist() == [[1, 0]]
    assert_same((scores, ids), sf.sparse_search(queries, docs, 2))


def test_later_shards_are_searched_for_better_documents_alone(monkeypatch):
    docs = sf.SparseRows.from_dicts([{0: float(value)} for value in (3, 1, 2, 4)], num_cols=1)
    limits, search = [], sf.SparseIndex.search

    def note(self, queries, k, *, min_score, allowed):
        limits.append(min_score)
        return search(self, queries, k, min_score=min_score, allowed=allowed)

    monkeypatch.setattr(sf.SparseIndex, "search", note)
    sharded = sf.ShardedIndex([build(docs[i : i + 1]) for i in range(4)])
    scores, ids = sharded.search(torch.tensor([[1.0], [2.0]]), 2, min_score=0.5)
    assert ids.tolist() == [[3, 0], [3, 0]]
    assert scores.tolist() == [[4, 3], [8, 6]]
    assert limits == [0.5, 0.5, 1.0, 2.0]


def test_bad_arguments():
    docs = sf.SparseRows.from_dicts([{0: 1.0}], num_cols=2)
    index = build(docs)
    for shards, error, message in (
        ([], ValueError, "shards must hold at least one SparseIndex, got none"),
        ([index, docs], TypeError, "shards must be SparseIndexes, got SparseRows"),
        (
            [index, build(docs.to(dtype=torch.float64))],
            ValueError,
            r"shards\[1\].dtype must be torch.float32 as in shards\[0\], got torch.float64",
        ),
        (
            [index, build(sf.SparseRows.from_dicts([{0: 1.0}], num_cols=3))],
            ValueError,
            r"shards\[1\].num_cols must be 2 as in shards\[0\], got 3",
        ),
    ):
        with pytest.raises(error, match=message):
            sf.ShardedIndex(shards)
    sharded = sf.ShardedIndex([index, index])
    query = torch.tensor([[1.0, 0.0]])
    for arguments, error, message in (
        ({"queries": query, "k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"queries": query[:, :1], "k": 1}, ValueError, "columns"),
        ({"queries": [[1.0]], "k": 1}, TypeError, "queries"),
        ({"queries": query, "k": 1, "min_score": float("nan")}, ValueError, "min_score"),
        (
            {"queries": query, "k": 1, "allowed": [2]},
            ValueError,
            "allowed must hold ids from 0 to 1, got 2",
        ),
    ):
        with pytest.raises(error, match=message):
            sharded.search(**arguments)
    assert repr(sharded) == ("ShardedIndex(2 shards, 2 documents, num_cols=2, dtype=torch.float32)")
