"""Killed runs go on to the very state of runs that were not, and checkpoints are whole."""

import errno
import json
import os
import random
import resource
import signal

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from splade_fast.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.model import SpladeEncoder
from splade_fast.training import checkpointing, load_training_data
from splade_fast.training.checkpointing import (
    CheckpointError,
    checkpoints,
    keep_checkpoints,
    last_checkpoint,
    load_tree,
    new_checkpoint,
    remove_leftovers,
    save_tree,
)
from tests.ranks import run_ranks
from tests.training.runs import (
    CACHE,
    assert_same_state,
    checkpoint_in,
    in_process,
    make_trainer,
    train_until,
    write_pairs,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", 25)


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_runs_end_as_if_they_had_not_been(checkpoint, pairs, tmp_path, streaming):
    counted = tmp_path / "counted"
    whole = tmp_path / "whole"
    assert in_process(train_until, checkpoint, pairs, whole, streaming, None, counted) == 0
    moments = int(counted.read_text())
    assert moments > 50
    draw = random.Random(f"killed {streaming}")
    for attempt in range(4):
        output = tmp_path / str(attempt)
        # Twice: at any moment, and at any of what is left, or not at all if less is left.
        for last in (draw.randint(2, moments), draw.randint(2, moments // 2)):
            code = in_process(train_until, checkpoint, pairs, output, streaming, last, counted)
            assert code in (-signal.SIGKILL, 0), code
            for path in output.glob("checkpoint-*"):
                checkpointing.check_checkpoint(path, 1)
        assert in_process(train_until, checkpoint, pairs, output, streaming, None, counted) == 0
        assert_same_state(output / "checkpoint-7", whole / "checkpoint-7")
        assert (output / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
        assert not [path for path in output.iterdir() if path.name.startswith(".")]
