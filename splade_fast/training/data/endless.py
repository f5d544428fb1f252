"""A stream of examples that starts over at its end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from splade_fast.search.texts import DataError


class EndlessStream(IterableDataset[Any]):
    """The examples of a stream again and again, in the order of a new epoch each time.

    transformers' Trainer counts epochs of a stream without knowing how long it is, and so neither
    finds the place again where a run stopped, nor keeps a last group of batches that is too small
    for `gradient_accumulation_steps` from adding to the first one of the next epoch. For it this
    stream is one epoch, which `max_steps` ends.

    Args:
        stream: anything to iterate over; its `set_epoch` is told the epoch where it has one.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            empty = True
            for example in self.stream:
                empty = False
                yield example
            if empty:
                # A worker may have no part of a stream that the others have.
                if get_worker_info() is not None:
                    return
                raise DataError("train_dataset must have at least one example, got none")
