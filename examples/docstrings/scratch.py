"""python -m examples.docstrings.scratch: train a model from random weights to find docstrings.

Only the vocabulary of the tokenizer comes from a trained model, so the quality is due to this
training alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from examples.docstrings.bm25 import bm25_run
from examples.docstrings.checkpoint import demo_checkpoint
from examples.docstrings.corpus import PACKAGES, Pair, docstring_pairs, spread
from examples.docstrings.tables import quality_table
from examples.docstrings.training import plot, split_pairs, train
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.evaluation import evaluate_run
from splade_fast.search.texts import DataError, Texts
from splade_fast.training.evaluator import RetrievalEvaluator

# Vectors of random weights have thousands of active dims; a search needs only the largest.
_KEPT = 256

# With a bias of zero, half of the vocabulary would be active at first. The scores would be in the
# thousands, and the training would not recover.
_DECODER_BIAS = -0.5

SETTINGS: dict[str, Any] = {
    "loss": "in_batch",
    "temperature": 0.1,
    "max_document_length": 64,
    "max_query_length": 32,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-4,
    "warmup_steps": 20,
    "lambda_query": 1e-3,
    "lambda_document": 1e-3,
}

console = Console()


def random_encoder(tokenizer_folder: str | Path) -> SpladeEncoder:
    """Return a random BERT of one layer and width 128 with the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(_DECODER_BIAS)
    return SpladeEncoder(model, tokenizer)


def make_evaluator(pairs: list[Pair], num_queries: int) -> RetrievalEvaluator:
    """Return an evaluator whose queries search for their documents among those of all pairs.

    Args:
        pairs: held-out pairs.
        num_queries: number of pairs whose query is evaluated.
    """
    names = [f"{pair.name}#{number}" for number, pair in enumerate(pairs)]
    asked = spread(range(len(pairs)), num_queries)
    return RetrievalEvaluator(
        Texts([names[i] for i in asked], [pairs[i].query for i in asked]),
        Texts(names, [pair.document for pair in pairs]),
        {names[i]: {names[i]: 1} for i in asked},
        max_query_length=SETTINGS["max_query_length"],
        max_document_length=128,
        document_top_k=_KEPT,
        query_top_k=_KEPT,
    )


def demo(
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    num_queries: Annotated[int, typer.Option(min=1, help="Number of queries.")] = 1000,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of pairs to use.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    plot_file: Annotated[Path, typer.Option("--plot", help="File for the plot.")] = Path(
        ".demo/scratch.png"
    ),
) -> None:
    """Train a small random model on docstrings, and evaluate it on those of held-out modules."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pairs: Sequence[Pair] = docstring_pairs()
    if limit:
        pairs = spread(pairs, limit)
    split = split_pairs(pairs)
    if not split.held_out or not split.training:
        raise DataError(f"one of {', '.join(PACKAGES)} must be installed, got too few pairs")
    encoder = random_encoder(demo_checkpoint())
    evaluator = make_evaluator(split.held_out, num_queries)
    results = {"random weights": evaluator(encoder)}
    start = time.perf_counter()
    progress = train(encoder, split.training, steps, SETTINGS)
    console.print(
        f"{steps} steps on {len(split.training)} pairs: {time.perf_counter() - start:.1f} s"
    )
    plot(progress, plot_file)
    results["trained"] = evaluator(encoder)
    run = bm25_run(evaluator.corpus, evaluator.queries, 100)
    results["BM25"] = evaluate_run(evaluator.qrels, run)
    title = (
        f"{len(evaluator.queries)} queries, {len(evaluator.corpus)} documents, at most "
        f"{_KEPT} entries kept, see {plot_file}"
    )
    console.print(quality_table(title, results))


if __name__ == "__main__":
    typer.run(demo)
