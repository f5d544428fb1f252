"""SpladeTrainer: transformers' Trainer for encoders of sparse vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import SchedulerType
from transformers.trainer_callback import TrainerCallback

from splade_fast._distributed import world_size
from splade_fast.encoders.settings import sparse_encoder_files
from splade_fast.encoders.sharding import is_sharded
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.training.arguments import SpladeTrainingArguments
from splade_fast.training.checkpoints.random_state import preserved_random_state
from splade_fast.training.checkpoints.trainer import CheckpointingTrainer
from splade_fast.training.checks import check_training
from splade_fast.training.data import TrainingCollator
from splade_fast.training.data.endless import EndlessStream
from splade_fast.training.data.sources import SourceSampler, join_sources
from splade_fast.training.evaluator import MeanEvaluator, RetrievalEvaluator
from splade_fast.training.fsdp import (
    broadcast_weights,
    fsdp_of_this_trainer_alone,
    prepare_plugin,
    shard_on_cpus,
)
from splade_fast.training.metrics import MetricAverages
from splade_fast.training.model import TrainingModel
from splade_fast.training.symptoms import Symptoms

logger = logging.getLogger(__name__)


class SpladeTrainer(CheckpointingTrainer):
    """Train encoders with transformers' Trainer.

    The log has the loss and the metrics of `TrainingModel`, averaged over steps and processes. An
    evaluation returns `eval_loss`, the same metrics with the prefix `eval_`, and the metrics of the
    evaluator with that prefix; the evaluator's active dims, which are those of all documents,
    replace those of the examples. `metric_for_best_model` may name any of them. An evaluation does
    not change the random numbers of the training.

    A warning tells once when vectors have no active dims, or nearly all dims active, when a loss is
    not finite, and when the relevance loss is 0. It names the option to change.

    Checkpoints are complete or absent, hold no pickles and resume bit for bit; see
    `splade_fast.training.checkpoints`.

    Args:
        model: an encoder, or a `TrainingModel`. For an encoder a `TrainingModel` is made from args.
        args: arguments of the training.
        train_dataset: examples from `load_training_data`; a stream starts over at its end. Several
            sources, {name: examples}, follow batch_sources and source_weights of args.
        eval_dataset: examples for the evaluation loss.
        query_encoder: encoder of the queries; None uses the encoder `model` for queries as well.
        evaluator: evaluator that measures retrieval at each evaluation.
        data_collator: function from examples to a batch; None makes a `TrainingCollator` from args.
        callbacks: callbacks of transformers.
        kwargs: further arguments of transformers' Trainer, such as `optimizers`.

    Raises:
        ValueError: arguments contradict each other, or an encoder cannot be saved.

    Example::

        >>> from datasets import Dataset
        >>> from splade_fast.training import SpladeTrainer, SpladeTrainingArguments
        >>> examples = Dataset.from_dict({"query": ["fox", "dog"], "document": ["a fox", "a dog"]})
        >>> args = SpladeTrainingArguments(
        ...     output_dir="run", max_steps=1, report_to="none", disable_tqdm=True
        ... )
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> trainer = SpladeTrainer(encoder, args, examples)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        1
    """

    # The model returns the mean loss of a batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: TextEncoder | TrainingModel,
        args: SpladeTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        query_encoder: TextEncoder | None = None,
        evaluator: RetrievalEvaluator | MeanEvaluator | None = None,
        data_collator: Callable[[Any], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, TextEncoder):
            model = TrainingModel(
                model, args.objective_arguments(), query_encoder=query_encoder, seed=args.seed
            )
        elif query_encoder is not None:
            raise ValueError("query_encoder must be None beside a TrainingModel, which has one")
        for encoder in (model.encoder, model.query_encoder):
            if isinstance(encoder, SpladeEncoder):
                # Raises now, instead of at the first checkpoint, if the encoder cannot be saved.
                sparse_encoder_files(encoder.settings)
        self.evaluator = evaluator
        self._train_metrics = MetricAverages()
        self._eval_metrics = MetricAverages()
        self._symptoms = Symptoms(model.objective.arguments, model.encoder.vocab_size)
        train_dataset, self._source_sampler = _join_train_dataset(train_dataset, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or _make_collator(model, args),
            train_dataset=train_dataset,
            # Transformers requires examples, which an evaluator does not need.
            eval_dataset=[] if eval_dataset is None and evaluator is not None else eval_dataset,
            callbacks=callbacks,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        if self.is_fsdp_enabled:
            prepare_plugin(self.accelerator.state.fsdp_plugin, args, model)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, and save only the checkpoints that args ask for.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or True for the last one in
                args.output_dir.
            args: further arguments of transformers' Trainer.
            kwargs: further arguments of transformers' Trainer.

        Raises:
            CheckpointError: the checkpoint is missing or belongs to another run, or a new one
                cannot be written. Earlier checkpoints stay as they were.
            ValueError: args ask for activation checkpointing, but no encoder has a transformer; or
                the training would make no step, or change no weight.
        """
        self._check_training()
        if self.args.activation_checkpointing:
            self._enable_activation_checkpointing_of_encoders()
        self._shard_model()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._warn_of_symptoms(self._train_metrics.compute_and_reset(self.args.device))
        return result

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator as transformers' Trainer does, with FSDP2 also on CPUs."""
        with fsdp_of_this_trainer_alone():
            super().create_accelerator_and_postprocess()
        if self.args.uses_fsdp and not self.is_fsdp_enabled:
            shard_on_cpus(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Make the schedule of the learning rate, as transformers' Trainer does.

        Raises:
            ValueError: lr_scheduler_kwargs do not fit lr_scheduler_type.
        """
        try:
            return super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            kind = SchedulerType(self.args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_kwargs must fit lr_scheduler_type, {kind}, "
                f"got {self.args.lr_scheduler_kwargs}: {error}"
            ) from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of a batch, and keep its metrics for the log."""
        self.model.step = self.state.global_step
        # With FSDP2 accelerate leaves autocast to the caller.
        with self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():
            outputs = model(**inputs)
        if self.model.training:
            self._train_metrics.add(outputs["metrics"])
        else:
            # Weighted by examples, as in eval_loss, because the last batch may be smaller.
            self._eval_metrics.add(outputs["metrics"], len(inputs["queries"]["input_ids"]))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch without predictions."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return loss and metrics on examples, and the evaluator's metrics.

        Args:
            eval_dataset: the examples; by default the eval_dataset of the constructor.
            ignore_keys: ignored; part of the signature of transformers' Trainer.
            metric_key_prefix: prefix of each name, followed by "_".

        Returns:
            {name: value}.
        """
        self._shard_model()
        with preserved_random_state(self.args.device):
            if eval_dataset is not None or self.eval_dataset or self.evaluator is None:
                metrics: dict[str, float] = super().evaluate(
                    eval_dataset, ignore_keys, metric_key_prefix
                )
                return metrics
            metrics = self._evaluate_retrieval(metric_key_prefix)
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
        """Run the loop of transformers' Trainer, and add averages and the evaluator's metrics."""
        self._eval_metrics.reset()  # metrics of a loop that an error ended
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        averages = self._eval_metrics.compute_and_reset(self.args.device)
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in averages.items()}
        )
        if self.evaluator is not None and not isinstance(self.eval_dataset, dict):
            output.metrics.update(self._evaluate_retrieval(metric_key_prefix))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers' Trainer does, and add the averaged metrics to a training loss."""
        if "loss" in logs:
            averages = self._train_metrics.compute_and_reset(self.args.device)
            self._warn_of_symptoms(averages)
            logs = logs | averages
        super().log(logs, start_time)

    def _shard_model(self) -> None:
        """Shard the model by FSDP2 if the arguments ask for it."""
        if not self.is_fsdp_enabled or is_sharded(self.model):
            return
        broadcast_weights(self.model)
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        register_fsdp_forward_method(self.model, "call")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        is_own = train_dataset is None or train_dataset is self.train_dataset
        if self._source_sampler is not None and is_own:
            return self._source_sampler
        return super()._get_train_sampler(train_dataset)

    def _check_training(self) -> None:
        """Raise ValueError if the training would make no step, or change no weight."""
        check_training(self.model, self.args, self.train_dataset, self.data_collator)
        if self.optimizer is None and not self.args.learning_rate > 0:
            raise ValueError(f"learning_rate must be greater than 0, got {self.args.learning_rate}")

    def _warn_of_symptoms(self, metrics: dict[str, float]) -> None:
        """Log each kind of failure that the averages of some steps show for the first time."""
        for text in self._symptoms.new_ones(metrics, self.state.global_step):
            if self.is_world_process_zero():
                logger.warning("step %d: %s", self.state.global_step, text)

    def _evaluate_retrieval(self, prefix: str) -> dict[str, float]:
        """Return the evaluator's metrics of the first process, on all processes."""
        assert self.evaluator is not None
        is_shared = self.model.query_encoder is self.model.encoder
        queries = None if is_shared else self.model.query_encoder
        metrics: dict[str, float] = self.model.call(
            self.evaluator, self.model.encoder, queries, prefix=f"{prefix}_"
        )
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

    def _enable_activation_checkpointing_of_encoders(self) -> None:
        """Add the method that transformers' Trainer calls, which a TrainingModel lacks.

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
                if _has_frozen_embeddings(transformer):
                    # Gradients would not pass recomputed layers to the adapters inside them.
                    transformer.enable_input_require_grads()

        self.model.activation_checkpointing_enable = enable


def _make_collator(model: TrainingModel, args: SpladeTrainingArguments) -> TrainingCollator:
    is_shared = model.query_encoder is model.encoder
    return TrainingCollator(
        model.encoder,
        None if is_shared else model.query_encoder,
        max_query_length=args.max_query_length,
        max_document_length=args.max_document_length,
        query_prompt=args.query_prompt,
        document_prompt=args.document_prompt,
        negatives_per_query=args.negatives_per_query,
    )


def _has_frozen_embeddings(transformer: Any) -> bool:
    embeddings: nn.Module = transformer.get_input_embeddings()
    return not any(parameter.requires_grad for parameter in embeddings.parameters())


def _join_train_dataset(
    dataset: Any, args: SpladeTrainingArguments
) -> tuple[Any, SourceSampler | None]:
    """Return a dataset, endless if it is a stream, and the sampler of several sources or None."""
    if isinstance(dataset, Mapping):
        if args.train_sampling_strategy != "random":
            raise ValueError(
                "train_sampling_strategy must be 'random' for several sources, "
                f"got {str(args.train_sampling_strategy)!r}"
            )
        is_mixed = args.batch_sources == "mixed"
        group = 1 if is_mixed else args.train_batch_size * args.world_size
        return join_sources(dataset, args.source_weights, group, args.data_seed or 0)
    if args.source_weights is not None:
        raise ValueError(
            f"source_weights must be None for one source, got {len(args.source_weights)} weights"
        )
    is_finite = dataset is None or hasattr(dataset, "__len__")
    return dataset if is_finite else EndlessStream(dataset), None
