"""Several sources of examples: their shares in the batches, and batches of one source each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import ConcatDataset, IterableDataset, Sampler

from splade_fast.training.data.endless import EndlessStream

BATCH_SOURCES = ("mixed", "separate")


class SourceSampler(Sampler[int]):
    """Draw the examples of an epoch from several sources, in groups of one source each.

    The sources have the numbers of groups that their weights say, in random order, and the groups
    take the examples of a source in random order. A source whose share is larger than its number of
    examples repeats them.

    Args:
        sizes: number of examples of each source; the examples are numbered source by source.
        weights: weight of each source. None: the numbers of examples.
        group_size: number of consecutive examples of one source; 1 mixes the sources.
        seed: seed of the random orders, to which the number of the epoch is added.

    Raises:
        ValueError: a source without a weight has fewer examples than a group.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, group_size: int, seed: int
    ) -> None:
        self._sizes, self._group_size, self._seed = sizes, group_size, seed
        self._epoch = 0
        if weights is None:
            self._groups = [size // group_size for size in sizes]
            if 0 in self._groups:
                raise ValueError(
                    f"train_dataset must have at least {group_size} examples in each source, a "
                    f"batch of all processes, got {min(sizes)}; source_weights repeats examples"
                )
        else:
            total = max(1, sum(sizes) // group_size)
            self._groups = _shares(torch.tensor(weights, dtype=torch.float64), total)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random orders of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._groups) * self._group_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        orders, first = [], 0
        for size, groups in zip(self._sizes, self._groups, strict=True):
            orders.append(first + _repeated_permutation(size, groups * self._group_size, generator))
            first += size
        sources = torch.arange(len(orders)).repeat_interleave(torch.tensor(self._groups))
        sources = sources[torch.randperm(len(sources), generator=generator)]
        groups_of = [order.view(-1, self._group_size) for order in orders]
        used = [0] * len(orders)
        for source in sources.tolist():
            yield from groups_of[source][used[source]].tolist()
            used[source] += 1


class SourceStream(IterableDataset[Any]):
    """Draw examples from several streams without end, in groups of one stream each.

    Args:
        streams: the streams; each starts over at its end.
        weights: weight of each stream. None: equal weights.
        group_size: number of consecutive examples of one stream; 1 mixes the streams.
        seed: seed of the draws.
    """

    def __init__(
        self, streams: Sequence[Any], weights: Sequence[float] | None, group_size: int, seed: int
    ) -> None:
        self._streams = [EndlessStream(stream) for stream in streams]
        self._weights = torch.tensor(weights or [1.0] * len(streams), dtype=torch.float64)
        self._group_size, self._seed = group_size, seed

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self._seed)
        streams = [iter(stream) for stream in self._streams]
        weights = self._weights.clone()
        while weights.any():
            source = int(torch.multinomial(weights, 1, generator=generator))
            group = list(islice(streams[source], self._group_size))
            yield from group
            if not group:  # this data loading process has no part of the stream
                weights[source] = 0


def join_sources(
    datasets: Mapping[str, Any],
    weights: Sequence[float] | None,
    group_size: int,
    seed: int,
) -> tuple[Any, SourceSampler | None]:
    """Return one dataset of all sources, and its sampler; None for streams.

    Args:
        datasets: the sources by name, all with a length or all streams.
        weights: weight of each source in their order, or None.
        group_size: number of consecutive examples of one source.
        seed: seed of the random orders.

    Raises:
        ValueError: there is no source, weights are not one for each source, some sources are
            streams and some are not, or a source is empty or too small.
    """
    if not datasets:
        raise ValueError("train_dataset must have at least one source, got none")
    if weights is not None and len(weights) != len(datasets):
        raise ValueError(
            f"source_weights must be one for each of the {len(datasets)} sources, "
            f"got {len(weights)}"
        )
    parts = list(datasets.values())
    has_length = [hasattr(part, "__len__") for part in parts]
    if not any(has_length):
        return SourceStream(parts, weights, group_size, seed), None
    if not all(has_length):
        raise ValueError("train_dataset must have only streams or none, got both")
    for name, part in datasets.items():
        if not len(part):
            raise ValueError(f"train_dataset must have examples in each source, got none in {name}")
    sampler = SourceSampler([len(part) for part in parts], weights, group_size, seed)
    return ConcatDataset(parts), sampler


def _shares(weights: torch.Tensor, total: int) -> list[int]:
    """Return `total` as a sum of integers in proportion to weights, by the largest remainders."""
    exact = weights / weights.sum() * total
    shares = exact.floor().long()
    rest = total - int(shares.sum())
    largest = (exact - shares).argsort(descending=True, stable=True)[:rest]
    shares[largest] += 1
    return [int(share) for share in shares]


def _repeated_permutation(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` indices below size: random permutations, one after another."""
    rounds = -(-count // size)
    orders = [torch.randperm(size, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:count] if orders else torch.empty(0, dtype=torch.int64)
