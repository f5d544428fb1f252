"""Killed runs go on to the very state of runs that were not, and checkpoints are whole."""

import os
import random
import resource
import shutil
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.training import load_training_data
from splade_fast.training.checkpoints.folders import (
    CheckpointError,
    check_checkpoint,
    delete_checkpoints,
    delete_surplus_checkpoints,
    find_checkpoints,
    find_last_checkpoint,
    remove_leftovers,
)
from splade_fast.training.checkpoints.trees import load_tree, save_tree
from tests.adapters import WAYS, with_adapters
from tests.ranks import run_ranks
from tests.selection import ALL
from tests.training.runs import (
    CACHE,
    assert_same_state,
    be_rank,
    checkpoint_in,
    in_process,
    make_trainer,
    state_files,
    train_until,
    write_pairs,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", 25)


ATTEMPTS = 4 if os.environ.get(ALL) else 1  # make kill-test kills at many more moments


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_runs_end_as_if_they_had_not_been(checkpoint, pairs, tmp_path, streaming):
    counted = tmp_path / "counted"
    whole = tmp_path / "whole"
    assert in_process(train_until, checkpoint, pairs, whole, streaming, None, counted) == 0
    moments = int(counted.read_text())
    assert moments > 50
    draw = random.Random(f"killed {streaming}")
    for attempt in range(ATTEMPTS):
        output = tmp_path / str(attempt)
        # Killed at any moment, then at any moment of the rest, unless the rest is shorter.
        for last in (draw.randint(2, moments), draw.randint(2, moments // 2)):
            code = in_process(train_until, checkpoint, pairs, output, streaming, last, counted)
            assert code in (-signal.SIGKILL, 0), code
            for path in output.glob("checkpoint-*"):
                check_checkpoint(path, 1)
        assert in_process(train_until, checkpoint, pairs, output, streaming, None, counted) == 0
        assert_same_state(output / "checkpoint-7", whole / "checkpoint-7")
        assert (output / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
        assert not [path for path in output.iterdir() if path.name.startswith(".")]


def train_whole_and_resumed(make, folder):
    """Train without a stop, and from the checkpoint of a run that stopped after step 2.

    Args:
        make: function from an output directory to a trainer that saves a checkpoint at step 2.
        folder: folder for the output directories "whole" and "stopped".
    """
    make(folder / "whole").train()
    is_distributed = dist.is_initialized()
    if is_distributed:
        dist.barrier()
    if not is_distributed or dist.get_rank() == 0:
        shutil.copytree(folder / "whole" / "checkpoint-2", folder / "stopped" / "checkpoint-2")
    torch.rand(5)  # the resumed run must not depend on the generator of its process
    make(folder / "stopped").train(resume_from_checkpoint=True)


def adapters(checkpoint, way):
    torch.manual_seed(0)
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    return {"model": with_adapters(encoder, way, lora_dropout=0.1)}


def bag_of_words(checkpoint):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    queries = BagOfWordsQueryEncoder(encoder.tokenizer, torch.ones(encoder.vocab_size))
    return {"model": encoder, "query_encoder": queries, "loss": "in_batch"}


def optimizer_with_other_states(_):
    return {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 2}


def growing_cache(_):
    return CACHE | {"cache_embeddings": "dense", "cache_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(partial(adapters, way=way), id=f"adapters-{way}") for way in WAYS),
        bag_of_words,
        optimizer_with_other_states,
        growing_cache,
    ],
)
def test_stopped_runs_go_on(checkpoint, pairs, tmp_path, options):
    data = load_training_data(pairs)

    def make(output):
        return make_trainer(
            checkpoint, data, output, max_steps=5, save_steps=2, **options(checkpoint)
        )

    train_whole_and_resumed(make, tmp_path)
    assert_same_state(tmp_path / "stopped" / "checkpoint-5", tmp_path / "whole" / "checkpoint-5")


def _train_rank(rank, count, checkpoint, pairs, folder):
    be_rank(rank, count, folder)
    for sharing in SHARINGS:

        def make(output, options=CACHE | {"cache_sharing": sharing}):
            trainer = make_trainer(
                checkpoint, load_training_data(pairs), output, max_steps=4, save_steps=2, **options
            )
            assert trainer.args.world_size == count
            return trainer

        train_whole_and_resumed(make, folder / sharing)


SHARINGS = ("replicas", "shards")


def test_ranks_resume_with_their_own_caches_and_random_numbers(checkpoint, pairs, tmp_path):
    run_ranks(2, _train_rank, tmp_path, checkpoint, pairs, tmp_path, seconds=240)
    for sharing in SHARINGS:
        whole = tmp_path / sharing / "whole" / "checkpoint-4"
        assert_same_state(tmp_path / sharing / "stopped" / "checkpoint-4", whole)
        states = [load_tree(path) for path in sorted(whole.glob("rank-*"))]
        assert len(states) == 2
        caches = [[n for n in state["buffers"] if "caches" in n] for state in states]
        assert bool(caches[0]) == bool(caches[1]) == (sharing != "replicas")
        with pytest.raises(CheckpointError, match="as many processes as wrote it, 2, got 1"):
            check_checkpoint(whole, 1)


class FileLimit(TrainerCallback):
    """Limit the size of files from a step on, as on a disk that is almost full."""

    def __init__(self, step, size):
        self.step = step
        self.size = size

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [2000, 20_000], ids=["the encoder", "the optimizer"])
def test_a_full_disk_leaves_no_half_checkpoint(checkpoint, pairs, tmp_path, size):
    data = load_training_data(pairs)
    trainer = make_trainer(checkpoint, data, tmp_path / "run", max_steps=4, save_steps=2, **CACHE)
    trainer.add_callback(FileLimit(2, size))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError) as raised:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {tmp_path / 'run' / 'checkpoint-4'}: " in str(raised.value)
    assert "File too large" in str(raised.value)
    assert "earlier checkpoints are as they were" in str(raised.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    check_checkpoint(tmp_path / "run" / "checkpoint-2", 1)


def _full_disk_of_rank_1(rank, count, checkpoint, pairs, output):
    be_rank(rank, count, output.parent)
    trainer = make_trainer(checkpoint, load_training_data(pairs), output, max_steps=2, save_steps=1)
    if rank == 1:
        trainer.add_callback(FileLimit(1, 1000))
    reason = "File too large" if rank == 1 else "another process could not write its part"
    with pytest.raises(CheckpointError, match=reason):
        trainer.train()


def test_what_one_rank_cannot_write_no_rank_keeps(checkpoint, pairs, tmp_path):
    output = tmp_path / "run"
    run_ranks(2, _full_disk_of_rank_1, tmp_path, checkpoint, pairs, output)
    assert names(output) == ["checkpoint-1"]
    check_checkpoint(output / "checkpoint-1", 2)


def test_other_errors_leave_no_half_checkpoint_either(checkpoint, pairs, tmp_path, monkeypatch):
    trainer = make_trainer(
        checkpoint, load_training_data(pairs), tmp_path, max_steps=2, save_steps=1
    )
    monkeypatch.setattr(trainer, "_find_rank_tensors", lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        trainer.train()
    assert names(tmp_path) == []


@pytest.fixture(scope="module")
def run(checkpoint, pairs, tmp_path_factory):
    """The output directory of a run with checkpoints after 2 and 4 steps."""
    output = tmp_path_factory.mktemp("run")
    make_trainer(checkpoint, load_training_data(pairs), output, max_steps=4, save_steps=2).train()
    return output


@pytest.fixture
def output(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_hold_no_pickles(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_weights_are_in_a_checkpoint_once(run):
    sizes = {name: len(content) for name, content in state_files(run / "checkpoint-4").items()}
    assert sizes["training_state.safetensors"] < 0.1 * sizes["model.safetensors"]


def test_incomplete_checkpoints_are_none(output):
    shutil.copytree(output / "checkpoint-2", output / ".checkpoint-9.partial")
    assert get_last_checkpoint(output).endswith("checkpoint-4")
    assert find_last_checkpoint(output) == output / "checkpoint-4"
    assert [path.name for path in find_checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    weights = output / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert find_last_checkpoint(output) == output / "checkpoint-2"
    with pytest.raises(CheckpointError, match=r"model.safetensors must have \d+ bytes, got \d+"):
        check_checkpoint(output / "checkpoint-4", 1)
    (output / "checkpoint-2" / "checkpoint.json").write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged \(it lists no files\)"):
        check_checkpoint(output / "checkpoint-2", 1)
    (output / "checkpoint-2" / "checkpoint.json").unlink()
    assert find_last_checkpoint(output) is None
    with pytest.raises(CheckpointError, match=r"checkpoint-2: it has no checkpoint.json"):
        check_checkpoint(output / "checkpoint-2", 1)
    with pytest.raises(CheckpointError, match="no such folder"):
        check_checkpoint(output / "checkpoint-8", 1)


def test_leftovers_are_cleared_and_replaced_checkpoints_come_back(output):
    (output / "checkpoint-4").rename(output / ".checkpoint-4.replaced")
    shutil.copytree(output / "checkpoint-2", output / ".checkpoint-2.replaced")
    (output / ".checkpoint-6.partial").mkdir()
    (output / ".checkpoint-0.deleted").mkdir()
    (output / ".checkpoint-notes").mkdir()
    remove_leftovers(output)
    assert names(output) == [".checkpoint-notes", "checkpoint-2", "checkpoint-4"]
    check_checkpoint(output / "checkpoint-4", 1)


def test_all_checkpoints_are_deleted_and_nothing_else(output):
    (output / "checkpoint-2" / "checkpoint.json").unlink()
    shutil.copytree(output / "checkpoint-4", output / ".checkpoint-4.replaced")
    (output / "checkpoint-notes.txt").write_text("mine")
    delete_checkpoints(output)
    assert names(output) == ["checkpoint-notes.txt"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [2, 4, 6]), (2, None, [4, 6]), (1, None, [6]), (1, 2, [2, 6]), (2, 4, [4, 6])],
)
def test_surplus_checkpoints_are_deleted(output, limit, best, left):
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-6")
    delete_surplus_checkpoints(
        output, limit, None if best is None else str(output / f"checkpoint-{best}")
    )
    assert names(output) == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize("described", ["{", '{"tensor": "absent"}', '{"list": 1}', "{}"])
def test_damaged_states_are_named(tmp_path, described):
    path = tmp_path / "state.safetensors"
    save_file({}, path, {"tree": described})
    with pytest.raises(CheckpointError, match=r"the state in .*state.safetensors is damaged"):
        load_tree(path)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors"])
def test_damaged_files_are_named(checkpoint, pairs, output, file):
    path = output / "checkpoint-4" / file
    path.write_bytes(b"\xff" * path.stat().st_size)
    trainer = make_trainer(checkpoint, load_training_data(pairs), output, max_steps=6)
    with pytest.raises(CheckpointError, match=f"cannot read .*{file}"):
        trainer.train(resume_from_checkpoint=True)


def test_other_models_are_refused(checkpoint, pairs, output):
    trainer = make_trainer(checkpoint, load_training_data(pairs), output, max_steps=6, **CACHE)
    with pytest.raises(CheckpointError, match="checkpoint-4 must hold "):
        trainer.train(resume_from_checkpoint=True)


def test_models_alone_cannot_be_resumed(checkpoint, pairs, tmp_path):
    data = load_training_data(pairs)
    options = {"max_steps": 2, "save_steps": 1, "save_only_model": True}
    make_trainer(checkpoint, data, tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="must hold the state of a training run"):
        make_trainer(checkpoint, data, tmp_path, **options).train(resume_from_checkpoint=True)
    assert SpladeEncoder.from_pretrained(tmp_path / "checkpoint-2")


def test_nothing_to_resume(checkpoint, pairs, tmp_path):
    trainer = make_trainer(checkpoint, load_training_data(pairs), tmp_path, max_steps=2)
    with pytest.raises(CheckpointError, match="must hold a checkpoint to resume, got none"):
        trainer.train(resume_from_checkpoint=True)


def test_trees_come_back_bit_for_bit(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "rows": torch.randn(2, 3).t()}, 7: {}},
        "groups": [{"betas": (0.9, 1 / 3), "params": [0, 7], "fused": None, "lr": float("inf")}],
        "name": "ü",
        "empty": torch.empty(0, 2, dtype=torch.bfloat16),
    }
    save_tree(tmp_path / "tree.safetensors", tree)
    again = load_tree(tmp_path / "tree.safetensors")
    assert torch.equal(again["state"][0].pop("step"), tree["state"][0].pop("step"))
    assert torch.equal(again["state"][0].pop("rows"), tree["state"][0].pop("rows"))
    assert again["empty"].dtype == torch.bfloat16
    assert again.pop("empty").shape == tree.pop("empty").shape
    assert again == tree
    with pytest.raises(TypeError, match=r"the state at \.a\.0 must be tensors and plain values"):
        save_tree(tmp_path / "other.safetensors", {"a": [object()]})
