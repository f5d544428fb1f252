"""Small training runs, some in a process that is killed at a given moment."""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.training import SpladeTrainer, SpladeTrainingArguments, load_training_data
from splade_fast.training.checkpoints.folders import find_last_checkpoint
from tests.new_process import fork_server
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "lambda_query": 1e-3,
    "lambda_document": 1e-3,
}
CACHE: dict[str, Any] = {
    "loss": "negative_cache",
    "cache_size": 16,
    "cache_k": 8,
    "cache_document_length": 16,
    "document_regularizer": "df_flops",
}


def checkpoint_in(folder: Path, dropout: bool = True) -> Path:
    """Write a tiny masked LM into a folder."""
    config = masked_lm_configs()["bert"]
    config.num_hidden_layers = 1
    if not dropout:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return save_checkpoint(config, folder / "checkpoint")


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Write pairs of a query and a document that holds its words."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        document = draw.sample(WORDS, 6)
        lines.append(f"{' '.join(draw.sample(document, 2))}\t{' '.join(document)}\n")
    path.write_text("".join(lines))
    return path


def keep_datasets_in(folder: Path) -> None:
    """Set the cache of `datasets`, in a process in which no fixture does."""
    datasets.config.HF_DATASETS_CACHE = folder


def be_rank(rank: int, count: int, folder: Path) -> None:
    """Let the trainer find the process group of `run_ranks`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # read, but not used
    keep_datasets_in(folder / f"datasets-{rank}")


def make_trainer(checkpoint: Path, data: Any, output: Path, **options: Any) -> SpladeTrainer:
    """Make a trainer; options are arguments of SpladeTrainingArguments or of SpladeTrainer."""
    others = {name: options.pop(name) for name in _OF_TRAINER if name in options}
    arguments = SpladeTrainingArguments(output_dir=str(output), **(SMALL | options))
    encoder = others.pop("model", None) or SpladeEncoder.from_pretrained(checkpoint)
    return SpladeTrainer(encoder, arguments, train_dataset=data, **others)


_OF_TRAINER = (
    "model",
    "eval_dataset",
    "query_encoder",
    "evaluator",
    "callbacks",
    "data_collator",
    "optimizer_cls_and_kwargs",
)


def state_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a checkpoint's safetensors files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def assert_same_state(actual: Path, expected: Path) -> None:
    mine, theirs = state_files(actual), state_files(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert len(mine) >= 3


class Moments(TrainerCallback):
    """Count the moments at which a run can be killed: steps and operations on its files.

    Args:
        output: output directory of the run.
        last: moment at which the process kills itself, or None.
    """

    def __init__(self, output: Path, last: int | None) -> None:
        self.count = 0
        self._output = str(output)
        self._last = last
        sys.addaudithook(self._audit)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._pass()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._pass()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        on_files = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if (
            on_files
            and isinstance(arguments[0], str | Path)
            and str(arguments[0]).startswith(f"{self._output}/")
        ):
            self._pass()

    def _pass(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def in_process(function: Callable[..., None], *arguments: Any, seconds: float = 120) -> int:
    """Run function(*arguments) in a new process and return its exit code, -9 if it was killed."""
    context = fork_server()
    process = context.Process(target=_alone, args=(function, *arguments))
    process.start()
    process.join(seconds)
    try:
        assert process.exitcode is not None, f"the process took longer than {seconds} s"
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _alone(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def train_until(
    checkpoint: Path, pairs: Path, output: Path, streaming: bool, last: int | None, counted: Path
) -> None:
    """Train, resuming if there is a checkpoint, and write the number of moments to a file."""
    keep_datasets_in(output.parent / "datasets")
    data = load_training_data(pairs, streaming=streaming)
    if streaming:
        data = data.shuffle(seed=3, buffer_size=8)
    moments = Moments(output, last)
    trainer = make_trainer(
        checkpoint,
        data,
        output,
        max_steps=7,
        gradient_accumulation_steps=2,
        save_steps=2,
        save_total_limit=2,
        callbacks=[moments],
        **CACHE,
    )
    trainer.train(resume_from_checkpoint=find_last_checkpoint(output) is not None)
    trainer.save_model()
    counted.write_text(str(moments.count))
