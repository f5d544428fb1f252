"""Runs of a trainer whose model FSDP2 shards over two processes, and their twins in one process."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.encoders.text_encoder import TextEncoder
from tests.adapters import with_adapters
from tests.tiny_models import (
    WORDS,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
)
from tests.training.runs import make_trainer

STEPS = 2
# SGD keeps a rounding error a rounding error; see test_torchrun.
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "optim": "sgd",
    "learning_rate": 0.01,
    "train_sampling_strategy": "sequential",
    "regularizer_steps": 1,
    "document_regularizer": "flops+df_flops",
    "query_regularizer": "l1+anti_zero",
    "temperature": 2.0,
    "save_strategy": "no",
}
_EXAMPLES = 32


def encoder_of(kind: str) -> TextEncoder:
    """Return a new encoder without dropout: tied, untied, causal, lora or term_weights.

    The untied one trains the scale of its logits.
    """
    config = (causal_lm_configs() | masked_lm_configs())["qwen2" if kind == "causal" else "bert"]
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, 0.0)
    config.tie_word_embeddings = kind != "untied"
    model = make_model(config)
    if kind == "term_weights":
        return TermWeightEncoder(model.bert, make_tokenizer())
    is_scaled = kind == "untied"
    settings = EncoderSettings(logit_scale=0.5 if is_scaled else 1.0, train_logit_scale=is_scaled)
    encoder = SpladeEncoder(model, make_tokenizer(), settings)
    return with_adapters(encoder, "get_peft_model") if kind == "lora" else encoder


def examples_for(loss: str) -> Any:
    """Return examples of the kind that a loss takes."""
    draw = random.Random(loss)
    rows: list[dict[str, Any]] = []
    for _ in range(_EXAMPLES):
        documents = [" ".join(draw.sample(WORDS, 6)) for _ in range(3)]
        row: dict[str, Any] = {"query": " ".join(draw.sample(documents[0].split(), 2))}
        if loss in ("kl", "margin_mse"):
            row |= {"documents": documents, "scores": [draw.random() for _ in documents]}
        else:
            row["document"] = documents[0]
        if loss == "pointwise":
            row["label"] = draw.random()
        if loss in ("pairwise", "in_batch"):
            row["negatives"] = documents[1:2]
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def train(
    kind: str,
    output: Path,
    *,
    factor: float = 1,
    resume_from_checkpoint: Path | None = None,
    **options: Any,
) -> Any:
    """Train, save the model and the log, and return the trainer.

    Args:
        kind: kind of the encoder.
        output: output directory.
        factor: factor of the first weights.
        resume_from_checkpoint: checkpoint to go on from.
        options: arguments of `make_trainer`.
    """
    encoder = encoder_of(kind)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(factor)
    data = examples_for(options.get("loss", "in_batch"))
    trainer = make_trainer(Path(), data, output, model=encoder, **(OPTIONS | options))
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.save_model()
    if trainer.args.should_save:
        trainer.state.save_to_json(str(output / "trainer_state.json"))
    return trainer


def assert_same_training(actual: Path, expected: Path, *, steps: int = STEPS) -> None:
    """Assert that two runs have the same log and weights but for rounding."""
    logs = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (actual, expected)
    ]
    for name in ("loss", "grad_norm", "relevance_loss", "document_regularizer"):
        mine, theirs = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(mine) == steps
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), (actual.name, name)
    files = sorted(path.name for path in expected.glob("*.safetensors"))
    assert files
    for file in files:
        mine, theirs = load_file(actual / file), load_file(expected / file)
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            torch.testing.assert_close(
                weight, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
