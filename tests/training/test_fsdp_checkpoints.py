"""Checkpoints of FSDP2: whole ones and shards, which resume to the bit and on other numbers."""

import pytest
import torch

from splade_fast.training import load_training_data
from splade_fast.training.checkpoints.folders import CheckpointError
from splade_fast.training.checkpoints.trees import load_tree
from tests.ranks import run_ranks
from tests.training.runs import (
    CACHE,
    assert_same_state,
    be_rank,
    checkpoint_in,
    make_trainer,
    write_pairs,
)
from tests.training.sharded import assert_same_training, train
from tests.training.test_resume import train_whole_and_resumed

# Formats of checkpoints, and what their runs are about.
FORMATS = {
    "FULL_STATE_DICT": {"cache_sharing": "replicas", "gradient_accumulation_steps": 2},
    "SHARDED_STATE_DICT": {"cache_sharing": "shards"},
}
# Its states add up gradients, so that rounding errors stay rounding errors.
MOMENTUM = {
    "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "max_steps": 4,
    "save_steps": 2,
    "save_strategy": "steps",
}
BATCH = 4


def options_of(kind):
    return {
        **CACHE,
        "max_steps": 4,
        "save_steps": 2,
        "fsdp": True,
        "fsdp_config": {"state_dict_type": kind},
        **FORMATS[kind],
    }


def _train_rank(rank, count, folder, checkpoint, pairs):
    be_rank(rank, count, folder)
    for kind in FORMATS:

        def make(output, kind=kind):
            data = load_training_data(pairs)
            return make_trainer(checkpoint, data, output, **options_of(kind))

        train_whole_and_resumed(make, folder / kind)
    half = {**MOMENTUM, "per_device_train_batch_size": BATCH // 2, "fsdp": True}
    last = folder / "one" / "checkpoint-2"
    train("tied", folder / "one-then-two", resume_from_checkpoint=last, **half)
    train("tied", folder / "two", **half)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", 32)


@pytest.fixture(scope="module")
def folder(checkpoint, pairs, tmp_path_factory):
    """The folder with the runs of two processes, and one run of a single one."""
    folder = tmp_path_factory.mktemp("fsdp")
    train("tied", folder / "one", per_device_train_batch_size=BATCH, **MOMENTUM)
    run_ranks(2, _train_rank, folder, folder, checkpoint, pairs, seconds=240)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_stopped_runs_go_on_to_the_bit(folder, kind):
    stopped, whole = (folder / kind / name / "checkpoint-4" for name in ("stopped", "whole"))
    assert_same_state(stopped, whole)
    has_encoder = kind == "FULL_STATE_DICT"
    assert (whole / "model.safetensors").exists() == has_encoder
    states = [load_tree(path) for path in sorted(whole.glob("rank-*"))]
    assert len(states) == 2
    assert [bool(state.get("weights")) for state in states] == 2 * [not has_encoder]


def test_another_number_of_processes_goes_on(folder, tmp_path):
    last = folder / "two" / "checkpoint-2"
    alone = {**MOMENTUM, "per_device_train_batch_size": BATCH}
    trainer = train("tied", tmp_path / "two-then-one", resume_from_checkpoint=last, **alone)
    assert trainer.state.global_step == 4
    for output in (tmp_path / "two-then-one", folder / "one-then-two", folder / "two"):
        assert_same_training(output, folder / "one", steps=4)


@pytest.mark.parametrize(
    "options", [{"loss": "negative_cache+kl", "cache_sharing": "shards"}, {"cache_sharing": "own"}]
)
def test_all_caches_of_single_processes_need_them(folder, options, checkpoint, pairs, tmp_path):
    trainer = make_trainer(checkpoint, load_training_data(pairs), tmp_path, **(CACHE | options))
    with pytest.raises(CheckpointError, match="by as many processes as wrote it, 2, got 1"):
        trainer.train(resume_from_checkpoint=folder / "FULL_STATE_DICT" / "whole" / "checkpoint-2")


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_need_their_processes(folder, kind, checkpoint, pairs, tmp_path):
    options = options_of(kind) | {"fsdp": None, "fsdp_config": None, "cache_sharing": "shards"}
    trainer = make_trainer(checkpoint, load_training_data(pairs), tmp_path, **options)
    with pytest.raises(CheckpointError, match="by as many processes as wrote it, 2, got 1"):
        trainer.train(resume_from_checkpoint=folder / kind / "whole" / "checkpoint-2")
