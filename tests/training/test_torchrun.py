"""Two processes train as one does on the joined batch.

With train_sampling_strategy "sequential" process r of R takes the batches r, r + R, … of B rows, so
that their k-th batches together are the k-th batch of R · B rows that one process takes. A stream
is cut the same way. Regularisers and in-batch negatives are those of the joined batch, so losses
and gradients are the same but for rounding; SGD keeps a rounding error a rounding error, where Adam
would make a whole step of a gradient of nearly 0. There is no dropout.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from splade_fast.training import command, load_training_data
from splade_fast.training.configuration import parse_configuration
from tests.ranks import run_ranks
from tests.training.runs import be_rank, checkpoint_in, make_trainer, write_pairs

OPTIONS = {
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.01,
    "train_sampling_strategy": "sequential",
    "regularizer_steps": 2,
    "temperature": 2.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"), dropout=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", 24)


def train_alone(checkpoint, pairs, output, streaming=False, **options):
    data = load_training_data(pairs, streaming=streaming)
    options = OPTIONS | {"per_device_train_batch_size": 8} | options
    trainer = make_trainer(checkpoint, data, output, **options)
    trainer.train()
    trainer.save_model()
    trainer.state.save_to_json(str(output / "trainer_state.json"))


@pytest.fixture(scope="module")
def alone(checkpoint, pairs, tmp_path_factory):
    """The output directory of one process."""
    output = tmp_path_factory.mktemp("alone")
    train_alone(checkpoint, pairs, output)
    return output


def assert_same_training(actual, expected):
    logs = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (actual, expected)
    ]
    for name in ("loss", "relevance_loss", "document_regularizer", "query_active_dims"):
        mine, theirs = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(mine) == OPTIONS["max_steps"]
        assert mine == pytest.approx(theirs, rel=1e-5), name
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_torchrun(checkpoint, pairs, alone, tmp_path):
    config = tmp_path / "config.yaml"
    values = OPTIONS | {
        "model_name_or_path": str(checkpoint),
        "train_data": str(pairs),
        "output_dir": str(tmp_path / "two"),
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "lambda_query": 1e-3,
        "lambda_document": 1e-3,
    }
    config.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, "-m", "splade_fast", "train", f"--config={config}"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained for 3 steps") == 1
    assert_same_training(tmp_path / "two", alone)
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "two" / "model.safetensors")
    assert not all(torch.allclose(before[name], after[name], atol=1e-4) for name in after)


def _run_rank(rank, count, checkpoint, pairs, folder):
    be_rank(rank, count, folder)
    fail_on_one_rank(rank, checkpoint, pairs, folder)
    free_before_the_group(checkpoint, pairs, folder)
    half = {"per_device_train_batch_size": 4}
    train_alone(checkpoint, pairs, folder / "streamed", streaming=True, **half)
    train_alone(checkpoint, pairs, folder / "mini-batches", mini_batch_size=2, **half)


def fail_on_one_rank(rank, checkpoint, pairs, folder):
    """An error of one process ends all, of which that process alone raises it."""

    def flags(model, output):
        return [
            f"--model_name_or_path={model}",
            f"--train_data={pairs}",
            f"--output_dir={folder / output}",
            "--report_to=none",
        ]

    missing = flags(folder / "missing" if rank == 1 else checkpoint, "missing")
    with pytest.raises(OSError if rank == 1 else SystemExit, match="missing" if rank else "2"):
        command.train(missing)
    trainer = command.make_trainer(parse_configuration(flags(checkpoint, "there")))
    assert trainer.args.process_index == rank


def free_before_the_group(checkpoint, pairs, folder):
    """The command destroys the process group when no DistributedDataParallel is left.

    One that outlives the group joins the group's threads while it holds the GIL, and hangs where
    such a thread still waits for the GIL.
    """
    alive = []

    def list_parallel():
        alive.append([o for o in gc.get_objects() if type(o) is DistributedDataParallel])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", list_parallel)
        command.train(
            [
                f"--model_name_or_path={checkpoint}",
                f"--train_data={pairs}",
                f"--output_dir={folder / 'freed'}",
                "--report_to=none",
                "--max_steps=1",
            ]
        )
    assert alive == [[]]


def test_two_ranks(checkpoint, pairs, alone, tmp_path):
    run_ranks(2, _run_rank, tmp_path, checkpoint, pairs, tmp_path, seconds=240)
    train_alone(checkpoint, pairs, tmp_path / "one", streaming=True)
    assert_same_training(tmp_path / "streamed", tmp_path / "one")
    assert_same_training(tmp_path / "mini-batches", alone)
