"""python -m examples.docstrings: encode, search, evaluate, compare and train a real checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from examples.docstrings.bm25 import bm25_run
from examples.docstrings.checkpoint import CheckpointError, demo_checkpoint
from examples.docstrings.contenders import CONTENDERS
from examples.docstrings.corpus import docstring_pairs, spread
from examples.docstrings.measure import Measurement, measure_in_subprocess
from examples.docstrings.sizes import Sizes, choose_sizes, encoding_rate
from examples.docstrings.stages import console, stage
from examples.docstrings.tables import quality_table
from examples.docstrings.task import Task, docstring_task, file_task, held_out_evaluator
from examples.docstrings.tradeoff import plot, trade_offs
from examples.docstrings.training import FINE_TUNING, train
from examples.docstrings.training import plot as plot_training
from examples.docstrings.training_cost import CONTENDERS as CONTENDERS_OF_TRAINING
from examples.docstrings.training_cost import (
    LENGTH,
    Setting,
    StepCost,
    batch_within,
    long_pairs,
    loss_difference,
    step_cost,
)
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.ops.score import sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.evaluation import evaluate_run, make_run
from splade_fast.search.hits import list_hits
from splade_fast.search.texts import DataError, Qrels, Texts
from splade_fast.training.evaluator import RetrievalEvaluator

LARGEST_DIFFERENCE = 1e-5
_MAX_LENGTH = 256


def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: a small one.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Own corpus, .tsv or .jsonl.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Queries of the own corpus.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Judgements; without: no evaluation.")] = None,
    ask: Annotated[list[str] | None, typer.Option(help="Own question; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of documents to use.")] = None,
    num_queries: Annotated[int, typer.Option(min=1, help="Docstring queries evaluated.")] = 1000,
    compared: Annotated[
        int | None, typer.Option(min=1, help="Number of documents in the speed comparison.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    plot_file: Annotated[
        Path, typer.Option("--plot", help="File for the plot of the pruning trade-off.")
    ] = Path(".demo/pruning.png"),
    steps: Annotated[
        int | None, typer.Option(min=0, help="Number of fine-tuning steps; 0 skips training.")
    ] = None,
    training_plot_file: Annotated[
        Path, typer.Option("--training-plot", help="File for the plot of the training.")
    ] = Path(".demo/training.png"),
    memory: Annotated[
        float, typer.Option(min=1, help="GiB for the largest batch of a training step.")
    ] = 4.0,
) -> None:
    """Encode a corpus with SPLADE, search it, evaluate against BM25, compare speed and memory.

    Without a corpus of your own, also fine-tune the model on docstrings of other modules, and
    compare the cost of a training step. On a slow machine, the sizes that you do not choose are
    smaller.
    """
    torch.set_num_threads(threads)
    with _failure_exits_with_2():
        with stage("Reading the corpus"):
            if corpus is not None:
                task = file_task(corpus, queries, qrels, limit)
            elif queries is not None or qrels is not None:
                raise DataError("--queries and --qrels need --corpus")
            else:
                pairs = docstring_pairs()
                task = docstring_task(pairs, limit, num_queries)
        with stage("Loading the model"):
            name = model or str(demo_checkpoint())
            encoder = SpladeEncoder.from_pretrained(name)
            rate = encoding_rate(encoder, task.documents.texts, batch_size, _MAX_LENGTH)
        sizes = choose_sizes(rate, len(task.documents))
        console.print(f"  {rate:.0f} documents a second")
        if corpus is None and limit is None and sizes.documents < len(task.documents):
            console.print("  --limit, --compared and --steps choose larger sizes")
            task = docstring_task(pairs, sizes.documents, num_queries)
        compared = sizes.compared if compared is None else compared
        steps = sizes.steps if steps is None else steps
    with stage(f"Encoding {len(task.documents)} documents"):
        documents = encoder.encode(
            task.documents.texts, batch_size=batch_size, max_length=_MAX_LENGTH
        )
    console.print(
        f"{documents.lengths.float().mean():.0f} terms per document, "
        f"{documents.nbytes / 2**20:.0f} MiB in all\n"
    )
    _answer(encoder, task, documents, ask or task.questions)
    if task.queries is None or task.qrels is None:
        _compare(name, task, compared, batch_size, threads)
        return
    vectors, bm25 = _evaluate(
        encoder, task, documents, task.queries, task.qrels, batch_size, plot_file
    )
    _compare(name, task, compared, batch_size, threads)
    if task.training and steps:
        evaluator = RetrievalEvaluator(
            task.queries,
            task.documents,
            task.qrels,
            max_query_length=_MAX_LENGTH,
            max_document_length=_MAX_LENGTH,
            batch_size=batch_size,
        )
        before = {"BM25": bm25, "SPLADE, before": evaluator.measure(vectors, documents)}
        _fine_tune(encoder, task, evaluator, before, steps, training_plot_file)
        _compare_training(name, encoder, task, memory * 1024, threads, sizes)


def _answer(
    encoder: SpladeEncoder, task: Task, documents: SparseRows, questions: list[str]
) -> None:
    """Print the expanded terms and the best documents of each question."""
    vectors = encoder.encode(questions, max_length=_MAX_LENGTH, show_progress=False)
    hits = list_hits(*sparse_search(vectors, documents, 3))
    for question, terms, found in zip(questions, encoder.top_terms(vectors, 12), hits, strict=True):
        console.print(question, style="bold", markup=False, highlight=False)
        console.print("  " + "  ".join(f"{term} {weight:.2f}" for term, weight in terms.items()))
        for document, score in found:
            start = task.documents.texts[document][:60]
            line = f"  {score:6.2f}  {task.documents.ids[document]}: {start}…"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
        console.print()


def _evaluate(
    encoder: SpladeEncoder,
    task: Task,
    documents: SparseRows,
    queries: Texts,
    qrels: Qrels,
    batch_size: int,
    plot_file: Path,
) -> tuple[SparseRows, dict[str, float]]:
    """Print the quality of the model, pruned and unpruned, and of BM25, on the judged queries.

    Returns:
        The vectors of the queries, and the measures of BM25.
    """
    with stage(f"Evaluating {len(queries)} queries"):
        vectors = encoder.encode(
            queries.texts, batch_size=batch_size, max_length=_MAX_LENGTH, show_progress=False
        )
        scores, found = sparse_search(vectors, documents, 100)
        runs = {
            "SPLADE": make_run(queries.ids, task.documents.ids, scores, found),
            "BM25": bm25_run(task.documents, queries, 100),
        }
        results = {name: evaluate_run(qrels, run) for name, run in runs.items()}
    table = Table("", *results["SPLADE"], title=f"{len(documents)} documents")
    for name, measures in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in measures.values()))
    console.print(table)

    def measure_mrr(rows: SparseRows) -> float:
        run = make_run(queries.ids, task.documents.ids, *sparse_search(vectors, rows, 10))
        return evaluate_run(qrels, run)["MRR@10"]

    with stage("Pruning the documents"):
        points = trade_offs(documents, measure_mrr)
        plot(points, plot_file)
    table = Table("entries kept", "index, MiB", "MRR@10", title=f"see {plot_file}")
    for point in points:
        table.add_row(point.label, f"{point.mib:.1f}", f"{point.mrr:.3f}")
    console.print(table)
    return vectors, results["BM25"]


def _compare(model: str, task: Task, compared: int, batch_size: int, threads: int) -> None:
    """Print speed and memory of all contenders, and check that their vectors agree."""
    # Spread over the corpus and sorted, so that all contenders form the same batches.
    texts = sorted(spread(task.documents.texts, compared), key=len, reverse=True)
    measured: dict[str, Measurement] = {}
    vectors: dict[str, SparseRows] = {}
    with stage(f"Comparing on {len(texts)} documents, batches of {batch_size}, {threads} threads"):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory() as folder:
                measured[name], vectors[name] = measure_in_subprocess(
                    name,
                    model,
                    texts,
                    Path(folder),
                    batch_size=batch_size,
                    max_length=_MAX_LENGTH,
                    threads=threads,
                )
    ours = vectors["splade_fast"].to_dense()
    table = Table("", "documents/s", "peak MiB above the model", "difference")
    table.columns[0].no_wrap = True
    disagreeing = []
    for name, measurement in measured.items():
        difference = (vectors[name].to_dense() - ours).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE:
            disagreeing.append(f"{name} by {difference:.1e}")
        peak = measurement.peak_mib
        table.add_row(
            name,
            f"{measurement.docs_per_second:.0f}",
            "not known" if peak is None else f"{peak:.0f}",
            f"{difference:.1e}",
        )
    console.print(table)
    if disagreeing:
        console.print(f"Vectors differ by more than {LARGEST_DIFFERENCE}: {', '.join(disagreeing)}")
        raise typer.Exit(1)
    console.print(f"All vectors agree within {LARGEST_DIFFERENCE}.")


def _fine_tune(
    encoder: SpladeEncoder,
    task: Task,
    evaluator: RetrievalEvaluator,
    results: dict[str, dict[str, float]],
    steps: int,
    plot_file: Path,
) -> None:
    """Train on the docstrings of other modules, and print the quality beside `results`."""
    with stage(f"Training on {len(task.training)} docstrings of other modules, {steps} steps"):
        during = held_out_evaluator(task, _MAX_LENGTH)
        progress = train(encoder, task.training, steps, FINE_TUNING, evaluator=during)
        plot_training(progress, plot_file)
    with stage(f"Encoding {len(task.documents)} documents again"):
        after = evaluator(encoder, show_progress=True)
    title = f"{len(evaluator.queries)} queries of held-out modules, see {plot_file}"
    console.print(quality_table(title, results | {"SPLADE, after": after}))


def _compare_training(
    model: str, encoder: SpladeEncoder, task: Task, memory_mib: float, threads: int, sizes: Sizes
) -> None:
    """Print the cost of a training step with the ops and with plain PyTorch."""
    pairs = long_pairs(task.training, encoder.tokenizer)
    for loss in ("negative_cache", "in_batch"):
        costs: dict[str, StepCost] = {}
        batches: dict[str, int] = {}
        title = f"{Setting.batch_size} pairs, {LENGTH} tokens a document, loss {loss}"
        with stage(f"Comparing training steps: {title}"):
            for contender in CONTENDERS_OF_TRAINING:
                setting = Setting(contender, loss, steps=sizes.cost_steps, threads=threads)
                costs[contender] = step_cost(setting, model, pairs)
                if loss == "negative_cache" and sizes.should_find_largest_batch:
                    batches[contender] = batch_within(
                        memory_mib, setting, costs[contender], model, pairs
                    )
        table = Table("", "seconds/step", "peak MiB above the model", title=title)
        if batches:
            table.add_column(f"largest batch in {memory_mib / 1024:g} GiB")
        for contender, cost in costs.items():
            row = [contender, f"{cost.median_seconds:.2f}", f"{cost.peak_mib:.0f}"]
            table.add_row(*row, *([str(batches[contender])] if batches else []))
        console.print(table)
        difference = loss_difference(costs)
        console.print(f"The losses of {sizes.cost_steps} steps differ by at most {difference:.1e}.")


@contextmanager
def _failure_exits_with_2() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, CheckpointError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(demo)
