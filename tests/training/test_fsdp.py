"""FSDP2 over two processes trains as one process does on the joined batch.

See `test_torchrun` for what makes losses and gradients the same but for rounding. The second
process begins with other weights, which those of the first one replace.
"""

import gc
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMaskedLM, TrainerCallback

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.texts import Texts
from splade_fast.training import RetrievalEvaluator, command
from tests.ranks import run_ranks
from tests.selection import ALL, covering_rows
from tests.tiny_models import WORDS
from tests.training.runs import CACHE, be_rank, checkpoint_in, make_trainer, write_pairs
from tests.training.sharded import (
    OPTIONS,
    STEPS,
    assert_same_training,
    encoder_of,
    examples_for,
    train,
)

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


# Ways to share caches, and mini_batch_size.
CACHES = {"replicas": None, "shards": 1}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


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


def evaluate_and_train(output, batch, **options):
    """Evaluate, train with an encoder for queries, take the best step; return all metrics."""
    texts = Texts(["a", "b", "c"], [" ".join(WORDS[i : i + 4]) for i in range(3)])
    evaluator = RetrievalEvaluator(texts, texts, {"a": {"a": 1}, "b": {"c": 1}})
    encoder = encoder_of("tied")
    data = examples_for("in_batch")
    trainer = make_trainer(
        Path(),
        data,
        output,
        model=encoder,
        query_encoder=BagOfWordsQueryEncoder(encoder.tokenizer, torch.ones(encoder.vocab_size)),
        eval_dataset=data.select(range(8)),
        evaluator=evaluator,
        **(OPTIONS | options | BEST),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
    )
    before = trainer.evaluate()
    trainer.train()
    metrics = [before, *trainer.state.log_history, trainer.evaluate()]
    trainer.save_model()
    return [
        {
            name: value
            for name, value in entry.items()
            if "_per_second" not in name and "time" not in name
        }
        for entry in metrics
    ]


def train_with_caches(folder):
    """Train on caches of both kinds, by FSDP2 and by DistributedDataParallel."""
    for sharing, mini_batch_size in CACHES.items():
        for fsdp in (True, None):
            train(
                "tied",
                folder / f"{sharing}-{fsdp}",
                fsdp=fsdp,
                per_device_train_batch_size=2,
                cache_sharing=sharing,
                mini_batch_size=mini_batch_size,
                **(CACHE | {"max_steps": 3, "cache_negatives": 2, "cache_top_k": 12}),
            )


def run_command(checkpoint, pairs, folder):
    """Train by the command; return what FSDP2 holds when it destroys the process group."""
    alive = []

    def list_alive():
        alive.append([type(o).__name__ for o in gc.get_objects() if isinstance(o, FSDPModule)])

    config = folder / f"config-{dist.get_rank()}.yaml"
    values = {"model_name_or_path": checkpoint, "train_data": pairs, "output_dir": folder / "run"}
    options = {"fsdp": True, "max_steps": 2, "report_to": "none", "lora_rank": 2}
    options["fsdp_config"] = {"state_dict_type": "SHARDED_STATE_DICT"}
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
    train_with_caches(folder)
    train("tied", folder / "bf16", fsdp=True, bf16=True, per_device_train_batch_size=BATCH // count)
    metrics = evaluate_and_train(folder / "best", BATCH // count, fsdp=True)
    (folder / f"metrics-{rank}.json").write_text(json.dumps(metrics))
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


@pytest.mark.parametrize("sharing", CACHES)
def test_caches_are_those_of_ddp(folder, sharing):
    assert_same_training(folder / f"{sharing}-True", folder / f"{sharing}-None", steps=3)


def test_mixed_precision(folder, tmp_path):
    train("tied", tmp_path, bf16=True, per_device_train_batch_size=BATCH)
    logs = [
        json.loads((path / "trainer_state.json").read_text())["log_history"][:STEPS]
        for path in (folder / "bf16", tmp_path)
    ]
    losses, expected = (torch.tensor([entry["loss"] for entry in log]) for log in logs)
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
    assert not torch.equal(losses.bfloat16().float(), losses)  # losses are in float32
    assert load_file(folder / "bf16" / "model.safetensors").popitem()[1].dtype == torch.float32


def test_evaluations_and_the_best_model(folder, tmp_path):
    expected = evaluate_and_train(tmp_path, BATCH)
    for rank in range(RANKS):
        metrics = json.loads((folder / f"metrics-{rank}.json").read_text())
        for mine, theirs in zip(metrics, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert (folder / "best" / "query" / "model.safetensors").exists()


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
    assert not (folder / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()
