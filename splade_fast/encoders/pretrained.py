"""Checkpoint folders: plain transformers ones and sentence-transformers SparseEncoder ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from tokenizers.normalizers import Lowercase, Sequence
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

# SpladePooling names the activation before its own log1p; splade_fast names the whole function.
ACTIVATION_OF_SPLADE_POOLING = {"relu": "log1p_relu", "log1p_relu": "log1p_log1p_relu"}
_SPLADE_POOLING_OF_ACTIVATION = {v: k for k, v in ACTIVATION_OF_SPLADE_POOLING.items()}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_TRUST_REMOTE_CODE = False  # without it transformers asks whoever sits before the terminal
_TRANSFORMER_MODULES = ("Transformer", "MLMTransformer")
_POOLING_FOLDER = "1_SpladePooling"


@dataclass
class EncoderSettings:
    """What a SPLADE model needs to know beside its transformer and its tokenizer."""

    pooling: str = "max"
    activation: str = "log1p_relu"
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    lower_case: bool = False
    subfolder: str = ""

    def prompt_for(self, role: str) -> str | None:
        """The prompt name of "query" or "document", where the model has one."""
        return role if role in self.prompts else self.default_prompt_name


def read_settings(name_or_path: str, hub: dict[str, Any]) -> EncoderSettings:
    """The settings of a SparseEncoder folder; the SPLADE defaults for a plain checkpoint.

    Args:
        name_or_path: a folder or a hub name.
        hub: revision, token, cache_dir and the like, as transformers takes them.

    Raises:
        ValueError: the folder describes something other than a transformer and SpladePooling.
    """
    modules = read_json(name_or_path, "modules.json", hub)
    if modules is None:
        return EncoderSettings()
    kinds = _kinds(modules, name_or_path)
    if len(kinds) != 2 or kinds[0] not in _TRANSFORMER_MODULES or kinds[1] != "SpladePooling":
        raise ValueError(
            f"modules.json of {name_or_path} must list a Transformer and a SpladePooling, "
            f"got {', '.join(kinds)}"
        )
    folder = modules[0]["path"]
    transformer = read_json(name_or_path, _joined(folder, "sentence_bert_config.json"), hub) or {}
    pooling = read_json(name_or_path, _joined(modules[1]["path"], "config.json"), hub) or {}
    model = read_json(name_or_path, "config_sentence_transformers.json", hub) or {}
    activation = pooling.get("activation_function", "relu")
    if activation not in ACTIVATION_OF_SPLADE_POOLING:
        raise ValueError(
            f"activation_function of {name_or_path} must be one of "
            f"{', '.join(ACTIVATION_OF_SPLADE_POOLING)}, got {activation!r}"
        )
    return EncoderSettings(
        pooling=pooling.get("pooling_strategy", "max"),
        activation=ACTIVATION_OF_SPLADE_POOLING[activation],
        max_length=transformer.get("max_seq_length"),
        prompts={name: text or "" for name, text in model.get("prompts", {}).items()},
        default_prompt_name=model.get("default_prompt_name"),
        lower_case=transformer.get("do_lower_case", False),
        subfolder=folder,
    )


def sparse_encoder_files(settings: EncoderSettings) -> dict[str, Any]:
    """The JSON files that make a transformers folder a SparseEncoder folder as well.

    Raises:
        ValueError: SpladePooling has no such activation.
    """
    if settings.activation not in _SPLADE_POOLING_OF_ACTIVATION:
        raise ValueError(
            f"activation must be one of {', '.join(_SPLADE_POOLING_OF_ACTIVATION)} to be saved "
            f"for sentence-transformers, got {settings.activation!r}"
        )
    # MLMTransformer: the one name that every sentence-transformers with a SparseEncoder loads.
    package = "sentence_transformers.sparse_encoder.models"
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{package}.MLMTransformer"},
            {"idx": 1, "name": "1", "path": _POOLING_FOLDER, "type": f"{package}.SpladePooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": settings.max_length},
        "config_sentence_transformers.json": _model_file(settings),
        f"{_POOLING_FOLDER}/config.json": {
            "pooling_strategy": settings.pooling,
            "activation_function": _SPLADE_POOLING_OF_ACTIVATION[settings.activation],
        },
    }


def static_embedding_settings(
    name_or_path: str, hub: dict[str, Any], subfolder: str = ""
) -> EncoderSettings:
    """The settings of a SparseEncoder folder whose one module is a SparseStaticEmbedding.

    Args:
        name_or_path: a folder or a hub name.
        hub: as in read_settings.
        subfolder: of the module, where it is one of several.

    Raises:
        ValueError: the folder describes something other than a SparseStaticEmbedding.
    """
    modules = read_json(name_or_path, "modules.json", hub) or []
    kinds = _kinds(modules, name_or_path)
    if not subfolder and kinds != ["SparseStaticEmbedding"]:
        raise ValueError(
            f"modules.json of {name_or_path} must list a SparseStaticEmbedding alone, "
            f"got {', '.join(kinds) or 'nothing'}; name its subfolder if it is one of several"
        )
    model = read_json(name_or_path, "config_sentence_transformers.json", hub) or {}
    return EncoderSettings(
        prompts={name: text or "" for name, text in model.get("prompts", {}).items()},
        default_prompt_name=model.get("default_prompt_name"),
        subfolder=subfolder or modules[0]["path"],
    )


def static_embedding_files(settings: EncoderSettings, frozen: bool) -> dict[str, Any]:
    """The JSON files of a SparseEncoder folder whose one module is a SparseStaticEmbedding."""
    kind = "sentence_transformers.sparse_encoder.models.SparseStaticEmbedding"
    return {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": kind}],
        "config_sentence_transformers.json": _model_file(settings),
        "config.json": {"frozen": frozen},
    }


def _kinds(modules: Any, name_or_path: str) -> list[str]:
    """The class names of the modules that modules.json lists."""
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and {"type", "path"} <= module.keys() for module in modules
    ):
        raise ValueError(
            f"modules.json of {name_or_path} must list modules with a type and a path, "
            f"got {modules!r}"
        )
    return [str(module["type"]).rpartition(".")[2] for module in modules]


def _model_file(settings: EncoderSettings) -> dict[str, Any]:
    return {
        "model_type": "SparseEncoder",
        "prompts": settings.prompts,
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": "dot",
    }


def lower_case_inputs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lowercase before everything else the tokenizer does (do_lower_case of older folders)."""
    backend = tokenizer.backend_tokenizer
    normalizer = backend.normalizer
    backend.normalizer = Sequence([Lowercase(), *([normalizer] if normalizer is not None else [])])


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a from_pretrained that say where files come from.

    Raises:
        ValueError: code or pickles of the checkpoint would be executed.
    """
    if kwargs.get("trust_remote_code"):
        raise ValueError("trust_remote_code must be False, got True: remote code never runs")
    if not kwargs.get("weights_only", True):
        raise ValueError("weights_only must be True, got False: pickles are never executed")
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}


def load_config(name_or_path: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """The checkpoint's configuration, without running code of its own.

    Raises:
        ValueError: it needs such code.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        name_or_path, trust_remote_code=_TRUST_REMOTE_CODE, **hub
    )
    return config


