"""Loading of configurations, models, tokenizers and single files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# Given explicitly, since transformers would otherwise ask the user on the terminal.
_TRUST_REMOTE_CODE = False


def lower_case_inputs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lowercase texts before the tokenizer's own normalisation (`do_lower_case` in old folders)."""
    backend = tokenizer.backend_tokenizer
    normalizer = backend.normalizer
    backend.normalizer = Sequence([Lowercase(), *([normalizer] if normalizer is not None else [])])


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where files come from.

    Raises:
        ValueError: an argument would let code or pickles of the checkpoint run.
    """
    if kwargs.get("trust_remote_code"):
        raise ValueError("trust_remote_code must be False, got True: remote code never runs")
    if not kwargs.get("weights_only", True):
        raise ValueError("weights_only must be True, got False: pickles are never executed")
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}


def load_config(name_or_path: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """Load the configuration of a checkpoint without running code from the checkpoint.

    Raises:
        ValueError: the checkpoint needs its own code.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        name_or_path, trust_remote_code=_TRUST_REMOTE_CODE, **hub
    )
    return config


def load_model(
    auto_class: Any, name_or_path: str, config: PreTrainedConfig, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load the model of a checkpoint without running code or unpickling objects.

    Raises:
        ValueError: the checkpoint needs its own code, or a pickle holds more than weights.
    """
    kwargs = kwargs | {"trust_remote_code": _TRUST_REMOTE_CODE}
    with refuse_pickled_objects(name_or_path):
        model: PreTrainedModel = auto_class.from_pretrained(name_or_path, config=config, **kwargs)
    return model


@contextmanager
def refuse_pickled_objects(name_or_path: str) -> Iterator[None]:
    """Raise ValueError if the block reads a pickle that holds more than tensors.

    The error replaces torch's, whose message explains how to switch the check off.
    """
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{name_or_path} must hold weights alone, got a pickle that is damaged or runs code"
        ) from error


def load_tokenizer(name_or_path: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint without running code from the checkpoint.

    A tokenizer without a padding token pads with its end-of-sequence token.

    Raises:
        ValueError: the tokenizer needs the checkpoint's own code.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name_or_path, trust_remote_code=_TRUST_REMOTE_CODE, **hub
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_file(name_or_path: str, file: str, hub: dict[str, Any]) -> str | None:
    """Return the local path of a checkpoint's file, downloading it if need be; None if missing."""
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
    """Return the content of a checkpoint's JSON file; None if there is no such file.

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
    """Write the JSON files {path inside the folder: content}."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
