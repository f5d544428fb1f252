"""PEFT adapters: small weights that are trained inside the layers of a frozen model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import peft as integration
from transformers.utils.peft_utils import check_peft_version

from splade_fast.encoders.pretrained import read_json, refuse_pickled_objects


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


def find_base_model(name_or_path: str, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the checkpoint that holds the model's own weights, and where its files come from.

    A folder of adapters names another checkpoint; every other folder holds these weights itself.

    Args:
        name_or_path: a folder or a hub name.
        hub: subfolder, revision, token, cache_dir and the like, as transformers takes them.

    Raises:
        ValueError: the folder of adapters names no checkpoint.
    """
    adapters = read_json(name_or_path, "adapter_config.json", hub)
    # transformers itself loads a folder that holds both the model and its adapters.
    if adapters is None or Path(name_or_path, hub["subfolder"], "config.json").exists():
        return name_or_path, hub
    base = adapters.get("base_model_name_or_path") if isinstance(adapters, dict) else None
    if not isinstance(base, str):
        raise ValueError(
            f"adapter_config.json of {name_or_path} must name the checkpoint of the model in "
            f"base_model_name_or_path, got {base!r}"
        )
    return base, hub | {"revision": adapters.get("revision") or "main", "subfolder": ""}


def load_adapters(model: PreTrainedModel, name_or_path: str, hub: dict[str, Any]) -> Any:
    """Wrap a model by PEFT, with the adapters of a folder in it.

    Args:
        model: the model that the adapters were trained in.
        name_or_path: a folder or a hub name.
        hub: revision, token, cache_dir and the like, as transformers takes them.

    Raises:
        ImportError: peft is missing, or does not work with the installed transformers.
        ValueError: the folder holds virtual tokens, or a pickle holds more than weights.
    """
    peft = _import_peft()
    config = peft.PeftConfig.from_pretrained(name_or_path, **hub)
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_type of {name_or_path} must be one of adapters in layers, such as LORA, "
            f"got {config.peft_type}"
        )
    with refuse_pickled_objects(name_or_path):
        return peft.PeftModel.from_pretrained(
            model, name_or_path, config=config, autocast_adapter_dtype=False, **hub
        )


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
