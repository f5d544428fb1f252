"""`splade-fast train`: a configuration file and flags become a run of the trainer."""

from __future__ import annotations

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments, set_seed

from splade_fast._distributed import world_size
from splade_fast.encoders.adapters import add_lora
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.pretrained import read_json
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.training.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    SpladeTrainingArguments,
)
from splade_fast.training.checkpointing import delete_checkpoints, last_checkpoint, remove_leftovers
from splade_fast.training.data.load import import_datasets, load_training_data
from splade_fast.training.evaluator import RetrievalEvaluator
from splade_fast.training.objective import ObjectiveArguments
from splade_fast.training.trainer import SpladeTrainer

T = TypeVar("T")

_ENCODERS = {"splade": SpladeEncoder, "term_weights": TermWeightEncoder}
_PARTS: Any = (ModelArguments, DataArguments, SpladeTrainingArguments, RunArguments)
_IDF_EXAMPLES = 100_000  # document frequencies of more would hardly differ

_USAGE = """\
Usage: splade-fast train --config FILE.yaml [--flag value …]

Train an encoder. Keys of the file are the flags below without their dashes; a flag goes before a
key. With several processes: torchrun --nproc-per-node N -m splade_fast train …
"""
_MOST_USED = (
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "max_grad_norm", "num_train_epochs", "max_steps", "warmup_steps"),
    *("lr_scheduler_type", "bf16", "activation_checkpointing", "seed", "logging_steps"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy", "save_steps"),
    *("save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("resume_from_checkpoint", "dataloader_num_workers", "report_to", "ddp_backend"),
)


class ConfigError(ValueError):
    """A configuration file or flag that means nothing; says which, and what is near."""


@dataclass
class Configuration:
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    training: SpladeTrainingArguments
    run: RunArguments

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and the model go."""
        return Path(str(self.training.output_dir))


def train(arguments: Sequence[str]) -> str | None:
    """Train as flags and the file of --config say.

    Args:
        arguments: the flags.

    Returns:
        What to tell the user: where the model is, or the help that was asked for; nothing in
        other processes than the first.

    Raises:
        ConfigError: a flag or key is unknown, or has a value that it cannot have.
        OSError, ValueError, ImportError: bad input, a package is missing, or a full disk.
    """
    for flag in ("--help", "--help-all"):
        if flag in arguments:
            return help_text(everything=flag == "--help-all")
    with _damaged_files_are_bad_input():
        configuration = parse(arguments)
        trainer = make_trainer(configuration)
        checkpoint = _checkpoint_to_resume(configuration)
        trainer.train(resume_from_checkpoint=checkpoint)
        training = configuration.training
        if training.eval_strategy == "no" and trainer.eval_dataset is not None:
            trainer.evaluate()
        trainer.save_model()
        if training.should_save:
            trainer.state.save_to_json(str(configuration.output_dir / "trainer_state.json"))
        if dist.is_initialized():
            dist.destroy_process_group()
    if training.process_index != 0:
        return None
    return f"{configuration.output_dir}: trained for {trainer.state.global_step} steps"


def parse(arguments: Sequence[str]) -> Configuration:
    """Flags, and the keys of the file that --config names, as arguments.

    Raises:
        ConfigError: a flag or key is unknown, or has a value that it cannot have.
        ValueError: values do not go together.
    """
    config, flags = _split_config(arguments)
    if flags and not flags[0].startswith("-"):  # a list in the file would take it
        raise ConfigError(f"expected a flag, got {flags[0]!r}")
    from_file = [] if config is None else _flags_of_file(Path(config))
    parser = _Parser(_PARTS, allow_abbrev=False, add_help=False)
    # Of flags given twice the last counts.
    *parts, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"expected a flag, got {flag!r}")
        raise ConfigError(f"unknown flag {flag}{_near(flag.lstrip('-'), '--')}")
    return Configuration(*parts)


def make_trainer(configuration: Configuration) -> SpladeTrainer:
    """Load models and data.

    Raises:
        FileExistsError: the output directory has something in it.
        OSError, ValueError, ImportError: a model or data cannot be used, or a package is missing.
        SystemExit: in one of several processes, where another one raises such an error.
    """
    model, data, training = configuration.model, configuration.data, configuration.training
    together(lambda: _check_output_dir(configuration), training)
    set_seed(training.seed)  # for weights that are new, such as those of adapters
    encoder = together(lambda: _load_encoder(model), training)
    train_data = eval_data = None
    for first in (True, False):  # one process of each machine converts it, the others read that
        if (training.local_process_index == 0) == first:
            train_data, eval_data = together(lambda: _load_all_data(data, training), training)
        else:
            together(lambda: None, training)
    return together(
        lambda: SpladeTrainer(
            encoder,
            training,
            train_dataset=train_data,
            eval_dataset=eval_data,
            query_encoder=_load_query_encoder(model, encoder, train_data),
            evaluator=_load_evaluator(data, training),
        ),
        training,
    )


def together(action: Callable[[], T], training: SpladeTrainingArguments) -> T:
    """What the action returns; where it fails in one of several processes, all of them end.

    Raises:
        ImportError, OSError, ValueError: as the action, in the first process where it fails.
        SystemExit: in the others, which have nothing to add.
    """
    problem: Exception | None = None
    result: Any = None
    try:
        with _damaged_files_are_bad_input():
            result = action()
    except (ImportError, OSError, ValueError) as error:
        problem = error
    first = training.process_index if problem is not None else training.world_size
    if world_size() > 1:
        failed = torch.tensor(first, device=training.device)
        dist.all_reduce(failed, dist.ReduceOp.MIN)
        first = int(failed)
    if first == training.world_size:
        found: T = result
        return found
    if problem is not None and first == training.process_index:
        raise problem
    raise SystemExit(2)


def help_text(everything: bool = False) -> str:
    """All flags with what they mean; of transformers' own the most used ones, or everything."""
    objective = {f.name for f in dataclasses.fields(ObjectiveArguments)}
    training = {f.name: f for f in dataclasses.fields(SpladeTrainingArguments) if f.init}
    transformers = {f.name for f in dataclasses.fields(TrainingArguments)}
    theirs = [n for n in training if n in transformers and (everything or n in _MOST_USED)]
    batches = [n for n in training if n not in transformers and n not in objective]
    most_used = "Training (all of transformers' TrainingArguments: --help-all)"
    sections = {
        "Run": dataclasses.fields(RunArguments),
        "Model": dataclasses.fields(ModelArguments),
        "Data": dataclasses.fields(DataArguments),
        "Batches": [training[name] for name in batches],
        "Objective": [training[name] for name in training if name in objective],
        "Training" if everything else most_used: [training[name] for name in theirs],
    }
    lines = [_USAGE]
    for title, fields in sections.items():
        lines += [f"{title}:", *(_help_of(field) for field in fields), ""]
    return "\n".join(lines)


def _help_of(field: Any) -> str:
    text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    if field.default is not dataclasses.MISSING and field.default not in (None, ""):
        text += f" [{getattr(field.default, 'value', field.default)}]"
    elif field.default_factory is dataclasses.MISSING and field.default is dataclasses.MISSING:
        text += " [required]"
    flag = f"  --{field.name}"
    wrapped = textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([flag, *wrapped])


class _Parser(HfArgumentParser):
    """Says what is wrong, without two hundred flags before it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of --config, and all other arguments."""
    config, others = None, list(arguments)
    for position, argument in enumerate(others):
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            continue
        if not equals and position + 1 == len(others):
            raise ConfigError("--config must be followed by a file")
        config = value if equals else others[position + 1]
        del others[position : position + (1 if equals else 2)]
        break
    return config, others


def _flags_of_file(path: Path) -> list[str]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "--config needs the package pyyaml: pip install splade_fast[train]"
        ) from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in _names():
            raise ConfigError(f"{path}: unknown key {key!r}{_near(name)}")
        flags += _flag(path, name, value)
    return flags