def load_model(
    auto_class: Any, name_or_path: str, config: PreTrainedConfig, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The checkpoint's model, without running code of its own or what a pickle says.

    Raises:
        ValueError: it needs such code, or a pickle holds more than weights.
    """
    kwargs = kwargs | {"trust_remote_code": _TRUST_REMOTE_CODE}
    with weights_only(name_or_path):
        model: PreTrainedModel = auto_class.from_pretrained(name_or_path, config=config, **kwargs)
    return model


@contextmanager
def weights_only(name_or_path: str) -> Iterator[None]:
    """A block that reads pickles by rules which refuse everything but tensors.

    Raises:
        ValueError: instead of torch's error, which says how to switch the rules off.
    """
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{name_or_path} must hold weights alone, got a pickle that is damaged or runs code"
        ) from error


def load_tokenizer(name_or_path: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, able to pad, without running code of its own.

    Raises:
        ValueError: it needs such code.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name_or_path, trust_remote_code=_TRUST_REMOTE_CODE, **hub
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapted_checkpoint(name_or_path: str, hub: dict[str, Any]) -> str | None:
    """The checkpoint whose adapters (PEFT) a folder holds; None where it holds a whole model."""
    if find_file(name_or_path, "config.json", hub) is not None:
        return None
    adapters = read_json(name_or_path, "adapter_config.json", hub)
    return None if adapters is None else adapters["base_model_name_or_path"]


def find_file(name_or_path: str, file: str, hub: dict[str, Any]) -> str | None:
    """The path of one file of a checkpoint, fetched if need be; None where it has no such file."""
    path: str | None = cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return path


def read_json(name_or_path: str, file: str, hub: dict[str, Any]) -> Any:
    """The content of one JSON file of a checkpoint; None where it has no such file.

    Raises:
        ValueError: the file is not JSON.
    """
    path = find_file(name_or_path, file, hub)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} of {name_or_path} must be JSON: {error}") from error


def write_json_files(folder: Path, files: dict[str, Any]) -> None:
    """Write {path inside the folder: content}."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _joined(folder: str, file: str) -> str:
    return os.path.join(folder, file) if folder else file
