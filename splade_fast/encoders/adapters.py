"""PEFT adapters: small weights that are trained inside the layers of a frozen model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import peft as integration
from transformers.utils.peft_utils import check_peft_version

from splade_fast.encoders.pretrained import (
    check_exists,
    errors_as_value_errors,
    find_file,
    load_config,
    reachable,
    read_json,
    write_json_files,
)
from splade_fast.encoders.weights import readable_weights

_CONFIG_FILE = "adapter_config.json"
_NO_FOLDER = "no-adapters"
_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def add_lora(model: PreTrainedModel, *, rank: int, alpha: float, dropout: float) -> Any:
    """Wrap a model by PEFT, with new LoRA adapters in all its linear layers but the decoder.

    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).

    Args:
        model: the model, whose own weights are frozen.
        rank: the rank of the adapters.
        alpha: the scale of the adapters times the rank.
        dropout: the dropout before the adapters.

    Raises:
        ImportError: peft is missing, or does not work with the installed transformers.
    """
    peft = _import_peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


@dataclass
class BaseModel:
    """Checkpoint that holds a model's own weights.

    Args:
        source: folder or hub name that led to the checkpoint, such as that of adapters.
        name_or_path: a folder or a hub name.
        hub: where its files come from: subfolder, revision, token, cache_dir and the like.
        has_adapters: whether the adapters of `source` belong into the model.
        loaded_later: names of modules whose weights come with the adapters.
    """

    source: str
    name_or_path: str
    hub: dict[str, Any]
    has_adapters: bool = False
    loaded_later: Sequence[str] = ()

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration of the checkpoint.

        Raises:
            OSError, ValueError: see `load_config`; the message names the folder of the adapters.
        """
        try:
            return load_config(self.name_or_path, self.hub)
        except OSError as error:
            if self.name_or_path == self.source:
                raise
            raise OSError(
                f"{_CONFIG_FILE} of {self.source} must name the checkpoint of the model in "
                f"base_model_name_or_path, but {self.name_or_path} is neither a folder nor found "
                "on the hub"
            ) from error

    def load_arguments(self) -> dict[str, Any]:
        """Return the arguments by which transformers loads the model without any adapters."""
        if self.has_adapters and self.name_or_path == self.source:
            # transformers would load the adapters too, and report which of them are missing in
            # place of the model's own weights.
            return self.hub | {"adapter_kwargs": {"subfolder": _NO_FOLDER}}
        return self.hub


def find_base_model(name_or_path: str, hub: dict[str, Any]) -> BaseModel:
    """Return the checkpoint that holds the model's own weights.

    A folder of adapters alone names another checkpoint; other folders hold these weights.
    The name of a folder is relative to the working directory or to the folder of adapters.

    Args:
        name_or_path: a folder or a hub name.
        hub: subfolder, revision, token, cache_dir and the like, as transformers takes them.

    Raises:
        OSError: the folder of the checkpoint does not exist.
        ValueError: the folder of adapters names no checkpoint.
    """
    adapters = read_json(name_or_path, _CONFIG_FILE, hub)
    if adapters is None:
        return BaseModel(name_or_path, name_or_path, hub)
    options = adapters if isinstance(adapters, dict) else {}
    modules_to_save = options.get("modules_to_save") or ()
    if Path(name_or_path, hub["subfolder"], "config.json").exists():
        return BaseModel(name_or_path, name_or_path, hub, True, modules_to_save)
    base = options.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(
            f"{_CONFIG_FILE} of {name_or_path} must name the checkpoint of the model in "
            f"base_model_name_or_path, got {base!r}"
        )
    beside = Path(name_or_path, hub["subfolder"], base)
    if not Path(base).is_dir() and beside.is_dir():
        base = str(beside)
    try:
        check_exists(base)
    except OSError as error:
        raise FileNotFoundError(
            f"{_CONFIG_FILE} of {name_or_path} must name the checkpoint of the model in "
            f"base_model_name_or_path, but {error}"
        ) from error
    base_hub = hub | {"revision": options.get("revision") or "main", "subfolder": ""}
    return BaseModel(name_or_path, base, base_hub, True, modules_to_save)


def load_adapters(model: PreTrainedModel, name_or_path: str, hub: dict[str, Any]) -> Any:
    """Wrap a model by PEFT, with the adapters of a folder in it.

    Args:
        model: the model that the adapters were trained in.
        name_or_path: a folder or a hub name.
        hub: revision, token, cache_dir and the like, as transformers takes them.

    Raises:
        ImportError: peft is missing, or does not work with the installed transformers.
        OSError: the folder holds no weights.
        ValueError: the folder holds virtual tokens, a file is damaged, a pickle holds more than
            weights, or the weights do not fit the model.
    """
    peft = _import_peft()
    hub = reachable(name_or_path, hub)
    with errors_as_value_errors(f"{_CONFIG_FILE} of {name_or_path} must describe adapters"):
        config = peft.PeftConfig.from_pretrained(name_or_path, **hub)
    config.base_model_name_or_path = model.name_or_path  # where it was found
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_type of {name_or_path} must be one of adapters in layers, such as LORA, "
            f"got {config.peft_type}"
        )
    files = [path for file in _WEIGHTS_FILES if (path := find_file(name_or_path, file, hub))]
    if not files:
        raise FileNotFoundError(f"{name_or_path} must hold {' or '.join(_WEIGHTS_FILES)}, got none")
    try:
        with readable_weights(name_or_path, Path(files[0]).parent), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
            return peft.PeftModel.from_pretrained(
                model, name_or_path, config=config, autocast_adapter_dtype=False, **hub
            )
    except (RuntimeError, UserWarning) as error:
        raise ValueError(f"the adapters of {name_or_path} must fit the model: {error}") from error


def make_base_absolute(folder: Path) -> None:
    """Replace the relative path of the base model in a folder of adapters by its absolute path."""
    file = folder / _CONFIG_FILE
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if base and Path(base).is_dir():
        path = str(Path(base).absolute())
        write_json_files(folder, {_CONFIG_FILE: config | {"base_model_name_or_path": path}})


def check_saves_adapters(model: PreTrainedModel) -> None:
    """Raise ImportError if transformers added the model's adapters and refuses to save them.

    transformers asks for a version of peft where it saves adapters, not where it loads them.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    oldest = integration.MIN_PEFT_VERSION
    try:
        check_peft_version(min_version=oldest)
    except ValueError as error:
        raise ImportError(_refusal(f"transformers asks for peft >= {oldest}")) from error


def _import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "peft":
            raise ImportError("adapters need the package peft: pip install peft") from error
        raise ImportError(_refusal(error)) from error
    return peft


def _refusal(reason: object) -> str:
    return (
        f"peft {version('peft')} and transformers {version('transformers')} do not work together "
        f"({reason}); upgrade peft, or install an older transformers"
    )
