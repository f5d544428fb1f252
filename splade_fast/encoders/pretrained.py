"""Loading of configurations, models, tokenizers and single files of a checkpoint."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tokenizers import normalizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from splade_fast.encoders.weights import check_all_loaded, readable_weights

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
_INDEX_FILES = ("vectors.safetensors", "meta.json")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_SECONDS = 60  # for which the hub is taken to be as reachable as before
# Given explicitly, since transformers would otherwise ask the user on the terminal.
_TRUST_REMOTE_CODE = False


def lower_case_inputs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lowercase texts before the tokenizer's own normalisation (`do_lower_case` in old folders)."""
    backend = tokenizer.backend_tokenizer
    after = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *after])


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


def refuse_subfolder(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if arguments of `from_pretrained` name a subfolder, which would be ignored.

    The files of the folder tell where its transformer lies.
    """
    if kwargs.get("subfolder"):
        raise ValueError(
            f"subfolder must be left out, got {kwargs['subfolder']!r}; name_or_path may be a "
            "folder inside a model"
        )


def reachable(name_or_path: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Return hub, with local_files_only where a hub name would be looked up without a network.

    huggingface_hub tries five times to find each file, in half a minute.

    Args:
        name_or_path: a folder or a hub name.
        hub: `revision`, `token`, `cache_dir` and other arguments of the hub.
    """
    if Path(name_or_path).exists() or _is_hub_reachable(int(time.monotonic()) // _SECONDS):
        return hub
    return hub | {"local_files_only": True}


@lru_cache(maxsize=1)
def _is_hub_reachable(period: int) -> bool:
    """Return whether the hub has an address, or a proxy looks for it."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def load_config(name_or_path: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """Load the configuration of a checkpoint without running code from the checkpoint.

    Raises:
        OSError: there is no such checkpoint, or its config.json is not JSON.
        ValueError: config.json does not describe a model, or the checkpoint needs its own code.
    """
    check_exists(name_or_path)
    with errors_as_value_errors(f"config.json of {name_or_path} must describe a model"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name_or_path,
            trust_remote_code=_TRUST_REMOTE_CODE,
            **reachable(name_or_path, hub),
        )
    return config


def load_model(
    auto_class: Any,
    name_or_path: str,
    config: PreTrainedConfig,
    kwargs: dict[str, Any],
    loaded_later: Sequence[str] = (),
) -> PreTrainedModel:
    """Load the model of a checkpoint without running code or unpickling objects.

    Args:
        auto_class: class of transformers that chooses the class of the model.
        name_or_path: a folder or a hub name.
        config: the configuration of the checkpoint.
        kwargs: arguments of transformers' `from_pretrained`.
        loaded_later: names of modules whose weights come from another folder.

    Raises:
        ValueError: the checkpoint needs its own code, a pickle holds more than weights, a file is
            damaged, or weights are missing or have other shapes than config.json says.
    """
    kwargs = reachable(name_or_path, kwargs) | {
        "trust_remote_code": _TRUST_REMOTE_CODE,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # for a message that names the weights
    }
    hub = hub_arguments(kwargs) | {"subfolder": kwargs.get("subfolder", "")}
    folder = Path(find_file(name_or_path, "config.json", hub) or name_or_path).parent
    with readable_weights(name_or_path, folder):
        model, info = auto_class.from_pretrained(name_or_path, config=config, **kwargs)
    check_all_loaded(name_or_path, info, loaded_later)
    loaded: PreTrainedModel = model
    return loaded


def load_tokenizer(name_or_path: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint without running code from the checkpoint.

    A tokenizer without a padding token pads with its end-of-sequence token.

    Raises:
        OSError: the checkpoint holds no tokenizer.
        ValueError: the tokenizer's files are damaged, it has neither token, or it needs the
            checkpoint's own code.
    """
    check_exists(name_or_path)
    try:
        with errors_as_value_errors(f"the tokenizer of {name_or_path} cannot be read"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name_or_path,
                trust_remote_code=_TRUST_REMOTE_CODE,
                **reachable(name_or_path, hub),
            )
    except ValueError:
        for file in _TOKENIZER_FILES:
            read_json(name_or_path, file, hub)  # names the damaged file
        _check_has_vocabulary(_VOCABULARY_FILES, name_or_path, hub)
        raise
    if tokenizer.vocab_files_names:  # those of bytes need no files
        _check_has_vocabulary(tokenizer.vocab_files_names.values(), name_or_path, hub)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name_or_path} must have a padding token or an end-of-sequence "
                "token, got neither"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def errors_as_value_errors(message: str) -> Iterator[None]:
    """Raise ValueError for the errors of transformers and tokenizers about the content of a file.

    They raise errors of any class, tokenizers even Exception itself.
    """
    try:
        yield
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{message}: {str(error) or type(error).__name__}") from error


def check_exists(name_or_path: str) -> None:
    """Check that this is a folder or a possible name on the hub.

    Raises:
        OSError: it is neither.
        ValueError: the folder is an index.
    """
    path = Path(name_or_path)
    if not name_or_path:  # Path takes it for the working directory
        raise FileNotFoundError("the model must be a folder or a hub name, got an empty name")
    if path.is_dir():
        refuse_index("the checkpoint", path)
        return
    if path.exists():
        raise NotADirectoryError(f"the model must be a folder or a hub name, got the file {path}")
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no model folder {name_or_path}") from error


def refuse_index(name: str, model: str | os.PathLike[str]) -> None:
    """Raise ValueError if an argument that names a model is the folder of an index.

    Args:
        name: name of the argument.
        model: hub name or folder of the model.
    """
    if all((Path(model) / file).is_file() for file in _INDEX_FILES):
        raise ValueError(f"{name} must be a model, got the index {model}")


def find_file(name_or_path: str, file: str, hub: dict[str, Any]) -> str | None:
    """Return the local path of a checkpoint's file, downloading it if need be; None if missing.

    Raises:
        OSError: there is no such folder.
    """
    check_exists(name_or_path)
    path: str | None = cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_connection_errors=False,
        **reachable(name_or_path, hub),
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


def read_json_object(name_or_path: str, file: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object in a checkpoint's file; an empty one if there is no such file.

    Raises:
        ValueError: the file is not JSON, or holds something other than an object.
    """
    content = read_json(name_or_path, file, hub)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} of {name_or_path} must be a JSON object, got {content!r}")
    return content


def write_json_files(folder: Path, files: dict[str, Any]) -> None:
    """Write the JSON files {path inside the folder: content}."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_has_vocabulary(own: Iterable[str], name_or_path: str, hub: dict[str, Any]) -> None:
    """Raise FileNotFoundError if no file holds a vocabulary.

    transformers makes a tokenizer of special tokens alone where the files are missing.
    """
    files = dict.fromkeys([_VOCABULARY_FILES[0], *own, *_VOCABULARY_FILES])
    if all(find_file(name_or_path, file, hub) is None for file in files):
        raise FileNotFoundError(
            f"{name_or_path} must hold a tokenizer, such as {_VOCABULARY_FILES[0]}, got none"
        )