def _flag(path: Path, name: str, value: Any) -> list[str]:
    """The flag that a key of a file stands for; so both are read by the same rules."""
    if value is None:
        raise ConfigError(f"{path}: {name} must have a value; leave it out for the default")
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)] if value else []
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"--{name}={value}"]


def _names() -> set[str]:
    return {f.name for part in _PARTS for f in dataclasses.fields(part) if f.init}


def _near(name: str, dashes: str = "") -> str:
    """The end of a message about an unknown name: those that it may have been meant to be."""
    near = difflib.get_close_matches(name.replace("-", "_"), sorted(_names()), n=3)
    return "; near it: " + ", ".join(dashes + key for key in near) if near else ""


def _check_output_dir(configuration: Configuration) -> None:
    """By the first process alone: the others would see what it writes."""
    run, folder = configuration.run, configuration.output_dir
    if configuration.training.process_index != 0:
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir must be a folder, got the file {folder}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if run.overwrite_output_dir:
        delete_checkpoints(folder)
    elif run.resume or configuration.training.resume_from_checkpoint:
        remove_leftovers(folder)
    else:
        raise FileExistsError(
            f"output_dir must be empty, got {folder}; --resume goes on with the run in it, "
            "--overwrite_output_dir deletes its checkpoints"
        )


def _checkpoint_to_resume(configuration: Configuration) -> str | None:
    if configuration.training.resume_from_checkpoint:
        return str(configuration.training.resume_from_checkpoint)
    if not configuration.run.resume:
        return None
    last = last_checkpoint(configuration.output_dir)
    return None if last is None else str(last)


