"""Arguments of a training run as dataclasses, whose fields are the flags of the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from splade_fast._checks import POOLINGS, check_count
from splade_fast.encoders.attention import ATTENTIONS
from splade_fast.training.data.sources import BATCH_SOURCES
from splade_fast.training.objective import ObjectiveArguments
from splade_fast.training.objective_arguments import check_choices

logger = logging.getLogger(__name__)

ARCHITECTURES = ("splade", "term_weights")
DTYPES = ("float32", "bfloat16", "float16")
QUERY_WEIGHTS = ("idf", "learned")

# Fields of TrainingArguments that a TrainingModel does not support, and their only values.
_UNSUPPORTED: dict[str, Any] = {
    "remove_unused_columns": False,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "deepspeed": None,
    "enable_jit_checkpoint": False,
}
# Fields of TrainingArguments whose errors would not name them, or come late.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
_FINITE = ("learning_rate", "weight_decay", "num_train_epochs")


@dataclass
class ModelArguments:
    """Encoders to train, and their adapters.

    Raises:
        ValueError: a field is out of range.
    """

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the encoder."})
    query_encoder: str = field(
        default="shared",
        metadata={
            "help": "Encoder of the queries. shared: the encoder of the documents; bag_of_words: a "
            "weight for each term, without a transformer; else hub name or folder."
        },
    )
    query_weights: str = field(
        default="idf",
        metadata={
            "help": "Weights of bag_of_words. idf: fixed, from the training documents; learned: "
            "trained, starting from idf.",
            "choices": QUERY_WEIGHTS,
        },
    )
    architecture: str = field(
        default="splade",
        metadata={
            "help": "Terms that get a weight. splade: all of the vocabulary; term_weights: only "
            "those of the text.",
            "choices": ARCHITECTURES,
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights; see bf16 for mixed precision.",
            "choices": DTYPES,
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention as transformers names it: sdpa, eager, …"}
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "Direction of a causal language model's attention: bidirectional or causal; by "
            "default that of the checkpoint.",
            "choices": list(ATTENTIONS),
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "Pooling over the tokens: max, sum, mean or last; by default the checkpoint's.",
            "choices": list(POOLINGS),
        },
    )
    logit_scale: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the logits, such as 0.0625 for ModernBERT, which may collapse with "
            "1; by default the checkpoint's."
        },
    )
    train_logit_scale: bool = field(
        default=False, metadata={"help": "Train the factor of the logits."}
    )
    echo: str | None = field(
        default=None,
        metadata={
            "help": "Text between two copies of each text, of which the second is pooled; for "
            "causal attention."
        },
    )
    prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "name=text for each prompt to add; those named query and document go before "
            "queries and documents."
        },
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights instead."}
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "Scale of the adapters times their rank; by default 2 · rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})

    def __post_init__(self) -> None:
        check_choices(self, ModelArguments)
        for name in ("model_name_or_path", "query_encoder"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} must be a folder or a hub name, got {getattr(self, name)!r}"
                )
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        for prompt in self.prompts or []:
            if not prompt.partition("=")[1]:
                raise ValueError(f"prompts must be name=text, got {prompt!r}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be greater than 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}"
            )


@dataclass
class DataArguments:
    """Data of the training and of the evaluations.

    Raises:
        ValueError: a field is out of range, or a file of the evaluation is missing.
    """

    train_data: list[str] = field(
        metadata={"help": "Files, folders or hub names, all of one kind; see load_training_data."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of a folder or hub name."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a hub name."})
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "name=part for each column whose name does not tell its part."},
    )
    train_queries: str | None = field(
        default=None, metadata={"help": "Texts of the queries, if train_data holds their ids."}
    )
    train_corpus: str | None = field(
        default=None,
        metadata={"help": "Texts of the documents, if train_data holds their ids."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data during the training; needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Number of examples to shuffle when streaming; 0: none."}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Examples for the evaluation loss, given as train_data."}
    )
    eval_split: str = field(default="train", metadata={"help": "Split of eval_data."})
    eval_queries: str | None = field(
        default=None, metadata={"help": "Queries for MRR, nDCG and Recall; needs the next two."}
    )
    eval_corpus: str | None = field(default=None, metadata={"help": "Documents to search."})
    eval_qrels: str | None = field(
        default=None, metadata={"help": "Judgements, as TREC or BEIR writes them."}
    )
    eval_sets: list[str] | None = field(
        default=None,
        metadata={
            "help": "BEIR folders or hub names such as NanoBEIR's, instead of the three files; "
            "NAME:SPLIT names a split. Several give a mean."
        },
    )
    eval_measures: list[str] | None = field(
        default=None,
        metadata={"help": "Measures of ir_measures; by default MRR@10 nDCG@10 Recall@100."},
    )
    eval_ignore_identical_ids: bool = field(
        default=False,
        metadata={"help": "Do not search the document that has the id of the query, as in BEIR."},
    )

    def __post_init__(self) -> None:
        retrieval = ("eval_queries", "eval_corpus", "eval_qrels")
        for name in ("train_queries", "train_corpus", *retrieval):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        self.train_data = [os.path.expanduser(source) for source in self.train_data]
        if self.eval_data is not None:
            self.eval_data = [os.path.expanduser(source) for source in self.eval_data]
        if self.eval_sets is not None:
            self.eval_sets = [os.path.expanduser(source) for source in self.eval_sets]
            if any(getattr(self, name) is not None for name in retrieval):
                raise ValueError(f"eval_sets must be given without {', '.join(retrieval)}")
        missing = [name for name in retrieval if getattr(self, name) is None]
        if missing and len(missing) < len(retrieval):
            raise ValueError(
                f"{', '.join(retrieval)} must be given together, got no {', '.join(missing)}"
            )
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be at least 0, got {self.shuffle_buffer}")


@dataclass
class RunArguments:
    """Start of a run: new, resumed or over."""

    resume: bool = field(
        default=False,
        metadata={"help": "Resume the last checkpoint in output_dir, if there is one."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints in output_dir, and start anew."}
    )


@dataclass
class SpladeTrainingArguments(TrainingArguments, ObjectiveArguments):
    """Arguments of `SpladeTrainer`: transformers' TrainingArguments, the objective, and batches.

    The training runs on the CPU where there is no accelerator, and on one of several accelerators
    unless `torchrun` starts a process for each.

    Raises:
        ImportError: a package of the extra "train" is missing.
        ValueError: a field is out of range or not supported, or two fields contradict each other.

    Example::

        >>> from splade_fast.training import SpladeTrainingArguments
        >>> args = SpladeTrainingArguments(output_dir="run", loss="kl", temperature=2.0)
        >>> args.objective_arguments().loss
        'kl'
    """

    max_query_length: int = field(
        default=64, metadata={"help": "Number of tokens kept of each query."}
    )
    max_document_length: int = field(
        default=256, metadata={"help": "Number of tokens kept of each document."}
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "Name of the prompt before queries; by default query."}
    )
    document_prompt: str | None = field(
        default=None, metadata={"help": "Name of the prompt before documents; by default document."}
    )
    negatives_per_query: int | None = field(
        default=None,
        metadata={"help": "Number of negatives to take, the first ones; by default all."},
    )
    batch_sources: str = field(
        default="mixed",
        metadata={
            "help": "Sources of a batch, if there are several. mixed: all; separate: one, the same "
            "for all processes, so that in-batch negatives come from the query's own source.",
            "choices": BATCH_SOURCES,
        },
    )
    source_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of each source in the batches; by default its number of examples, and "
            "equal shares for streams."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false."})
    report_to: None | str | list[str] = field(  # noqa: RUF036, the order HfArgumentParser can read
        default="tensorboard",
        metadata={"help": "Destinations of the log beside the terminal, or none."},
    )

    def __post_init__(self) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError(
                "training needs the package accelerate: pip install splade_fast[train]"
            )
        self.check_objective()
        if self.batch_sources not in BATCH_SOURCES:
            raise ValueError(
                f"batch_sources must be one of {', '.join(BATCH_SOURCES)}, "
                f"got {self.batch_sources!r}"
            )
        for weight in self.source_weights or ():
            if not 0 < weight < math.inf:
                raise ValueError(f"source_weights must be above 0 and finite, got {weight}")
        for name, least in _LEAST.items():
            check_count(name, getattr(self, name), least)
        for name in _FINITE:
            if not math.isfinite(float(getattr(self, name))):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if isinstance(self.resume_from_checkpoint, str):
            self.resume_from_checkpoint = os.path.expanduser(self.resume_from_checkpoint)
        for name, only in _UNSUPPORTED.items():
            if getattr(self, name, only) != only:
                advice = "; fsdp: true shards the weights (FSDP2)" if name == "deepspeed" else ""
                raise ValueError(f"{name} must be {only} here, got {getattr(self, name)!r}{advice}")
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false", ""):
            fsdp: Any = self.fsdp.lower() == "true" or None  # as a file or a flag gives it
            self.fsdp = fsdp
        if self.save_only_model and self.load_best_model_at_end:
            raise ValueError("save_only_model must be False with load_best_model_at_end, got True")
        if self.ddp_broadcast_buffers:
            raise ValueError(
                "ddp_broadcast_buffers must be False, got True: caches and random states are "
                "buffers, and each process has its own"
            )
        self.ddp_broadcast_buffers = False
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed
        # Slices of a batch that rank 0 reads would be wrong: its tensors have unequal row counts.
        accelerator: Any = self.accelerator_config
        accelerator.dispatch_batches = False
        if self.uses_fsdp:
            self._check_fsdp()
            if accelerator.gradient_accumulation_kwargs is None:
                # Gradients of a whole model would otherwise wait for the last batch of a step.
                accelerator.gradient_accumulation_kwargs = {"sync_each_batch": True}
        if self.n_gpu > 1:
            logger.warning("training on one of %d GPUs; torchrun uses all", self.n_gpu)
            self._n_gpu = 1

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP2 shards the model: by the argument fsdp, or by `accelerate launch`."""
        from accelerate.utils import parse_flag_from_env

        return bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")

    def _check_fsdp(self) -> None:
        """Raise ValueError where FSDP2 cannot work; `prepare_plugin` checks its options."""
        from accelerate.utils import parse_flag_from_env

        # Checked before transformers loads empty weights into all processes but the first.
        if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise ValueError(
                "cpu_ram_efficient_loading must be false with fsdp, because each process has "
                "buffers of its own, got true"
            )
        if self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                "fsdp must be off without torchrun or accelerate launch, which start its "
                f"processes, got {self.fsdp!r}"
            )
        if self.use_cpu and torch.accelerator.is_available():
            raise ValueError("use_cpu must be False with fsdp where there are accelerators")

    def objective_arguments(self) -> ObjectiveArguments:
        """Return the fields that TrainingModel takes."""
        names = [f.name for f in dataclasses.fields(ObjectiveArguments)]
        return ObjectiveArguments(**{name: getattr(self, name) for name in names})
