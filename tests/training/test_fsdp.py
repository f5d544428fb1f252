"""FSDP2 over two processes trains as one process does on the joined batch.

See `test_torchrun` for what makes losses and gradients the same but for rounding. The second
process begins with other weights, which those of the first one replace.
"""

import gc
import itertools
import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMaskedLM, TrainerCallback

from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.training import command
from tests.ranks import run_ranks
from tests.selection import ALL, covering_rows
from tests.training.runs import be_rank, checkpoint_in, write_pairs
from tests.training.sharded import assert_same_training, train

RANKS = 2
BATCH = 4
LOSSES = ["in_batch", "pointwise", "pairwise", "margin_mse", "kl"]
_CHOICES = {
    "kind": ["tied", "untied", "causal", "lora", "term_weights"],
    "mini_batch_size": [None, 1],
    "activation_checkpointing": [False, True],
    "gradient_accumulation_steps": [1, 2],
}
_ROWS = (
    itertools.product(*_CHOICES.values())
    if os.environ.get(ALL)
    else [
        [values[i] for values, i in zip(_CHOICES.values(), row, strict=True)]
        for row in covering_rows([len(values) for values in _CHOICES.values()])
    ]
)
RUNS = [
    {"loss": LOSSES[number % len(LOSSES)], **dict(zip(_CHOICES, row, strict=True))}
    for number, row in enumerate(_ROWS)
]


def name_of(run):
    return "-".join(str(value) for value in run.values())


class Sizes(TrainerCallback):
    """Count the entries of weights, gradients and optimizer states of this process."""

    def on_optimizer_step(self, args, state, control, model, optimizer, **_):
        weights = list(model.parameters())
        states = [x for s in optimizer.state.values() for x in s.values() if x.ndim]
        self.whole = sum(weight.numel() for weight in weights)
        self.weights, self.gradients, self.states = (
            sum(x.to_local().numel() for x in tensors)
            for tensors in (weights, [weight.grad for weight in weights], states)
        )


def measure(folder):
    sizes = Sizes()
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 4, "callbacks": [sizes]}
    trainer = train("tied", folder, fsdp=True, gradient_accumulation_steps=2, **options)
    parts = [p for p in trainer.model.modules() if isinstance(p, FSDPModule)]
    assert len(parts) == 4  # two layers, the rest of the encoder, and the model around it
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    return [sizes.whole, sizes.weights, sizes.gradients, sizes.states]


def run_command(checkpoint, pairs, folder):
    """Train by the command; return what FSDP2 holds when it destroys the process group."""
    alive = []

    def list_alive():
        alive.append([type(o).__name__ for o in gc.get_objects() if isinstance(o, FSDPModule)])

    config = folder / f"config-{dist.get_rank()}.yaml"
    values = {"model_name_or_path": checkpoint, "train_data": pairs, "output_dir": folder / "run"}
    options = {"fsdp": True, "max_steps": 2, "report_to": "none", "lora_rank": 2}
    config.write_text("".join(f"{name}: {x}\n" for name, x in (values | options).items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", list_alive)
        message = command.train([f"--config={config}"])
    assert (message is not None) == (dist.get_rank() == 0)
    assert alive == [[]]


def _train_all(rank, count, folder, checkpoint, pairs):
    be_rank(rank, count, folder)
    for run in RUNS:
        options = run | {"per_device_train_batch_size": BATCH // count, "factor": 1 + rank}
        train(**options, output=folder / "sharded" / name_of(run), fsdp=True)
    (folder / f"sizes-{rank}.json").write_text(json.dumps(measure(folder / "measured")))
    run_command(checkpoint, pairs, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the output of all runs of two processes."""
    folder = tmp_path_factory.mktemp("fsdp")
    checkpoint = checkpoint_in(folder, dropout=False)
    pairs = write_pairs(folder / "pairs.tsv", 24)
    run_ranks(RANKS, _train_all, folder, folder, checkpoint, pairs, seconds=300)
    return folder


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_two_ranks_train_as_one(folder, run, tmp_path):
    train(**run, output=tmp_path, per_device_train_batch_size=BATCH)
    assert_same_training(folder / "sharded" / name_of(run), tmp_path)


def test_each_rank_holds_its_part(folder):
    sizes = [json.loads((folder / f"sizes-{rank}.json").read_text()) for rank in range(RANKS)]
    whole, *first = sizes[0]
    _, *second = sizes[1]
    assert [a + b for a, b in zip(first, second, strict=True)] == [whole, whole, 2 * whole]
    for part, total in zip(first, (whole, whole, 2 * whole), strict=True):
        assert part == pytest.approx(total / RANKS, rel=0.05)


def test_the_saved_folder_is_the_ordinary_one(folder, tmp_path):
    [run] = [run for run in RUNS if run["kind"] == "untied"][:1]
    saved = folder / "sharded" / name_of(run)
    train(**run, output=tmp_path, per_device_train_batch_size=BATCH)
    for file in tmp_path.rglob("*.json"):
        if file.name != "trainer_state.json":
            assert (saved / file.relative_to(tmp_path)).read_bytes() == file.read_bytes()
    model = AutoModelForMaskedLM.from_pretrained(saved)
    decoder = load_file(saved / "model.safetensors")["cls.predictions.decoder.weight"]
    assert torch.equal(model.get_output_embeddings().weight, decoder)
    encoder = SpladeEncoder.from_pretrained(saved)
    assert len(encoder.encode(["fox"], show_progress=False)) == 1
    assert (folder / "run" / "adapter_model.safetensors").is_file()
