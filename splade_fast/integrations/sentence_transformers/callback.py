"""The negative cache in the checkpoints of transformers' trainers, which do not save losses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from splade_fast.integrations.sentence_transformers.negative_cache_loss import NegativeCacheLoss
from splade_fast.negative_cache import load_sharded, save_sharded


class NegativeCacheCallback(TrainerCallback):
    """Saves the cache of a NegativeCacheLoss, draws included, in each checkpoint; resumes from it.

    It also adds the loss's metrics, `cache/interpretable_prediction_loss` and `cache/staleness`,
    to what is logged.

    Args:
        loss: the loss, also where it is wrapped in a SpladeLoss.
        resume_from_checkpoint: the folder given to `trainer.train(resume_from_checkpoint=…)`.
            None: that of the training arguments, or the step's checkpoint in the output folder.
        subfolder: of the checkpoint; with several losses each needs its own.

    Raises:
        FileNotFoundError: when training resumes from a checkpoint without a cache.
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
                f"{source / self.subfolder} holds no negative cache; name the checkpoint that is "
                "resumed from in NegativeCacheCallback(loss, resume_from_checkpoint=…)"
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
