"""A user's script: mypy --strict accepts it and sees the declared types."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import splade_fast as sf
from splade_fast.negative_cache import CacheManager, FixedLenFeature, NegativeCache

hidden, weight = torch.randn(2, 5, 8), torch.randn(30, 8)
pooled = sf.splade_head(hidden, weight, attention_mask=torch.ones(2, 5, dtype=torch.bool))
assert_type(pooled, Tensor)
assert_type(sf.splade_pool(hidden @ weight.T), Tensor)
assert_type(sf.prune_topk(pooled, 4), Tensor)
assert_type(sf.flops_loss(pooled), Tensor)

rows = sf.SparseRows.from_dense(pooled, k=4)
assert_type(rows, sf.SparseRows)
assert_type(rows[0:1], sf.SparseRows)
assert_type(sf.splade_head_topk(hidden, weight, k=4), sf.SparseRows)
assert_type(sf.sparse_scores(rows, rows), Tensor)
assert_type(sf.sparse_search(rows, rows, 1), tuple[Tensor, Tensor])
index = sf.SparseIndex.build(rows, show_progress=False)
assert_type(index, sf.SparseIndex)
assert_type(index.search(rows, 1, min_score=0.5, allowed=[0]), tuple[Tensor, Tensor])

samples = sf.sample_negatives(rows, rows, rng=sf.Philox(0, "cpu"))
assert_type(samples, sf.NegativeSamples)
assert_type(samples.indices, Tensor)
manager = CacheManager({"embedding": FixedLenFeature([8], torch.float32)}, cache_size=16)
assert_type(manager.init_cache(), NegativeCache)


def encode(texts: list[str]) -> sf.SparseRows:
    encoder = sf.SpladeEncoder.from_pretrained("distilbert-base-uncased")
    assert_type(encoder, sf.SpladeEncoder)
    return encoder.encode(texts, k=64, show_progress=False)
