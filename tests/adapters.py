"""LoRA adapters, added in each way that the installed packages offer."""

from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

from splade_fast.encoders.splade import SpladeEncoder

# transformers' add_adapter raises an error where peft is older than transformers asks for.
IS_PEFT_REFUSED = Version(version("peft")) < Version(MIN_PEFT_VERSION)
WAYS = ["get_peft_model"] if IS_PEFT_REFUSED else ["get_peft_model", "add_adapter"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": "all-linear"} | options))


def with_adapters(encoder: SpladeEncoder, way: str, **options: Any) -> SpladeEncoder:
    """Return an encoder of the same model, in which the adapters are."""
    if way == "add_adapter":
        encoder.model.add_adapter(lora(**options))
        return encoder
    model: Any = get_peft_model(encoder.model, lora(**options))
    return SpladeEncoder(model, encoder.tokenizer, encoder.settings)
