"""Accelerated SparseEncoders under FSDP2 in the trainer of sentence-transformers."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch.distributed.tensor import DTensor

import splade_fast as sf
from splade_fast.integrations.sentence_transformers import accelerate
from splade_fast.training.fsdp import fsdp_of_this_trainer_alone, shard_on_cpus
from tests.integrations.sparse_encoders import sentences, splade
from tests.ranks import run_ranks
from tests.training.runs import be_rank

FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
LOSSES = {
    "splade": lambda model, relevance: SpladeLoss(model, relevance, 1e-3, 1e-3),
    "cached": lambda model, relevance: CachedSpladeLoss(
        model, relevance, 1e-3, 1e-3, mini_batch_size=1
    ),
}
KINDS = {"fsdp": (True, FSDP), "original": (False, FSDP), "ddp": (True, {})}


class Trainer(SparseEncoderTrainer):
    """Trainer that uses FSDP2 on CPUs too, where accelerate does not."""

    def create_accelerator_and_postprocess(self):
        with fsdp_of_this_trainer_alone():
            super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            shard_on_cpus(self.accelerator, self.args)
            self.is_fsdp_enabled = True


def train(models, output, loss, is_accelerated, options):
    model = splade(models)
    if is_accelerated:
        accelerate(model)
    data = Dataset.from_dict({"query": sentences(8), "document": sentences(8)[::-1]})
    arguments = SparseEncoderTrainingArguments(
        str(output / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    relevance = SparseMultipleNegativesRankingLoss(model)
    Trainer(
        model=model, args=arguments, train_dataset=data, loss=LOSSES[loss](model, relevance)
    ).train()
    assert all(isinstance(p, DTensor) == bool(options) for p in model.parameters())
    with sf.whole_weights(model) as has_weights:
        if has_weights and torch.distributed.get_rank() == 0:
            model.save_pretrained(str(output), create_model_card=False)


def _run_rank(rank, count, folder):
    be_rank(rank, count, folder)
    for loss in LOSSES:
        for kind, (is_accelerated, options) in KINDS.items():
            train(folder / "models", folder / f"{loss}-{kind}", loss, is_accelerated, options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    splade(folder / "models")
    run_ranks(2, _run_rank, folder, folder)
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_those_of_the_original_and_of_ddp(folder, loss):
    before = load_file(folder / "models" / "bert" / "model.safetensors")
    mine, original, ddp = (
        load_file(folder / f"{loss}-{kind}" / "model.safetensors") for kind in KINDS
    )
    torch.testing.assert_close(mine, original, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, ddp, rtol=1e-5, atol=1e-6)
    assert not all(torch.equal(before[name], mine[name]) for name in mine)
    model = SparseEncoder(str(folder / f"{loss}-fsdp"))
    assert model.encode(["fox"]).shape[0] == 1