def _load_encoder(arguments: ModelArguments, name: str | None = None) -> TextEncoder:
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    kind: Any = _ENCODERS[arguments.architecture]
    encoder: TextEncoder = kind.from_pretrained(name or arguments.model_name_or_path, **options)
    if arguments.lora_rank:
        _add_adapters(encoder, arguments)
    return encoder


def _add_adapters(encoder: TextEncoder, arguments: ModelArguments) -> None:
    if not isinstance(encoder, SpladeEncoder):
        raise ValueError(
            f"lora_rank must be 0 for the architecture {arguments.architecture}, "
            f"got {arguments.lora_rank}"
        )
    if hasattr(encoder.model, "peft_config"):
        raise ValueError(
            f"lora_rank must be 0 for a checkpoint that has adapters, got {arguments.lora_rank}"
        )
    encoder.model = add_lora(
        encoder.model,
        rank=arguments.lora_rank,
        alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
        dropout=arguments.lora_dropout,
    )


def _load_query_encoder(
    arguments: ModelArguments, encoder: TextEncoder, examples: Any
) -> TextEncoder | None:
    name = arguments.query_encoder
    if name == "shared":
        return None
    if name == "bag_of_words":
        texts = [text for e in islice(examples, _IDF_EXAMPLES) for text in _documents_of(e)]
        frozen = arguments.query_weights == "idf"
        return BagOfWordsQueryEncoder.from_texts(
            texts, encoder.tokenizer, encoder.vocab_size, frozen=frozen
        )
    modules = read_json(name, "modules.json", {}) or []
    static = [str(module["type"]).rpartition(".")[2] for module in modules]
    query_encoder: TextEncoder = (
        BagOfWordsQueryEncoder.from_pretrained(name)
        if static == ["SparseStaticEmbedding"]
        else _load_encoder(arguments, name)
    )
    if query_encoder.vocab_size != encoder.vocab_size:
        raise ValueError(
            f"query_encoder must have the vocabulary of {encoder.vocab_size} entries that the "
            f"encoder of documents has, got {query_encoder.vocab_size}"
        )
    return query_encoder


def _load_evaluator(
    data: DataArguments, training: SpladeTrainingArguments
) -> RetrievalEvaluator | None:
    if data.eval_queries is None or data.eval_corpus is None or data.eval_qrels is None:
        return None
    return RetrievalEvaluator.from_files(
        data.eval_queries,
        data.eval_corpus,
        data.eval_qrels,
        max_query_length=training.max_query_length,
        max_document_length=training.max_document_length,
        batch_size=training.per_device_eval_batch_size,
        document_top_k=training.document_top_k,
        query_top_k=training.query_top_k,
        query_prompt=training.query_prompt,
        document_prompt=training.document_prompt,
    )


def _documents_of(example: dict[str, Any]) -> list[str]:
    documents: list[str] = example.get("documents") or [example["document"]]
    return documents


def _load_all_data(data: DataArguments, training: SpladeTrainingArguments) -> tuple[Any, Any]:
    """The examples to train on, and those for the evaluation loss or None."""
    if data.streaming and training.max_steps <= 0:
        raise ValueError("max_steps must be given with streaming, which does not know its length")
    if training.eval_strategy != "no" and data.eval_data is None and data.eval_queries is None:
        raise ValueError(
            f"eval_strategy must be 'no' without eval_data and eval_queries, "
            f"got {str(getattr(training.eval_strategy, 'value', ''))!r}"
        )
    train_data = _load_data(data.train_data, data, data.train_split, data.streaming, training)
    if data.streaming and data.shuffle_buffer:
        train_data = train_data.shuffle(training.seed, buffer_size=data.shuffle_buffer)
    if data.eval_data is None:
        return train_data, None
    return train_data, _load_data(data.eval_data, data, data.eval_split, False, training)


def _load_data(
    sources: list[str],
    data: DataArguments,
    split: str,
    streaming: bool,
    training: SpladeTrainingArguments,
) -> Any:
    columns: Any = data.columns
    if columns is not None and all("=" in column for column in columns):
        columns = dict(column.rsplit("=", 1) for column in columns)
    parts = [
        load_training_data(
            source,
            split=split,
            streaming=streaming,
            columns=columns,
            queries=data.train_queries,
            corpus=data.train_corpus,
            negatives_per_query=training.negatives_per_query,
            config=data.data_config,
        )
        for source in sources
    ]
    kinds = {tuple(sorted(part.column_names)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            "train_data and eval_data must each be of one kind, got files with the columns "
            + " and ".join(", ".join(kind) for kind in sorted(kinds))
        )
    return parts[0] if len(parts) == 1 else import_datasets().concatenate_datasets(parts)


@contextmanager
def _damaged_files_are_bad_input() -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"weights cannot be read or written: {error}") from error
