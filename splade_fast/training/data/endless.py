"""Stream of examples that starts over at its end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from splade_fast.search.texts import DataError


class EndlessStream(IterableDataset[Any]):
    """Repeat the examples of a stream, in the order of a new epoch each time.

    Transformers' Trainer does not know the length of a stream. At the end of an epoch it would lose
    its place for resuming, and would add a last, incomplete group of accumulated batches to the
    first group of the next epoch. It sees this stream as one epoch, which `max_steps` ends.

    Args:
        stream: any iterable; its `set_epoch` is called with each epoch's number if it has one.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            is_empty = True
            for example in self.stream:
                is_empty = False
                yield example
            if is_empty:
                # With several workers, one worker's part of the stream may be empty.
                if get_worker_info() is not None:
                    return
                raise DataError("train_dataset must have at least one example, got none")
