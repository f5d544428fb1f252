"""Caches and networks for the tests."""

import torch
from torch import Tensor, nn

from splade_fast.negative_cache.negative_cache import CacheManager, FixedLenFeature, NegativeCache


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def full_cache(embeddings: Tensor, data: Tensor | None = None, **options) -> NegativeCache:
    """Return a cache without empty slots, whose data are the embeddings unless given."""
    data = embeddings.clone() if data is None else data
    return NegativeCache(
        {"embeddings": embeddings, "data": data}, torch.zeros(len(data)).int(), **options
    )


def identity(features: dict[str, Tensor]) -> Tensor:
    return features["data"]


class Tower(nn.Module):
    """Mean of word vectors."""

    def __init__(self, words: int = 50, dim: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim)
        nn.init.normal_(self.words.weight)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.words(features["ids"].long()).mean(1)


def tower_specs(dim: int = 8, length: int = 4) -> dict[str, FixedLenFeature]:
    return {
        "ids": FixedLenFeature([length], torch.int32),
        "embedding": FixedLenFeature([dim], torch.float32),
    }


def tower_manager(size: int, **options) -> CacheManager:
    return CacheManager(tower_specs(), size, **options)
