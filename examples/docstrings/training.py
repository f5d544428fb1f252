"""Training on docstrings: held-out pairs, the training itself, and a plot of its progress."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.docstrings.corpus import Pair
from splade_fast.encoders.text_encoder import TextEncoder

if TYPE_CHECKING:
    from datasets import Dataset

    from splade_fast.training import RetrievalEvaluator

_GROUP_DEPTH = 2
_LOGGED_STEPS = 10
_EVALUATIONS = 6

# These settings work for the demo's checkpoint and corpus; benchmarks/NOTES.md compares others.
FINE_TUNING: dict[str, Any] = {
    "loss": "negative_cache",
    "temperature": 1.0,
    "cache_size": 4096,
    "cache_document_length": 128,
    "max_document_length": 128,
    "max_query_length": 48,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-4,
    "warmup_steps": 20,
    "lambda_query": 3e-3,
    "lambda_document": 3e-3,
}


@dataclass
class Split:
    """Pairs to train on, and held-out pairs of other modules to evaluate on."""

    training: list[Pair]
    held_out: list[Pair]


@dataclass
class Progress:
    """Mean values of a training over the steps since the last log."""

    step: int
    loss: float  # the cross entropy against the cache, or the relevance loss without one
    query_active_dims: float
    document_active_dims: float
    staleness: float | None  # None without a cache
    # Of held-out queries and documents, at some of the steps.
    mrr: float | None = None  # MRR@10
    entries: float | None = None  # entries a document


def split_pairs(pairs: Sequence[Pair], share: float = 0.1) -> Split:
    """Hold out all pairs of about `share` of the modules, chosen by a hash of their names.

    A module is named by two components here, such as scipy.signal. Docstrings of neighbouring
    files repeat each other, so a whole subpackage is either held out or trained on. The choice
    depends on the name of the module alone, not on the other installed packages.

    Args:
        pairs: all pairs.
        share: approximate share of the modules to hold out, from 0 to 1.
    """
    split = Split([], [])
    for pair in pairs:
        side = split.held_out if _hash_to_unit(module_name(pair)) < share else split.training
        side.append(pair)
    return split


def module_name(pair: Pair) -> str:
    """Return the subpackage or top-level module of a docstring, such as scipy.signal."""
    return ".".join(pair.name.split(".")[:_GROUP_DEPTH])


def train(
    encoder: TextEncoder,
    examples: Sequence[Pair] | Dataset,
    steps: int,
    settings: Mapping[str, Any],
    *,
    evaluator: RetrievalEvaluator | None = None,
    callbacks: Sequence[Any] = (),
    seed: int = 0,
) -> list[Progress]:
    """Train an encoder with `SpladeTrainer`; the weights change in place.

    Args:
        encoder: encodes queries and documents.
        examples: queries and their relevant documents, or examples of `load_training_data`.
        steps: number of optimiser steps; the weights of the regularisers rise during the first
            half.
        settings: further `SpladeTrainingArguments`.
        evaluator: evaluator of held-out queries, which runs a few times during the training.
        callbacks: further callbacks for the trainer.
        seed: seeds the order of the examples, dropout and the draws from the cache.

    Returns:
        The progress at every logged step.

    Raises:
        ImportError: a package that training needs is not installed.
    """
    from transformers import PrinterCallback, ProgressCallback

    from splade_fast.training import SpladeTrainer, SpladeTrainingArguments
    from splade_fast.training.data.load import import_datasets

    class SilentProgressBar(ProgressCallback):
        """Progress bar that does not print the logs."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    datasets = import_datasets()
    if not isinstance(examples, datasets.Dataset):
        examples = datasets.Dataset.from_list(
            [{"query": pair.query, "document": pair.document} for pair in examples]
        )
    logged = min(_LOGGED_STEPS, steps)
    evaluation: dict[str, Any] = {}
    if evaluator is not None:
        evaluation["eval_strategy"] = "steps"
        evaluation["eval_steps"] = max(1, steps // _EVALUATIONS // logged) * logged
    with tempfile.TemporaryDirectory() as folder:
        arguments = SpladeTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            seed=seed,
            save_strategy="no",
            report_to="none",
            **{
                "logging_steps": logged,
                "regularizer_steps": steps // 2,
                **evaluation,
                **settings,
            },
        )
        trainer = SpladeTrainer(
            model=encoder,
            args=arguments,
            train_dataset=examples,
            evaluator=evaluator,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if not arguments.disable_tqdm:
            trainer.add_callback(SilentProgressBar)
        trainer.train()
    encoder.eval()
    history = trainer.state.log_history
    measured = {entry["step"]: entry for entry in history if "eval_MRR@10" in entry}
    return [
        _progress(entry, measured.get(entry["step"], {})) for entry in history if "loss" in entry
    ]


def plot(progress: Sequence[Progress], path: Path) -> None:
    """Plot MRR@10, loss, active dims and staleness; the suffix of path sets the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    axes = figure.subplots(4, sharex=True)
    steps = [point.step for point in progress]
    measured = [point for point in progress if point.mrr is not None]
    axes[0].plot([p.step for p in measured], [p.mrr for p in measured], marker="o")
    axes[0].set(ylabel="MRR@10", title="Held-out queries among their documents: should rise")
    axes[1].plot(steps, [point.loss for point in progress])
    with_cache = [point for point in progress if point.staleness is not None]
    effect = "rises while the cache fills, as the negatives become more" if with_cache else ""
    axes[1].set(ylabel="loss, nats", title=effect and f"Cross entropy: {effect}")
    axes[2].plot(steps, [point.document_active_dims for point in progress], label="documents")
    axes[2].plot(steps, [point.query_active_dims for point in progress], label="queries")
    axes[2].set(ylabel="active dims", yscale="log")
    axes[2].legend()
    axes[3].plot([point.step for point in with_cache], [point.staleness for point in with_cache])
    axes[3].set(ylabel="staleness of negatives", xlabel="step")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _progress(entry: Mapping[str, float], measured: Mapping[str, float]) -> Progress:
    return Progress(
        step=int(entry["step"]),
        loss=entry.get("cache/interpretable_prediction_loss", entry["relevance_loss"]),
        query_active_dims=entry["query_active_dims"],
        document_active_dims=entry["document_active_dims"],
        staleness=entry.get("cache/staleness"),
        mrr=measured.get("eval_MRR@10"),
        entries=measured.get("eval_document_active_dims"),
    )


def _hash_to_unit(name: str) -> float:
    """Return a number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
