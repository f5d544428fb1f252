"""A real SPLADE checkpoint and real texts: accelerated, it gives and learns the same."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import (
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)

from examples.docstrings.checkpoint import demo_checkpoint
from examples.docstrings.corpus import parse_pairs
from splade_fast.integrations.sentence_transformers import accelerate
from tests.integrations.test_sentence_transformers_training import trained
from tests.tolerances import assert_accurate


@pytest.fixture(scope="module")
def pairs():
    source = Path(torch.functional.__file__).read_text(encoding="utf-8")
    return parse_pairs(source, "torch.functional")[:8]


@pytest.fixture
def model():
    return SparseEncoder(str(demo_checkpoint()), device="cpu")


def encoded(model, texts):
    return model.encode(texts, show_progress_bar=False).to_dense()


def test_embeddings(model, pairs):
    texts = [pair.document for pair in pairs]
    baseline, truth = encoded(model, texts), encoded(copy.deepcopy(model).double(), texts)
    ours = encoded(accelerate(model), texts)
    assert_accurate(ours, truth, baseline)
    assert 0 < (ours > 0).float().mean() < 0.05


def test_loss_curve(model, pairs, tmp_path):
    columns = {"query": [p.query for p in pairs], "document": [p.document for p in pairs]}
    dataset = Dataset.from_dict(columns)

    def loss(m):
        weights = {"query_regularizer_weight": 5e-5, "document_regularizer_weight": 3e-5}
        return SpladeLoss(m, SparseMultipleNegativesRankingLoss(m), **weights)

    before, _ = trained(copy.deepcopy(model).double(), dataset, loss, tmp_path / "a")
    after, _ = trained(accelerate(model.double()), dataset, loss, tmp_path / "b")
    assert len(set(before)) == len(before) == 4
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-6, atol=0)
