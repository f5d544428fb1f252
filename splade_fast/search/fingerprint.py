"""Fingerprint of an encoder: short texts that change with whatever its vectors depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splade_fast.encoders.text_encoder import TextEncoder, token_tensors

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMBERS_PER_SUM = 1024
_NUMBERS_AT_A_TIME = 2**24  # bounds the memory that a change of the dtype needs
# Texts whose tokens show the normalisation, the splitting and the special tokens of a tokenizer.
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "Überraschung!  Naïve café, e\u0301tude; don't",
    "state-of-the-art HTTP/2, C++17, 3.14e-2 @ 50%",
    "検索エンジン поиск البحث 🔍",
    "supercalifragilisticexpialidocious\tunbelievably\ntokenization",
)


@dataclass(frozen=True)
class Fingerprint:
    """Digests of an encoder, equal for equal encoders on every machine.

    Args:
        dtype: dtype that the weights were in, such as "float32".
        weights: digest of the parameters.
        vocabulary: digest of the tokenizer's tokens and their numbers.
        settings: digest of the pooling, the activation, the prompt, the length limit, the tokens
            of a few texts, and options that are not the default.
    """

    dtype: str
    weights: str
    vocabulary: str
    settings: str

    @classmethod
    def of(
        cls, encoder: TextEncoder, role: str, max_length: int, dtype: str | None = None
    ) -> Fingerprint:
        """Compute the fingerprint of an encoder for texts of a role.

        Every number of the weights is read twice, in about the time of two copies.

        Args:
            encoder: the encoder, on any device.
            role: "query" or "document", which chooses the prompt.
            max_length: number of tokens kept of each text.
            dtype: dtype to which the weights are rounded before; by default the encoder's own. A
                fingerprint of other weights can only be compared in its own dtype.
        """
        number_type = encoder.dtype if dtype is None else getattr(torch, dtype)
        return cls(
            str(number_type).removeprefix("torch."),
            _digest_weights(encoder, number_type),
            digest_vocabulary(encoder.tokenizer),
            _digest_settings(encoder, role, max_length),
        )

    @classmethod
    def parse(cls, content: Any) -> Fingerprint:
        """Return the fingerprint whose `dataclasses.asdict` is given.

        Raises:
            ValueError: the content is something else.
        """
        names = [field.name for field in fields(cls)]
        if (
            not isinstance(content, dict)
            or sorted(content) != sorted(names)
            or not all(isinstance(value, str) for value in content.values())
            or not isinstance(getattr(torch, content["dtype"], None), torch.dtype)
        ):
            raise ValueError(f"a fingerprint must hold texts for {', '.join(names)}")
        return cls(**content)

    def differences(self, other: Fingerprint) -> list[str]:
        """Return the names of the digests that differ: weights, vocabulary, settings."""
        return [
            name
            for name in ("weights", "vocabulary", "settings")
            if getattr(self, name) != getattr(other, name)
        ]


def digest_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the tokens of a tokenizer and their numbers."""
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


@torch.no_grad()
def _digest_weights(encoder: TextEncoder, dtype: torch.dtype) -> str:
    # Sorted, since the names and the order of parameters differ between versions of transformers.
    # The encoders use no pooling layer; one that a checkpoint lacks is random at each loading.
    digests = sorted(
        _digest_tensor(tensor, dtype)
        for name, tensor in encoder.named_parameters()
        if "pooler" not in name.split(".")
    )
    return _digest("".join(digests).encode())


def _digest_tensor(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return a digest of the shape and of sums of the numbers' bits, which no rounding affects.

    The numbers are summed along both sides of a matrix, since one sum stays where two are swapped.
    """
    sums = []
    for part in tensor.detach().reshape(-1).split(_NUMBERS_AT_A_TIME):
        numbers = (part.to(dtype) if part.is_floating_point() else part).contiguous()
        bits = numbers.view(_INTEGERS[numbers.element_size()])
        whole = len(bits) - len(bits) % _NUMBERS_PER_SUM
        matrix = bits[:whole].view(-1, _NUMBERS_PER_SUM)
        sums += [matrix.sum(side, dtype=torch.int64) for side in (0, 1)]
        sums.append(bits[whole:].long())
    content = torch.cat(sums).cpu().numpy().astype("<i8").tobytes()
    return _digest(repr(tuple(tensor.shape)).encode() + content)


def _digest_settings(encoder: TextEncoder, role: str, max_length: int) -> str:
    settings, limit = encoder.settings, encoder.length_limit(max_length)
    tokens = token_tensors(encoder.tokenizer, _PROBES, limit, encoder.has_special_tokens)
    content = [
        settings.pooling,
        settings.activation,
        encoder.prompt_text(settings.prompt_for(role)),
        limit,
        [
            ids[mask.bool()].tolist()
            for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
        ],
    ]
    # Options that came later leave the digests of other encoders as they were.
    options = {
        "attention": settings.attention,
        "echo": settings.echo,
        # A trained scale is one of the weights.
        "logit_scale": None if settings.train_logit_scale else settings.logit_scale,
    }
    defaults = {"logit_scale": 1.0}
    content += [
        [name, value]
        for name, value in options.items()
        if value is not None and value != defaults.get(name)
    ]
    return _digest(json.dumps(content).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
