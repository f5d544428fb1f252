"""`splade-fast train`: train an encoder as a configuration says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import set_seed

from splade_fast._distributed import OtherRankError, fail_together
from splade_fast.encoders.adapters import add_lora
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.modules_list import is_static_embedding, read_modules
from splade_fast.encoders.query_encoder import load_query_encoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.search.retrieval_data import read_all_retrieval_data
from splade_fast.training.arguments import (
    DataArguments,
    ModelArguments,
    SpladeTrainingArguments,
)
from splade_fast.training.checkpoints.folders import (
    delete_checkpoints,
    find_last_checkpoint,
    remove_leftovers,
)
from splade_fast.training.configuration import Configuration, format_help, parse_configuration
from splade_fast.training.data.load import import_datasets, load_training_data
from splade_fast.training.evaluator import MeanEvaluator, RetrievalEvaluator
from splade_fast.training.trainer import SpladeTrainer

_LOADERS: dict[str, Callable[..., TextEncoder]] = {
    "splade": SpladeEncoder.from_pretrained,
    "term_weights": TermWeightEncoder.from_pretrained,
}
_SPLADE_OPTIONS = ("attention", "pooling", "logit_scale", "train_logit_scale", "echo")
_IDF_EXAMPLES = 100_000  # more examples would hardly change the document frequencies


def train(arguments: Sequence[str]) -> str | None:
    """Train as flags and the file of --config say.

    Args:
        arguments: the flags.

    Returns:
        The message for the user: the place of the model, or the help that a flag asks for. None in
        all processes but the first.

    Raises:
        ConfigError: a flag or key is unknown, or has a value that it cannot have.
        OSError, ValueError, ImportError: bad input, a full disk, or a missing package.
        SystemExit: bad input, in the processes that do not raise its error.
    """
    for flag in ("--help", "--help-all"):
        if flag in arguments:
            return format_help(should_list_all=flag == "--help-all")
    configuration = parse_configuration(arguments)
    with _safetensors_errors_as_os_errors():
        steps = _train(configuration)
    # Only now that no DistributedDataParallel is left: it holds the group and would wait for the
    # group's threads without releasing the GIL, for which such a thread may wait in turn.
    if dist.is_initialized():
        gc.collect()  # modules of FSDP2 hold the group too, and each other
        dist.destroy_process_group()
    if configuration.training.process_index != 0:
        return None
    return f"{configuration.output_dir}: trained for {steps} steps"


def _train(configuration: Configuration) -> int:
    """Train, evaluate and save; return the number of optimizer steps."""
    training = configuration.training
    try:
        trainer = make_trainer(configuration)
    except OtherRankError as error:
        raise SystemExit(2) from error  # the other process prints its error
    trainer.train(resume_from_checkpoint=_find_checkpoint_to_resume(configuration))
    if training.eval_strategy == "no" and trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()
    if training.should_save:
        trainer.state.save_to_json(str(configuration.output_dir / "trainer_state.json"))
    return trainer.state.global_step


def make_trainer(configuration: Configuration) -> SpladeTrainer:
    """Load models and data, and make their trainer.

    Raises:
        FileExistsError: the output directory is not empty.
        OSError, ValueError, ImportError: a model or data cannot be used, or a package is missing.
        OtherRankError: another process raises one of these errors, the first that has one.
    """
    model, data, training = configuration.model, configuration.data, configuration.training
    with fail_together("preparing output_dir", raise_once=True):
        # The other processes would see what the first one writes.
        if training.process_index == 0:
            _prepare_output_dir(configuration)
    set_seed(training.seed)  # of new weights, such as those of adapters
    with fail_together("loading the encoder", raise_once=True):
        encoder = _load_encoder(model, _LOADERS[model.architecture], model.model_name_or_path)
    train_data = eval_data = None
    for is_converting in (True, False):
        # One process of each machine converts the data; then the others read the result.
        with fail_together("loading the data", raise_once=True):
            if (training.local_process_index == 0) == is_converting:
                train_data, eval_data = _load_all_data(data, training)
    with fail_together("making the trainer", raise_once=True):
        return SpladeTrainer(
            encoder,
            training,
            train_dataset=train_data,
            eval_dataset=eval_data,
            query_encoder=_load_query_encoder(model, encoder, train_data),
            evaluator=_load_evaluator(data, training),
        )


def _prepare_output_dir(configuration: Configuration) -> None:
    run, folder = configuration.run, configuration.output_dir
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


def _find_checkpoint_to_resume(configuration: Configuration) -> str | None:
    if configuration.training.resume_from_checkpoint:
        return str(configuration.training.resume_from_checkpoint)
    if not configuration.run.resume:
        return None
    last = find_last_checkpoint(configuration.output_dir)
    return None if last is None else str(last)


def _load_encoder(
    arguments: ModelArguments, load: Callable[..., TextEncoder], name: str
) -> TextEncoder:
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    for option in _SPLADE_OPTIONS:
        value = getattr(arguments, option)
        if value is not None and value is not False:
            options[option] = value
    encoder = load(name, **options)
    if arguments.prompts:
        added = dict(prompt.split("=", 1) for prompt in arguments.prompts)
        encoder.settings = replace(encoder.settings, prompts=encoder.settings.prompts | added)
    if arguments.lora_rank and not isinstance(encoder, BagOfWordsQueryEncoder):
        _add_adapters(encoder, arguments)
    return encoder


def _add_adapters(encoder: TextEncoder, arguments: ModelArguments) -> None:
    if not isinstance(encoder, SpladeEncoder):
        raise ValueError(
            f"lora_rank must be 0 for a {type(encoder).__name__}, got {arguments.lora_rank}"
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
        sources = examples.values() if isinstance(examples, dict) else [examples]
        each = _IDF_EXAMPLES // len(sources)
        texts = [
            text for source in sources for e in islice(source, each) for text in _list_documents(e)
        ]
        is_frozen = arguments.query_weights == "idf"
        return BagOfWordsQueryEncoder.from_texts(
            texts, encoder.tokenizer, encoder.vocab_size, frozen=is_frozen
        )
    if arguments.architecture == "splade" or is_static_embedding(read_modules(name, {}, "query")):
        query_encoder = _load_encoder(arguments, load_query_encoder, name)
    else:
        query_encoder = _load_encoder(arguments, TermWeightEncoder.from_pretrained, name)
    if query_encoder.vocab_size != encoder.vocab_size:
        raise ValueError(
            f"query_encoder must have the vocab_size of the encoder of documents, "
            f"{encoder.vocab_size}, got {query_encoder.vocab_size}"
        )
    return query_encoder


def _list_documents(example: dict[str, Any]) -> list[str]:
    documents: list[str] = example.get("documents") or [example["document"]]
    return documents


def _load_evaluator(
    data: DataArguments, training: SpladeTrainingArguments
) -> RetrievalEvaluator | MeanEvaluator | None:
    options: dict[str, Any] = {
        "max_query_length": training.max_query_length,
        "max_document_length": training.max_document_length,
        "batch_size": training.per_device_eval_batch_size,
        "document_top_k": training.document_top_k,
        "query_top_k": training.query_top_k,
        "query_prompt": training.query_prompt,
        "document_prompt": training.document_prompt,
        "ignore_identical_ids": data.eval_ignore_identical_ids,
        "measures": data.eval_measures,
    }
    if data.eval_sets is not None:
        sets = read_all_retrieval_data(data.eval_sets)
        evaluators = {
            name: RetrievalEvaluator.from_data(found, **options) for name, found in sets.items()
        }
        return MeanEvaluator(evaluators) if len(sets) > 1 else next(iter(evaluators.values()))
    if data.eval_queries is None or data.eval_corpus is None or data.eval_qrels is None:
        return None
    return RetrievalEvaluator.from_files(
        data.eval_queries, data.eval_corpus, data.eval_qrels, **options
    )


def _load_all_data(data: DataArguments, training: SpladeTrainingArguments) -> tuple[Any, Any]:
    """Return the examples of the training, and those of the evaluation loss or None."""
    if data.streaming and training.max_steps <= 0:
        raise ValueError(
            "max_steps must be given with streaming, because the length of a stream is unknown"
        )
    sources = (data.eval_data, data.eval_queries, data.eval_sets)
    if training.eval_strategy != "no" and all(source is None for source in sources):
        raise ValueError(
            f"eval_strategy must be 'no' without eval_data, eval_queries and eval_sets, "
            f"got {str(getattr(training.eval_strategy, 'value', ''))!r}"
        )
    train_data = _load_train_data(data, training)
    if data.eval_data is None:
        return train_data, None
    eval_parts = _load_parts(data.eval_data, data, data.eval_split, False, training)
    return train_data, _concatenate(eval_parts)


def _load_train_data(data: DataArguments, training: SpladeTrainingArguments) -> Any:
    """Return the examples of one source, or of all, {name: examples} if their shares matter."""
    parts = _load_parts(data.train_data, data, data.train_split, data.streaming, training)
    has_shares = training.batch_sources == "separate" or training.source_weights is not None
    if not has_shares:
        joined = _concatenate(parts)
        return _shuffle_stream(joined, data, training)
    if training.batch_sources == "mixed":
        _check_columns(parts)
    names = [f"{source} ({number})" for number, source in enumerate(data.train_data)]
    shuffled = [_shuffle_stream(part, data, training) for part in parts]
    return dict(zip(names, shuffled, strict=True))


def _shuffle_stream(examples: Any, data: DataArguments, training: SpladeTrainingArguments) -> Any:
    if not (data.streaming and data.shuffle_buffer):
        return examples
    return examples.shuffle(training.seed, buffer_size=data.shuffle_buffer)


def _load_parts(
    sources: list[str],
    data: DataArguments,
    split: str,
    streaming: bool,
    training: SpladeTrainingArguments,
) -> list[Any]:
    """Return the examples of each source."""
    columns: Any = data.columns
    if columns is not None and all("=" in column for column in columns):
        columns = dict(column.rsplit("=", 1) for column in columns)
    return [
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


def _concatenate(parts: list[Any]) -> Any:
    _check_columns(parts)
    return parts[0] if len(parts) == 1 else import_datasets().concatenate_datasets(parts)


def _check_columns(parts: list[Any]) -> None:
    """Raise ValueError if sources are of different kinds, which a batch cannot join."""
    columns_of_parts = {tuple(sorted(part.column_names)) for part in parts}
    if len(columns_of_parts) > 1:
        raise ValueError(
            "train_data and eval_data must each be of one kind, got files with the columns "
            + " and ".join(", ".join(names) for names in sorted(columns_of_parts))
        )


@contextmanager
def _safetensors_errors_as_os_errors() -> Iterator[None]:
    """Raise OSError, which the command line reports as bad input, for damaged weights."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"weights cannot be read or written: {error}") from error
