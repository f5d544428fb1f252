"""Checks before a training that would train nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from splade_fast._distributed import world_size
from splade_fast.training.arguments import SpladeTrainingArguments
from splade_fast.training.data import TrainingCollator
from splade_fast.training.model import TrainingModel


def check_training(
    model: TrainingModel, args: SpladeTrainingArguments, dataset: Any, collator: Any
) -> None:
    """Raise ValueError if a training would make no step, or steps that change nothing.

    Args:
        model: the model to train.
        args: arguments of the training.
        dataset: the examples; one without a length is not read.
        collator: function from examples to a batch.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(
            f"max_steps must be at least 1, or -1 for num_train_epochs, got {args.max_steps}"
        )
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs must be greater than 0, got {args.num_train_epochs}")
    count = len(dataset) if hasattr(dataset, "__len__") else None
    if count == 0:
        raise ValueError("train_dataset must have at least one example, got none")
    batch = args.train_batch_size * world_size()
    if args.dataloader_drop_last and count is not None and count < batch:
        raise ValueError(
            f"dataloader_drop_last must be False for {count} examples, fewer than a batch of "
            f"{batch}, got True"
        )
    if (
        "in_batch" in model.objective.arguments.loss_terms()
        and isinstance(collator, TrainingCollator)
        and set(_column_names(dataset)) == {"query", "document"}
    ):
        _check_negatives(args.train_batch_size, batch, count)


def _check_negatives(per_device: int, batch: int, count: int | None) -> None:
    """Raise ValueError if each batch is one pair, with no other document to compare with."""
    if batch == 1:
        raise ValueError(
            "per_device_train_batch_size must be at least 2 for in_batch with pairs, whose "
            f"negatives are the other documents of the batch, got {per_device}"
        )
    if count == 1:
        raise ValueError(
            "train_dataset must have at least 2 examples for in_batch with pairs, whose negatives "
            "are the other documents of the batch, got 1"
        )


def _column_names(dataset: Any) -> Iterable[str]:
    """Return the names of the columns, none where only reading the data would tell."""
    names: Iterable[str] | None = getattr(getattr(dataset, "stream", dataset), "column_names", None)
    if names is None and isinstance(dataset, list) and isinstance(dataset[0], Mapping):
        names = dataset[0]
    return names or ()
