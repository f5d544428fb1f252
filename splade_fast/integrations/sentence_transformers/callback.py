"""Checkpoints of the negative cache, because trainers of transformers do not save losses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from splade_fast.integrations.sentence_transformers.negative_cache_loss import NegativeCacheLoss
from splade_fast.negative_cache import load_sharded, save_sharded


class NegativeCacheCallback(TrainerCallback):
    """Save the cache of a NegativeCacheLoss in each checkpoint, and resume from it.

    The state of the draws is saved as well. The callback adds the metrics of the loss,
    `cache/interpretable_prediction_loss` and `cache/staleness`, to the log.

    Example::

        >>> from sentence_transformers import SparseEncoder
        >>> from splade_fast.integrations.sentence_transformers import (
        ...     NegativeCacheCallback, NegativeCacheLoss
        ... )
        >>> loss = NegativeCacheLoss(SparseEncoder("CHECKPOINT"), cache_size=100)
        >>> callbacks = [NegativeCacheCallback(loss)]  # for SparseEncoderTrainer(callbacks=…)

    Args:
        loss: the NegativeCacheLoss itself, even if a SpladeLoss wraps it.
        resume_from_checkpoint: folder given to `trainer.train(resume_from_checkpoint=…)`; None: the
            folder of the training arguments, or the checkpoint of the current step in the output
            folder.
        subfolder: name of the cache's folder in a checkpoint. Several losses need different names.

    Raises:
        FileNotFoundError: training resumes from a checkpoint without a cache.
    """

    def __init__(
        self,
        loss: NegativeCacheLoss,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        *,
        subfolder: str = "negative_cache",
    ) -> None:
        self.loss = loss
        self.subfolder = subfolder
        self.resume_from_checkpoint = resume_from_checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            return
        folder = self.resume_from_checkpoint or args.resume_from_checkpoint
        source = Path(folder) if folder else _checkpoint(args, state)
        try:
            load_sharded(self.loss.handler, source / self.subfolder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{source / self.subfolder} holds no negative cache; pass the checkpoint to "
                "NegativeCacheCallback(loss, resume_from_checkpoint=…)"
            ) from error

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not args.save_only_model:
            save_sharded(self.loss.handler, _checkpoint(args, state) / self.subfolder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None and "loss" in entry:
                entry.update(self.loss.metrics)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None  # transformers has a default
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
