"""python -m examples.docstrings.recipe: train in two rounds, the second on mined, scored lists.

The first round is that of the demo, on pairs. Its model then finds hard negatives for each query of
the training, and an ensemble of that model and BM25 scores them. The second round learns these
scores. The result is the mean of both rounds' weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from examples.docstrings.bm25 import bm25_run
from examples.docstrings.checkpoint import demo_checkpoint
from examples.docstrings.corpus import Pair, docstring_pairs
from examples.docstrings.stages import console, stage
from examples.docstrings.tables import quality_table
from examples.docstrings.task import docstring_task, held_out_evaluator
from examples.docstrings.training import FINE_TUNING, Progress, train
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.recipe import (
    BM25Teacher,
    EncoderTeacher,
    MiningTask,
    NegativeRules,
    merge_checkpoints,
    mine_hard_negatives,
    score_with_teachers,
)
from splade_fast.search.encode_corpus import encode_corpus
from splade_fast.search.evaluation import evaluate_run
from splade_fast.search.texts import Texts
from splade_fast.training import RetrievalEvaluator, load_training_data

_MAX_LENGTH = 256

# docs/recipe.md compares these settings with others.
RULES = NegativeRules(num_negatives=2, last_rank=30, relative_margin=0.0, sampling="random")
SCALE = 6.0  # of the teachers' scores, whose differences the student's should have
DISTILLATION: dict[str, Any] = FINE_TUNING | {
    "loss": "in_batch+kl",
    "cache_size": 0,
    "learning_rate": 5e-4,
    "regularizer_steps": 0,  # the final weights hold from the start, as the model is sparse already
}
# Round one's own training, at the final weights of the regularisers.
CONTROL: dict[str, Any] = FINE_TUNING | {"regularizer_steps": 0}


@dataclass(frozen=True)
class Point:
    """Quality on held-out queries, and entries of held-out documents, after a step."""

    step: int
    mrr: float
    entries: float


def write_scored_lists(encoder: SpladeEncoder, pairs: Sequence[Pair], folder: Path) -> Path:
    """Write each query with its document, hard negatives and an ensemble's scores of them.

    The documents are encoded once, for mining and for scoring.

    Args:
        encoder: model of the first round.
        pairs: pairs of the training, without held-out texts.
        folder: an empty folder.

    Returns:
        The file of the scored lists.
    """
    names = [str(number) for number in range(len(pairs))]
    corpus = Texts(names, [pair.document for pair in pairs])
    queries = Texts(names, [pair.query for pair in pairs])
    index, mined, scored = folder / "index", folder / "mined.jsonl", folder / "scored.jsonl"
    _write_index(encoder, corpus, index)
    task = MiningTask.from_judgements(queries, corpus, {name: {name: 1} for name in names})
    _show(mine_hard_negatives(encoder, task, mined, RULES, index=index).lines())
    first = EncoderTeacher(encoder)
    first.use_index(index, corpus)
    teachers = [BM25Teacher(corpus.texts), first]
    _show(score_with_teachers(mined, scored, teachers, scale=SCALE).lines())
    return scored


def measured_points(progress: Sequence[Progress], start: int) -> list[Point]:
    """Return the points of a round at which held-out queries were asked.

    Args:
        progress: progress of the round, whose steps count from its own start.
        start: step at which the round starts.
    """
    return [
        Point(start + found.step, found.mrr, found.entries)
        for found in progress
        if found.mrr is not None and found.entries is not None
    ]


def plot(points: Sequence[Point], mean: Point, second: int, path: Path) -> None:
    """Plot quality and size over the steps of two rounds; the suffix of path sets the format.

    Args:
        points: points of both rounds, in their order.
        mean: point of the mean of both rounds' weights.
        second: step at which the second round starts.
        path: file to write.
    """
    from matplotlib.figure import Figure

    steps = [point.step for point in points]
    figure = Figure(figsize=(7, 6), layout="constrained")
    quality, size = figure.subplots(2, sharex=True)
    quality.plot(steps, [point.mrr for point in points], marker="o")
    quality.set(
        ylabel="MRR@10", title="Queries of held-out modules find their docstring: should rise"
    )
    size.plot(steps, [point.entries for point in points], marker="o")
    star = {"marker": "*", "markersize": 14, "linestyle": "", "color": "tab:red"}
    quality.plot(mean.step, mean.mrr, label="mean of both rounds' weights", **star)
    size.plot(mean.step, mean.entries, **star)
    quality.legend(loc="upper left")
    size.set(
        ylabel="entries a document",
        xlabel="training step",
        title="Entries of these docstrings' vectors: fewer make a smaller index",
    )
    for axis in (quality, size):
        axis.axvspan(second, mean.step, color="tab:orange", alpha=0.15)
        axis.grid(visible=True, alpha=0.3)
    for end, label in ((second, "round one: pairs"), (mean.step, "round two: hard negatives")):
        place = {"xy": (end, 0), "xycoords": ("data", "axes fraction")}
        quality.annotate(label, **place, xytext=(-6, 6), textcoords="offset points", ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def train_on_and_merge(
    first: Path, examples: Any, steps: int, settings: Mapping[str, Any], **options: Any
) -> tuple[SpladeEncoder, SpladeEncoder, list[Progress]]:
    """Train a model on, and return the trained one, the mean of both, and the progress.

    Args:
        first: folder of the model; the others are written beside it.
        examples, steps, settings, options: see `train`.
    """
    encoder = SpladeEncoder.from_pretrained(first)
    progress = train(encoder, examples, steps, settings, seed=1, **options)
    second, merged = first.with_name("second"), first.with_name("merged")
    encoder.save_pretrained(second)
    merge_checkpoints([first, second], merged, show_progress=False)
    return encoder, SpladeEncoder.from_pretrained(merged), progress


def recipe(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the first round.")] = 300,
    second_steps: Annotated[int, typer.Option(min=1, help="Steps of the second round.")] = 150,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of pairs to use.")] = None,
    num_queries: Annotated[int, typer.Option(min=1, help="Number of queries evaluated.")] = 1000,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    plot_file: Annotated[Path, typer.Option("--plot", help="File for the plot.")] = Path(
        ".demo/recipe.png"
    ),
    control: Annotated[
        bool, typer.Option("--control", help="Compare with a second round on the pairs.")
    ] = False,
) -> None:
    """Train on docstrings, mine, score, distil and merge; evaluate on held-out modules."""
    torch.set_num_threads(threads)
    with stage("Reading the corpus and the model"):
        task = docstring_task(docstring_pairs(), limit, num_queries)
        assert task.queries is not None
        assert task.qrels is not None
        encoder = SpladeEncoder.from_pretrained(str(demo_checkpoint()))
        lengths = {"max_query_length": _MAX_LENGTH, "max_document_length": _MAX_LENGTH}
        evaluator = RetrievalEvaluator(task.queries, task.documents, task.qrels, **lengths)
        during = held_out_evaluator(task, _MAX_LENGTH)
        points = [_point(0, during(encoder))]
        results = {"BM25": evaluate_run(task.qrels, bm25_run(task.documents, task.queries, 100))}
    with stage(f"Round one: {steps} steps on {len(task.training)} pairs"):
        progress = train(encoder, task.training, steps, FINE_TUNING, evaluator=during)
        points += measured_points(progress, 0)
        results["round one"] = evaluator(encoder)
    with tempfile.TemporaryDirectory() as name:
        first = Path(name) / "round-two" / "first"
        encoder.save_pretrained(first)
        with stage("Mining hard negatives, and scoring them by BM25 and the model of round one"):
            scored = load_training_data(write_scored_lists(encoder, task.training, Path(name)))
        with stage(f"Round two: {second_steps} steps on {len(scored)} scored lists"):
            encoder, merged, progress = train_on_and_merge(
                first, scored, second_steps, DISTILLATION, evaluator=during
            )
            points += measured_points(progress, steps)
            if control:  # encodes all documents once more
                results["round two"] = evaluator(encoder)
            results["mean of both"] = evaluator(merged)
        mean = _point(steps + second_steps, during(merged))
        if control:
            with stage(f"Control: {second_steps} more steps on the pairs"):
                first = first.rename(Path(name) / "first")
                encoder, merged, _ = train_on_and_merge(first, task.training, second_steps, CONTROL)
                results["control: pairs"] = evaluator(encoder)
                results["… mean of both"] = evaluator(merged)
    plot(points, mean, steps, plot_file)
    title = f"{len(task.queries)} queries of held-out modules, see {plot_file}"
    console.print(quality_table(title, results))


def _point(step: int, metrics: Mapping[str, float]) -> Point:
    return Point(step, metrics["MRR@10"], metrics["document_active_dims"])


def _write_index(encoder: SpladeEncoder, corpus: Texts, folder: Path) -> None:
    """Encode a corpus to an index folder."""
    file = folder.with_suffix(".jsonl")
    with file.open("w", encoding="utf-8") as lines:
        for doc_id, text in zip(corpus.ids, corpus.texts, strict=True):
            lines.write(json.dumps({"id": doc_id, "text": text}) + "\n")
    length = FINE_TUNING["max_document_length"]
    encode_corpus(encoder, file, folder, model="unnamed", max_length=length)


def _show(report: Iterable[str]) -> None:
    console.print("  " + "  ".join(line.replace("\t", " ") for line in report))


if __name__ == "__main__":
    typer.run(recipe)
