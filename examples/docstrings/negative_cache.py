"""Train two text towers with a cache of negatives.

Run `python -m examples.docstrings.negative_cache`.

A query tower and a document tower, each an average of word vectors, learn to find a docstring by
its summary. Every query is scored against all cached documents, while only its positive and one
drawn negative go through the document tower.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.docstrings.corpus import docstring_pairs
from splade_fast.negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    Scale,
)

_WORD = re.compile(r"[a-z]+|[0-9]+")
_BUCKETS = 1 << 15
_QUERY_WORDS = 24
_DOCUMENT_WORDS = 128
_DIM = 128
_TEMPERATURE = 1 / 20

console = Console()


class Tower(nn.Module):
    """Normalised mean of the word vectors of a text; the word id 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(_BUCKETS, _DIM, mode="mean", padding_idx=0, sparse=True)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(self.words(features["ids"].long()), dim=1)


@dataclass
class Texts:
    """Words of queries and of the documents that answer them, (N, L) int32."""

    queries: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return len(self.queries)


@dataclass
class Progress:
    """Measurements after a training step."""

    step: int
    loss: float  # the cross entropy against the cache
    staleness: float
    mrr: float | None  # MRR@10 of held-out queries among all documents


def word_ids(text: str, length: int) -> list[int]:
    """Return ids of the first words of a text, hashed to 1 and above, padded with 0."""
    words = _WORD.findall(text.lower())[:length]
    ids = [1 + zlib.crc32(word.encode()) % (_BUCKETS - 1) for word in words]
    return ids + [0] * (length - len(ids))


def load_docstrings() -> Texts:
    """Return the demo corpus in random order.

    Raises:
        ValueError: no package of the corpus is installed.
    """
    pairs = docstring_pairs()
    if not pairs:
        raise ValueError("the demo needs installed packages with docstrings, found none")
    queries = torch.tensor([word_ids(p.query, _QUERY_WORDS) for p in pairs], dtype=torch.int32)
    documents = torch.tensor(
        [word_ids(p.document, _DOCUMENT_WORDS) for p in pairs], dtype=torch.int32
    )
    order = torch.randperm(len(pairs))
    return Texts(queries[order], documents[order])


def reciprocal_rank(query_tower: Tower, document_tower: Tower, texts: Texts, count: int) -> float:
    """Return the MRR@10 of the last `count` queries among all documents."""
    with torch.no_grad():
        documents = document_tower({"ids": texts.documents})
        queries = query_tower({"ids": texts.queries[-count:]})
        scores = queries @ documents.t()
        own = scores.gather(1, torch.arange(len(texts) - count, len(texts)).unsqueeze(1))
        rank = 1 + (scores > own).sum(1)
    return torch.where(rank <= 10, 1 / rank, 0).mean().item()


def train(
    texts: Texts, *, held_out: int, cache_size: int, batch: int, steps: int, evaluations: int
) -> Iterator[Progress]:
    """Train both towers, and yield the progress of every step.

    The last `held_out` queries and their documents are not used for training.
    """
    query_tower, document_tower = Tower(), Tower()
    parameters = [*query_tower.parameters(), *document_tower.parameters()]
    optimizer = torch.optim.SparseAdam(parameters, lr=0.01)
    specs = {
        "ids": FixedLenFeature([_DOCUMENT_WORDS], torch.int32),
        "embedding": FixedLenFeature([_DIM], torch.float32),
    }
    cache_loss = CacheClassificationLoss(
        embedding_key="embedding",
        data_keys=("ids",),
        score_transform=Scale(1 / _TEMPERATURE),
        exclude="ids",
    )
    handler = CacheLossHandler(
        CacheManager(specs, cache_size), cache_loss, embedding_key="embedding", data_keys=("ids",)
    )
    evaluated = {steps * i // evaluations for i in range(1, evaluations + 1)}
    for step in range(1, steps + 1):
        rows = torch.randint(len(texts) - held_out, (batch,))
        features = {"ids": texts.documents[rows]}
        result = handler.step(
            document_tower,
            query_tower({"ids": texts.queries[rows]}),
            document_tower(features),
            features,
        )
        optimizer.zero_grad()
        result.training_loss.backward()
        optimizer.step()
        mrr = None
        if step in evaluated:
            mrr = reciprocal_rank(query_tower, document_tower, texts, held_out)
        yield Progress(step, result.interpretable_loss.item(), result.staleness.item(), mrr)


def plot(progress: list[Progress], path: Path) -> None:
    """Plot loss, staleness and MRR over the steps, in the image format of the path's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    steps = [point.step for point in progress]
    axes[0].plot(steps, [point.loss for point in progress])
    axes[0].set(ylabel="interpretable loss, nats")
    axes[1].plot(steps, [point.staleness for point in progress])
    axes[1].set(ylabel="staleness of drawn documents", yscale="log")
    evaluated = [point for point in progress if point.mrr is not None]
    axes[2].plot([p.step for p in evaluated], [p.mrr for p in evaluated], marker="o")
    axes[2].set(ylabel="MRR@10, held out", xlabel="step")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def demo(
    steps: Annotated[int, typer.Option(min=1)] = 2500,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    cache_size: Annotated[int, typer.Option(min=1)] = 8192,
    held_out: Annotated[int, typer.Option(min=1, help="Number of queries for evaluation.")] = 1000,
    limit: Annotated[int | None, typer.Option(min=2, help="Maximum number of documents.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    plot_file: Annotated[Path, typer.Option("--plot", help="File of the plot.")] = Path(
        ".demo/negative_cache.png"
    ),
) -> None:
    """Train two text towers with a cache of negatives, on the docstrings of installed packages."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    texts = load_docstrings()
    if limit is not None:
        texts = Texts(texts.queries[:limit], texts.documents[:limit])
    held_out = min(held_out, len(texts) // 2)
    console.print(f"{len(texts)} documents read in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    progress: list[Progress] = []
    table = Table("step", "interpretable loss", "staleness", "MRR@10, held out")
    for point in train(
        texts, held_out=held_out, cache_size=cache_size, batch=batch, steps=steps, evaluations=10
    ):
        progress.append(point)
        if point.mrr is not None:
            recent = progress[-min(50, steps) :]
            loss = sum(p.loss for p in recent) / len(recent)
            stale = sum(p.staleness for p in recent) / len(recent)
            table.add_row(str(point.step), f"{loss:.3f}", f"{stale:.4f}", f"{point.mrr:.3f}")
    seconds = time.perf_counter() - start
    console.print(table)
    console.print(
        f"{steps} steps of {batch} queries x {cache_size} cached documents: {seconds:.1f} s"
    )
    plot(progress, plot_file)
    console.print(f"see {plot_file}")


if __name__ == "__main__":
    typer.run(demo)
