"""What a training run is told: model, data and training, as dataclasses that make flags."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from splade_fast.training.objective import ObjectiveArguments
from splade_fast.training.objective_arguments import check_choices

logger = logging.getLogger(__name__)

ARCHITECTURES = ("splade", "term_weights")
DTYPES = ("float32", "bfloat16", "float16")
QUERY_WEIGHTS = ("idf", "learned")

# Of TrainingArguments: what works on the model itself in a way that a TrainingModel does not allow.
_UNSUPPORTED: dict[str, Any] = {
    "remove_unused_columns": False,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "deepspeed": None,
    "enable_jit_checkpoint": False,
}


@dataclass
class ModelArguments:
    """What is trained.

    Raises:
        ValueError: a field is out of range, or two do not go together.
    """

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the encoder."})
    query_encoder: str = field(
        default="shared",
        metadata={
            "help": "shared: the same as of documents; bag_of_words: a weight for each term of the "
            "query, no transformer; or hub name or folder of another encoder."
        },
    )
    query_weights: str = field(
        default="idf",
        metadata={
            "help": "bag_of_words: idf: of the training documents, fixed; learned: from there on.",
            "choices": QUERY_WEIGHTS,
        },
    )
    architecture: str = field(
        default="splade",
        metadata={
            "help": "splade: weighs all terms of the vocabulary; term_weights: the text's own.",
            "choices": ARCHITECTURES,
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights; see bf16 for mixed precision.", "choices": DTYPES},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "As transformers names it: sdpa, eager, …"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train LoRA adapters of this rank alone; 0: all weights."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale of the adapters times rank; by default 2 · rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})

    def __post_init__(self) -> None:
        check_choices(self, ModelArguments)
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}"
            )


@dataclass
class DataArguments:
    """What it is trained and evaluated on.

    Raises:
        ValueError: a field is out of range, or two do not go together.
    """

    train_data: list[str] = field(
        metadata={"help": "Files, folders or hub names, all of one kind; see load_training_data."}
    )
    train_split: str = field(default="train", metadata={"help": "Which split of a folder or name."})
    data_config: str | None = field(
        default=None, metadata={"help": "Which configuration of a name on the hub."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "name=part of each column whose name does not tell what it holds."},
    )
    train_queries: str | None = field(
        default=None, metadata={"help": "Texts of the queries, where train_data holds their ids."}
    )
    train_corpus: str | None = field(
        default=None, metadata={"help": "Texts of the documents, where train_data holds their ids."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read while training; needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "streaming: shuffle among so many examples; 0: do not."}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Examples for the evaluation loss, as train_data."}
    )
    eval_split: str = field(default="train", metadata={"help": "Which split of eval_data."})
    eval_queries: str | None = field(
        default=None, metadata={"help": "Queries for MRR, nDCG and Recall; with the two below."}
    )
    eval_corpus: str | None = field(default=None, metadata={"help": "The documents searched."})
    eval_qrels: str | None = field(default=None, metadata={"help": "Judgements, TREC or BEIR."})

    def __post_init__(self) -> None:
        retrieval = ("eval_queries", "eval_corpus", "eval_qrels")
        missing = [name for name in retrieval if getattr(self, name) is None]
        if missing and len(missing) < len(retrieval):
            raise ValueError(f"{', '.join(retrieval)} go together, got no {', '.join(missing)}")
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be at least 0, got {self.shuffle_buffer}")


@dataclass
class RunArguments:
    """How a run starts."""

    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the last checkpoint in output_dir, if there is one."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints that are in output_dir."}
    )


@dataclass
class SpladeTrainingArguments(TrainingArguments, ObjectiveArguments):
    """transformers' TrainingArguments, the objective, and how texts become batches.

    Trains on the CPU where there is no accelerator, with several accelerators on one of them unless
    `torchrun` starts a process for each.

    Raises:
        ImportError: a package of the extra "train" is missing.
        ValueError: a field is out of range, not supported, or two do not go together.
    """

    max_query_length: int = field(default=64, metadata={"help": "Tokens kept of each query."})
    max_document_length: int = field(
        default=256, metadata={"help": "Tokens kept of each document."}
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "Name of the prompt before queries; default: query."}
    )
    document_prompt: str | None = field(
        default=None, metadata={"help": "Name of the prompt before documents; default: document."}
    )
    negatives_per_query: int | None = field(
        default=None, metadata={"help": "Take the first so many negatives; default: all."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false."})
    report_to: None | str | list[str] = field(  # noqa: RUF036, the order HfArgumentParser can read
        default="tensorboard", metadata={"help": "Where logs go beside the terminal; or none."}
    )

    def __post_init__(self) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError(
                "training needs the package accelerate: pip install splade_fast[train]"
            )
        self.check_objective()
        for name, only in _UNSUPPORTED.items():
            if getattr(self, name, only) != only:
                raise ValueError(f"{name} must be {only} here, got {getattr(self, name)!r}")
        if self.fsdp:
            raise ValueError(f"fsdp must be off here, got {self.fsdp!r}: torchrun gives plain DDP")
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
        # A batch is no list of equally many rows: slices of one that rank 0 read would mix them up.
        accelerator: Any = self.accelerator_config
        accelerator.dispatch_batches = False
        if self.n_gpu > 1:
            logger.warning("training on one of %d GPUs; torchrun uses all", self.n_gpu)
            self._n_gpu = 1

    def objective_arguments(self) -> ObjectiveArguments:
        """Those of the fields that TrainingModel takes."""
        names = [f.name for f in dataclasses.fields(ObjectiveArguments)]
        return ObjectiveArguments(**{name: getattr(self, name) for name in names})
