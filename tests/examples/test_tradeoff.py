import torch

import splade_fast as sf
from examples.docstrings.tradeoff import KEPT, prune, trade_offs


def test_every_row_keeps_its_largest_entries():
    dense = torch.rand(300, 40)  # more rows than a block
    kept = prune(sf.SparseRows.from_dense(dense), 5).to_dense()
    smallest = dense.topk(5).values[:, -1:]
    assert torch.equal(kept, dense * (dense >= smallest))


def test_trade_offs():
    rows = sf.SparseRows.from_dense(torch.rand(10, 300))
    found = trade_offs(rows, lambda searched: float(searched.width))
    assert [point.kept for point in found] == list(KEPT)
    assert [point.mrr for point in found] == [16, 32, 64, 128, 256, 300]
    assert found[0].mib * 2**20 == 10 * (16 * 8 + 4)
    assert found[-1].label == "all"
