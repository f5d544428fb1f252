"""SpladeTrainer: transformers' Trainer for encoders of sparse vectors."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback

from splade_fast._distributed import world_size
from splade_fast.encoders.settings import sparse_encoder_files
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.training.arguments import SpladeTrainingArguments
from splade_fast.training.checkpointing import (
    OPTIMIZER_FILE,
    QUERY_FOLDER,
    CheckpointError,
    check_checkpoint,
    copy_into,
    keep_checkpoints,
    last_checkpoint,
    load_model_state,
    load_tree,
    new_checkpoint,
    own_tensors,
    random_state,
    rank_file,
    remove_leftovers,
    save_model_state,
    save_tree,
    set_random_state,
)
from splade_fast.training.data.collator import TrainingCollator
from splade_fast.training.data.endless import EndlessStream
from splade_fast.training.evaluator import RetrievalEvaluator
from splade_fast.training.model import TrainingModel

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer_state.json"


class SpladeTrainer(Trainer):
    """Trains encoders: batches, loss, logs, evaluation, checkpoints that resume bit for bit.

    Logs the loss and the metrics of `TrainingModel` under their names, averaged over steps and
    processes. Evaluations give `eval_loss`, these metrics with `eval_` before them, and those of
    the evaluator likewise (its active dims, of all documents, take the place of the examples'), all
    of which `metric_for_best_model` may name; they leave the random numbers of the training alone.
    Checkpoints appear whole or not at all and hold no pickles; see
    `splade_fast.training.checkpointing`.

    Args:
        model: an encoder, for which a `TrainingModel` is made from args, or a `TrainingModel`.
        args: how to train.
        train_dataset: examples as `load_training_data` gives them; a stream starts over at its end.
        eval_dataset: examples for the evaluation loss.
        query_encoder: of the queries, where model is an encoder of documents alone.
        evaluator: measures retrieval at each evaluation.
        data_collator: makes batches; None: a `TrainingCollator` from args.
        callbacks: of transformers.
        others: of transformers' Trainer, such as `optimizers`.

    Raises:
        ValueError: arguments do not go together, or an encoder cannot be saved.
    """

    model: Any  # a TrainingModel
    args: Any  # SpladeTrainingArguments
    optimizer: Any
    lr_scheduler: Any

    # Every loss is the mean of its batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: TextEncoder | TrainingModel,
        args: SpladeTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        query_encoder: TextEncoder | None = None,
        evaluator: RetrievalEvaluator | None = None,
        data_collator: Callable[[Any], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **others: Any,
    ) -> None:
        if isinstance(model, TextEncoder):
            model = TrainingModel(
                model, args.objective_arguments(), query_encoder=query_encoder, seed=args.seed
            )
        elif query_encoder is not None:
            raise ValueError("query_encoder must be None beside a TrainingModel, which has one")
        for encoder in (model.encoder, model.query_encoder):
            if isinstance(encoder, SpladeEncoder):  # not after hours, at the first checkpoint
                sparse_encoder_files(encoder.settings)
        self.evaluator = evaluator
        self._train_metrics = _Averages()
        self._eval_metrics = _Averages()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or _collator_of(model, args),
            train_dataset=_endless_if_streamed(train_dataset),
            # An evaluator needs no examples, which transformers asks for.
            eval_dataset=[] if eval_dataset is None and evaluator is not None else eval_dataset,
            callbacks=callbacks,
            **others,
        )
        self.model_accepts_loss_kwargs = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, and save nothing but the checkpoints that args ask for.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True: the last one in args.output_dir.
            others: as transformers' Trainer.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of another run; or one cannot be
                written, in which case those before it are as they were.
        """
        output_dir = Path(self.args.output_dir)
        with self.args.main_process_first(local=self.args.save_on_each_node):
            if self.args.should_save:
                remove_leftovers(output_dir)
        if resume_from_checkpoint is True:
            found = last_checkpoint(output_dir)
            if found is None:
                raise CheckpointError(f"{output_dir} must hold a checkpoint to resume, got none")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
        if self.args.activation_checkpointing:
            self._let_trainer_checkpoint_activations()
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a batch; its metrics are kept for the log."""
        self.model.step = self.state.global_step
        outputs = model(**inputs)
        if self.model.training:
            self._train_metrics.add(outputs["metrics"])
        else:  # as eval_loss, by examples: the last batch may be smaller
            self._eval_metrics.add(outputs["metrics"], len(inputs["queries"]["input_ids"]))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, with labels or without."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics on examples, then the evaluator's; as transformers' Trainer.

        Args:
            eval_dataset: the examples; by default those given to the constructor.
            ignore_keys: has no meaning here.
            metric_key_prefix: goes before each name, with a "_" between.

        Returns:
            {name: value}.
        """
        with _same_random_numbers_after(self.args.device):
            if eval_dataset is not None or self.eval_dataset or self.evaluator is None:
                found: dict[str, float] = super().evaluate(
                    eval_dataset, ignore_keys, metric_key_prefix
                )
                return found
            metrics = self._retrieval_metrics(metric_key_prefix)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As transformers' Trainer; adds the averages of the metrics and the evaluator's."""
        self._eval_metrics.means(self.args.device)  # of another loop that an error ended
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._eval_metrics.means(self.args.device)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        if self.evaluator is not None and not isinstance(self.eval_dataset, dict):
            output.metrics.update(self._retrieval_metrics(metric_key_prefix))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers' Trainer; a training loss brings the averages of its metrics along."""
        if "loss" in logs:
            logs = logs | self._train_metrics.means(self.args.device)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder as its `save_pretrained` does; a separate query encoder to `query/`.

        Args:
            output_dir: the folder; by default args.output_dir.
        """
        if self.args.should_save:
            self._save_encoders(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_encoders(self, folder: Path) -> None:
        self.model.encoder.save_pretrained(folder)
        if self.model.query_encoder is not self.model.encoder:
            self.model.query_encoder.save_pretrained(folder / QUERY_FOLDER)

    def _retrieval_metrics(self, prefix: str) -> dict[str, float]:
        """What the evaluator finds, the same on all processes."""
        assert self.evaluator is not None
        shared = self.model.query_encoder is self.model.encoder
        queries = None if shared else self.model.query_encoder
        metrics = self.evaluator(self.model.encoder, queries, prefix=f"{prefix}_")
        if world_size() > 1:
            values = torch.tensor(list(metrics.values()), dtype=torch.float64)
            values = values.to(self.args.device)
            dist.broadcast(values, 0)
            metrics = dict(zip(metrics, values.tolist(), strict=True))
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return bool(super()._determine_best_metric(metrics, trial))
        except KeyError:
            known = ", ".join(sorted(metrics))
            raise ValueError(
                f"metric_for_best_model must be one of {known}, "
                f"got {self.args.metric_for_best_model!r}"
            ) from None

    def _let_trainer_checkpoint_activations(self) -> None:
        """Give the model what transformers' Trainer calls; TrainingModel is no transformers model.

        Raises:
            ValueError: no encoder has a transformer.
        """
        encoders = {id(e): e for e in (self.model.encoder, self.model.query_encoder)}
        transformers: list[Any] = [
            part
            for encoder in encoders.values()
            if isinstance(part := getattr(encoder, "model", None), nn.Module)
        ]
        if not transformers:
            raise ValueError(
                "activation_checkpointing must be False for encoders without a transformer, "
                "got True"
            )

        def enable(**kwargs: Any) -> None:
            for transformer in transformers:
                transformer.activation_checkpointing_enable(**kwargs)
                if _is_frozen_at_the_bottom(transformer):
                    transformer.enable_input_require_grads()

        self.model.activation_checkpointing_enable = enable

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        args, state = self.args, self.state
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{state.global_step}"
        if state.best_global_step:
            best = folder.with_name(f"checkpoint-{state.best_global_step}")
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        with new_checkpoint(folder, writer=args.should_save, device=args.device) as partial:
            if args.should_save:
                self._save_encoders(partial)
                self._export_callbacks()
                state.save_to_json(str(partial / _STATE_FILE))
            if not args.save_only_model:
                self._save_training_state(partial)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            keep_checkpoints(folder.parent, args.save_total_limit, state.best_model_checkpoint)

    def _save_training_state(self, folder: Path) -> None:
        own = self._own_tensors()
        if self.args.should_save:
            save_model_state(self.model, folder, own)
            scaler = getattr(self.accelerator, "scaler", None)
            save_tree(
                folder / OPTIMIZER_FILE,
                {
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.lr_scheduler.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
            )
        tensors = self.model.state_dict()
        save_tree(
            folder / rank_file(self.args.process_index, self.args.world_size),
            {
                "random": random_state(self.args.device),
                "buffers": {name: tensors[name] for name in sorted(own)},
            },
        )

    def _own_tensors(self) -> set[str]:
        arguments = self.args.objective_arguments()
        return own_tensors(self.model, replicated=arguments.cache_sharing == "replicas")

    def _export_callbacks(self) -> None:
        """The states of the callbacks go into the trainer's."""
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
        check_checkpoint(folder, self.args.world_size)
        logger.info("resuming from %s", folder)
        self._load_model(folder)

    def _load_model(self, folder: Path) -> None:
        load_model_state(self.model, folder, self._own_tensors())
        buffers = self._rank_state(folder)["buffers"]
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in buffers:
                copy_into(tensor, buffers[name], name, folder)

    def _rank_state(self, folder: str | Path) -> Any:
        name = rank_file(self.args.process_index, self.args.world_size)
        return load_tree(Path(folder) / name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_tree(Path(checkpoint) / OPTIMIZER_FILE)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"the optimizer of {checkpoint} is another one: {error}"
            ) from error
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(self._rank_state(checkpoint)["random"], self.args.device)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        logger.info("loading the best model, %s", best)
        self._load_model(best)


class _Averages:
    """Sums of metrics since they were last asked for, without waiting for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, metrics: dict[str, Tensor], count: int = 1) -> None:
        for name, mean in metrics.items():
            value = mean.detach().double() * count
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += count

    def means(self, device: torch.device) -> dict[str, float]:
        """Over all processes, which have the same names; then start anew."""
        names = sorted(self._sums)
        sums = [self._sums[name].to(device) for name in names]
        counts = [float(self._counts[name]) for name in names]
        self._sums.clear()
        self._counts.clear()
        if not names:
            return {}
        totals = torch.stack([torch.stack(sums), torch.tensor(counts, device=device).double()])
        if world_size() > 1:
            dist.all_reduce(totals)
        return dict(zip(names, (totals[0] / totals[1]).tolist(), strict=True))


def _collator_of(model: TrainingModel, args: SpladeTrainingArguments) -> TrainingCollator:
    shared = model.query_encoder is model.encoder
    return TrainingCollator(
        model.encoder,
        None if shared else model.query_encoder,
        max_query_length=args.max_query_length,
        max_document_length=args.max_document_length,
        query_prompt=args.query_prompt,
        document_prompt=args.document_prompt,
        negatives_per_query=args.negatives_per_query,
    )


def _is_frozen_at_the_bottom(transformer: Any) -> bool:
    """Whether gradients would not get through the recomputed layers to adapters in them."""
    embeddings: nn.Module = transformer.get_input_embeddings()
    return not any(parameter.requires_grad for parameter in embeddings.parameters())


def _endless_if_streamed(dataset: Any) -> Any:
    return dataset if dataset is None or hasattr(dataset, "__len__") else EndlessStream(dataset)


@contextmanager
def _same_random_numbers_after(device: torch.device) -> Iterator[None]:
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
