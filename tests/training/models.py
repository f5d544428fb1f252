"""Training models of tiny encoders, and the same computation in plain PyTorch."""

import copy

import torch
from torch import Tensor

from splade_fast import reference
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.training import ObjectiveArguments, TrainingModel
from tests.tiny_models import (
    WORDS,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
)

FAMILIES = {**masked_lm_configs(), **causal_lm_configs()}


def encoder_of(
    family: str = "bert", *, dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> SpladeEncoder:
    """Return an encoder in training mode, in float64 unless a test is about rounding."""
    config = copy.deepcopy(FAMILIES[family])
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, dropout)
    return SpladeEncoder(make_model(config).to(dtype), make_tokenizer()).train()


def training_model(family: str = "bert", *, seed: int = 0, **arguments) -> TrainingModel:
    return TrainingModel(encoder_of(family), ObjectiveArguments(**arguments), seed=seed)


def texts(count: int, seed: int, most: int = 9) -> list[str]:
    """Return different texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def number(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    return [
        " ".join(WORDS[number(len(WORDS))] for _ in range(2 + number(most))) for _ in range(count)
    ]


def batch_of(encoder: SpladeEncoder, batch: int, seed: int, documents: int = 1) -> dict:
    """Return queries and documents as the collator does."""
    return {
        "queries": encoder.tokenize(texts(batch, seed, most=3)),
        "documents": encoder.tokenize(texts(batch * documents, seed + 1000)),
    }


def plain_vectors(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return vectors from the model's own logits."""
    return reference.splade_pool(model(**inputs).logits, inputs["attention_mask"])


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
