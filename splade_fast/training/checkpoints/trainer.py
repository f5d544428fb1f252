"""Transformers' Trainer with checkpoints that are complete, free of pickles and exact."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from splade_fast._atomic_files import remove_folder
from splade_fast.encoders.sharding import is_sharded, reshard
from splade_fast.encoders.whole_weights import whole_weights
from splade_fast.search.index import is_model_folder
from splade_fast.search.models import QUERY_FOLDER
from splade_fast.training.checkpoints.folders import (
    OPTIMIZER_FILE,
    CheckpointError,
    check_checkpoint,
    count_writers,
    delete_surplus_checkpoints,
    find_last_checkpoint,
    new_checkpoint,
    rank_file,
    remove_leftovers,
)
from splade_fast.training.checkpoints.model_state import (
    MODEL_FILE,
    changing_shards,
    copy_into,
    find_rank_tensors,
    load_model_state,
    save_model_state,
)
from splade_fast.training.checkpoints.random_state import get_random_state, set_random_state
from splade_fast.training.checkpoints.shards import (
    cut_tree,
    gather_tree,
    shard_optimizer_state,
)
from splade_fast.training.checkpoints.trees import load_tree, save_tree

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer_state.json"


class CheckpointingTrainer(Trainer):
    """Trainer of a `TrainingModel` whose checkpoints resume bit for bit.

    The private methods replace those of transformers' Trainer with the same names.
    """

    model: Any  # a TrainingModel
    args: Any  # SpladeTrainingArguments
    optimizer: Any
    lr_scheduler: Any

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Remove what a killed run left, find the checkpoint to resume from, and train.

        `SpladeTrainer.train` describes the arguments and errors.
        """
        output_dir = Path(self.args.output_dir)
        with self.args.main_process_first(local=self.args.save_on_each_node):
            if self.args.should_save:
                remove_leftovers(output_dir)
        if resume_from_checkpoint is True:
            last = find_last_checkpoint(output_dir)
            if last is None:
                raise CheckpointError(f"{output_dir} must hold a checkpoint to resume, got none")
            resume_from_checkpoint = str(last)
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder with its `save_pretrained`, and a separate query encoder to `query/`.

        Args:
            output_dir: the folder; by default args.output_dir.
        """
        with whole_weights(self.model) as has_weights:
            if self.args.should_save and has_weights:
                self._save_encoders(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_encoders(self, folder: Path) -> None:
        is_shared = self.model.query_encoder is self.model.encoder
        if is_shared and is_model_folder(folder / QUERY_FOLDER):
            remove_folder(folder / QUERY_FOLDER)  # of an earlier run; searches would use it
        self.model.encoder.save_pretrained(folder)
        if not is_shared:
            self.model.query_encoder.save_pretrained(folder / QUERY_FOLDER)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        args, state = self.args, self.state
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{state.global_step}"
        if state.best_global_step:
            best = folder.with_name(f"checkpoint-{state.best_global_step}")
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        with new_checkpoint(folder, is_writer=args.should_save) as partial:
            if not self._should_save_shards:
                self._save_whole_weights(partial)
            if args.should_save:
                self._export_callbacks()
                state.save_to_json(str(partial / _STATE_FILE))
            if not args.save_only_model:
                self._save_training_state(partial)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            best_checkpoint = state.best_model_checkpoint
            delete_surplus_checkpoints(folder.parent, args.save_total_limit, best_checkpoint)

    @property
    def _should_save_shards(self) -> bool:
        """Whether each process saves its part of sharded weights, instead of the first one all."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)

    def _save_whole_weights(self, folder: Path) -> None:
        rank_tensors = self._find_rank_tensors()
        with whole_weights(self.model) as has_weights:
            if self.args.should_save and has_weights:
                self._save_encoders(folder)
                if not self.args.save_only_model:
                    save_model_state(self.model, folder, rank_tensors)

    def _save_training_state(self, folder: Path) -> None:
        optimizer = self.optimizer.state_dict()
        shards: dict[str, Any] = {}
        if self._should_save_shards:
            shards = cut_tree({"weights": changing_shards(self.model), "optimizer": optimizer})
            optimizer = None
        else:
            optimizer = gather_tree(optimizer, is_kept=self.args.should_save)
        if self.args.should_save:
            scaler = getattr(self.accelerator, "scaler", None)
            save_tree(
                folder / OPTIMIZER_FILE,
                {
                    "optimizer": optimizer,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
            )
        tensors = self.model.state_dict()
        save_tree(
            folder / rank_file(self.args.process_index, self.args.world_size),
            {
                "random": get_random_state(self.args.device),
                "buffers": {name: tensors[name] for name in sorted(self._find_rank_tensors())},
                **shards,
            },
        )

    def _find_rank_tensors(self) -> set[str]:
        is_replicated = self.args.objective_arguments().cache_sharing == "replicas"
        return find_rank_tensors(self.model, are_caches_equal=is_replicated)

    def _export_callbacks(self) -> None:
        """Copy the states of the callbacks into the trainer's state."""
        exported: dict[str, Any] = defaultdict(list)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                exported[type(callback).__name__].append(callback.state())
        state: Any = self.state
        state.stateful_callbacks = {
            name: states[0] if len(states) == 1 else states for name, states in exported.items()
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_checkpoint(
            folder,
            self.args.world_size,
            is_for_any_number=_has_whole_weights(folder) and self.model.is_cache_replicated,
        )
        if not _has_whole_weights(folder) and not is_sharded(self.model):
            raise CheckpointError(f"{folder} holds sharded weights and must be resumed with fsdp")
        logger.info("resuming from %s", folder)
        self._load_model(folder)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        logger.info("loading the best model, %s", best)
        self._load_model(best)

    def _load_model(self, folder: Path) -> None:
        reshard(self.model)
        state = self._load_rank_state(folder)
        own = dict(state["buffers"])
        if _has_whole_weights(folder):
            load_model_state(self.model, folder, self._find_rank_tensors())
        else:
            own |= state["weights"]
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in own:
                copy_into(cut_tree(tensor.detach()), own[name], name, folder)

    def _load_rank_state(self, folder: str | Path) -> Any:
        """Return the state of this process, or of another one if fewer wrote the checkpoint."""
        written = count_writers(folder)
        return load_tree(Path(folder) / rank_file(self.args.process_index % written, written))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_tree(Path(checkpoint) / OPTIMIZER_FILE)
        is_whole = _has_whole_weights(checkpoint)
        optimizer = (
            state["optimizer"] if is_whole else self._load_rank_state(checkpoint)["optimizer"]
        )
        try:
            self.optimizer.load_state_dict(
                shard_optimizer_state(optimizer, self.optimizer.param_groups, is_cut=not is_whole)
            )
        except ValueError as error:
            raise CheckpointError(
                f"the optimizer must be the one of {checkpoint}, got another: {error}"
            ) from error
        self.lr_scheduler.load_state_dict(state["scheduler"])
        scaler = getattr(self.accelerator, "scaler", None)
        if state["scaler"] is not None and scaler is not None:
            scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: `_load_optimizer_and_scheduler` loads the scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(self._load_rank_state(checkpoint)["random"], self.args.device)


def _has_whole_weights(folder: str | Path) -> bool:
    """Return whether the first process wrote the weights of a checkpoint, not each its part."""
    return (Path(folder) / MODEL_FILE).is_file()
