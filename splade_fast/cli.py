"""Command line: encode and search a corpus, evaluate and train a model, export an index."""

from __future__ import annotations

import json
import os
import platform
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
import typer

from splade_fast._checks import check_unicode
from splade_fast._distributed import OtherRankError, fail_together, join_torchrun
from splade_fast._library import build_info
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.export.export_index import EmptyDocuments, ExportFormat, export_index
from splade_fast.ops.score import sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.chunk_folder import ChunkFolder
from splade_fast.search.encode_corpus import check_vocabularies, encode_corpus
from splade_fast.search.hits import count_empty_vectors, list_hits, warn_of_empty_vectors
from splade_fast.search.index import Index, IndexMeta, resolve_model
from splade_fast.search.lines import DataWarning, parse_id
from splade_fast.search.models import (
    load_document_encoder,
    load_own_query_encoder,
    load_query_encoder_of_index,
)
from splade_fast.search.texts import DataError, Texts, read_qrels, read_texts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Learned sparse retrieval: encode, search, evaluate and train with SPLADE models.",
)

Model = Annotated[str, typer.Option(help="Hub name or folder of a SPLADE model.")]
OtherModel = Annotated[str | None, typer.Option("--model", help="Model; default: the index's.")]
QueryModel = Annotated[
    str | None,
    typer.Option(
        help="Model for queries; default: the one that was trained with the model, else the model."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of texts per batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Number of tokens kept of each text.")]
KeptEntries = Annotated[
    int | None, typer.Option("--k", min=1, help="Keep the k largest entries of a vector.")
]

Device = Literal["cpu", "cuda"]


@app.command()
def encode(
    corpus: Annotated[Path, typer.Argument(help="File of id<TAB>text lines, or .jsonl file.")],
    index: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    model: Model,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    chunk_size: Annotated[int, typer.Option(min=1, help="Documents encoded at a time.")] = 4096,
    device: Annotated[Device, typer.Option(help="cuda: one GPU for each process.")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run has encoded.")
    ] = False,
    query_model: QueryModel = None,
) -> None:
    """Encode a corpus into an index folder.

    An interrupted run keeps the documents that it has encoded, for a run with --resume.

    Several processes share the work under torchrun: torchrun -m splade_fast encode ...
    """
    with _exit_with_2_on_bad_input():
        with _clean_up_on_sigterm(), join_torchrun() as rank:
            with fail_together("loading the model"):
                if index.exists():
                    raise FileExistsError(f"{index} must not exist yet")
                encoder = load_document_encoder(model).to(_select_device(device))
                queries = load_own_query_encoder(model, query_model)
            with _advise_to_resume(index, is_first=rank == 0, should_resume=resume):
                count = encode_corpus(
                    encoder,
                    corpus,
                    index,
                    model=model,
                    k=k,
                    batch_size=batch_size,
                    max_length=max_length,
                    chunk_size=chunk_size,
                    resume=resume,
                    query_model=queries[0] if queries is not None else None,
                    query_encoder=queries[1] if queries is not None else None,
                )
        if rank == 0:
            size = sum(file.stat().st_size for file in index.iterdir())
            empty = count_empty_vectors(Index.load(index).rows)
            note = f", {empty} of them with empty vectors" if empty else ""
            typer.echo(f"{index}: {count} documents, {size / 2**20:.1f} MiB{note}")


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Folder written by `encode`.")],
    query: Annotated[str | None, typer.Argument(help="Text of one query.")] = None,
    queries: Annotated[Path | None, typer.Option(help="File of queries, instead of QUERY.")] = None,
    hits: Annotated[int, typer.Option(min=1, help="Documents shown for each query.")] = 10,
    terms: Annotated[int, typer.Option(min=0, help="Number of query terms shown.")] = 0,
    model: OtherModel = None,
    query_model: QueryModel = None,
    batch_size: BatchSize = 32,
) -> None:
    """Search an index and print lines `query id<TAB>rank<TAB>document id<TAB>score`.

    A document that shares no term with the query is no hit.
    """
    with _exit_with_2_on_bad_input():
        if (query is None) == (queries is None):
            raise DataError("give either QUERY or --queries")
        if query is not None:
            check_unicode("QUERY", query)  # undecodable bytes arrive as lone surrogates
        texts = Texts(["query"], [query]) if query is not None else read_texts(str(queries))
        loaded = Index.load(index)
        encoder = load_query_encoder_of_index(loaded, model=model, query_model=query_model)
        vectors = _encode_queries(encoder, texts, loaded.meta.max_length, batch_size)
        warn_of_empty_vectors(vectors, loaded.rows)
        listed = list_hits(*sparse_search(vectors, loaded.rows, hits))
        for document in {document for found in listed for document, _ in found}:
            parse_id(loaded.ids[document])  # an index of other programs may hold any text
        expansions = encoder.top_terms(vectors, terms) if terms else [{}] * len(texts)
        for query_id, expansion, found in zip(texts.ids, expansions, listed, strict=True):
            if expansion:
                shown = " ".join(f"{term}:{weight:.3f}" for term, weight in expansion.items())
                typer.echo(f"# {query_id}\t{shown}")
            for rank, (document, score) in enumerate(found, start=1):
                typer.echo(f"{query_id}\t{rank}\t{loaded.ids[document]}\t{score:.6f}")


@app.command()
def evaluate(
    queries: Annotated[Path, typer.Option(help="File of queries.")],
    qrels: Annotated[Path, typer.Option(help="File of judgements, TREC or BEIR format.")],
    index: Annotated[Path | None, typer.Option(help="Folder written by `encode`.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Corpus, instead of an index.")] = None,
    model: OtherModel = None,
    query_model: QueryModel = None,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Number of tokens kept of each text; default: 256."),
    ] = None,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids",
            help="Do not search the document that has the id of the query, as in BEIR.",
        ),
    ] = False,
) -> None:
    """Print MRR@10, nDCG@10 and Recall@100 of a model on a corpus or an index."""
    from splade_fast.search.evaluation import evaluate_vectors, select_judged, select_qrels

    with _exit_with_2_on_bad_input():
        if (index is None) == (corpus is None):
            raise DataError("give either --index or --corpus")
        if index is not None and (k is not None or max_length is not None):
            raise DataError("give --k and --max-length with --corpus; an index has its own")
        judgements = read_qrels(qrels)
        judged = select_judged(read_texts(queries), judgements)
        if index is not None:
            searched = Index.load(index)
            judgements = select_qrels(judgements, judged.ids, searched.ids)
            encoder = load_query_encoder_of_index(searched, model=model, query_model=query_model)
        else:
            if model is None:
                raise DataError("give --model with --corpus")
            texts = read_texts(str(corpus))
            judgements = select_qrels(judgements, judged.ids, texts.ids)
            documents = load_document_encoder(model)
            queries_of_model = load_own_query_encoder(model, query_model)
            encoder = documents if queries_of_model is None else queries_of_model[1]
            check_vocabularies(documents, encoder)
            searched = _build_index(documents, texts, model, k, batch_size, max_length or 256)
        vectors = _encode_queries(encoder, judged, searched.meta.max_length, batch_size)
        measures = evaluate_vectors(
            judgements,
            judged.ids,
            vectors,
            searched.ids,
            searched.rows,
            ignore_identical_ids=ignore_identical_ids,
        )
        for name, value in measures.items():
            typer.echo(f"{name}\t{value:.4f}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an encoder with options from a YAML file and flags; see `train --help`."""
    with _exit_with_2_on_bad_input():
        from splade_fast.training.command import train as run

        message = run(context.args)
    if message is not None:
        typer.echo(message)


@app.command()
def export(
    index: Annotated[Path, typer.Argument(help="Folder written by `encode`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    file_format: Annotated[ExportFormat, typer.Option("--format", help="Reader of the folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Source of token names; default: the index's model."),
    ] = None,
    empty: Annotated[EmptyDocuments, typer.Option(help="Documents without entries.")] = "keep",
    scale: Annotated[
        float | None,
        typer.Option(help="anserini: impact = round(scale * weight); default: 100."),
    ] = None,
) -> None:
    """Write an index in the format of a search engine, vector store or library."""
    with _exit_with_2_on_bad_input():
        if out.exists():
            raise FileExistsError(f"{out} must not exist yet")
        count = export_index(Index.load(index), out, file_format, model, empty, scale)
        typer.echo(f"{out}: {count} documents")


@app.command()
def info() -> None:
    """Print the compiled architectures, the loaded libraries, and reasons for missing ones."""
    for name, value in build_info().items():
        typer.echo(f"{name}: {value}")


@app.command()
def selftest(
    device: Annotated[Device, typer.Option(help="Device of the ops.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write, for a bug report.")
    ] = None,
) -> None:
    """Compare every op in every dtype with plain PyTorch, in error and time.

    Exit with 1 if an op is wrong.
    """
    from splade_fast.selftest import run_selftest

    outcomes = []
    with _exit_with_2_on_bad_input():
        for outcome in run_selftest(_select_device(device)):
            typer.echo(outcome.line)
            outcomes.append(outcome)
        wrong = [outcome for outcome in outcomes if not outcome.is_passed]
        if json_file is not None:
            report = {
                "build": build_info(),
                "platform": platform.platform(),
                "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
                "is_passed": not wrong,
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if wrong:
        typer.echo(f"{len(wrong)} of {len(outcomes)} results are wrong", err=True)
        raise typer.Exit(1)
    typer.echo(f"all {len(outcomes)} results are right")


@contextmanager
def _exit_with_2_on_bad_input() -> Iterator[None]:
    try:
        with _one_line_for_each_warning_of_data():
            yield
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        raise
    except (ImportError, OSError, ValueError, OtherRankError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def _advise_to_resume(index: Path, *, is_first: bool, should_resume: bool) -> Iterator[None]:
    """Print how an encoding can go on after an error or a signal, earlier or inside the block."""
    chunks = ChunkFolder.beside(index)
    if is_first and not should_resume and chunks.has_finished():
        typer.echo(
            f"{chunks.path} holds what an interrupted run has encoded, which this run replaces; "
            "--resume would go on with it",
            err=True,
        )
    try:
        yield
    except DataError:  # of the corpus, or of chunks that this run cannot go on with
        raise
    except BaseException:
        if is_first and chunks.has_finished():
            typer.echo(
                f"{chunks.path} keeps what is encoded: --resume goes on with it, and a run "
                "without --resume starts again",
                err=True,
            )
        raise


@contextmanager
def _one_line_for_each_warning_of_data() -> Iterator[None]:
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, DataWarning):
                typer.echo(f"Warning: {message}", err=True)
            else:
                show_others(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def _clean_up_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that the program removes its unfinished files.

    torchrun sends SIGTERM to the other processes when one has died.
    """

    def leave(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _select_device(kind: Device) -> torch.device:
    """Return the CPU, or the GPU with the number that torchrun gave this process."""
    if kind == "cpu":
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"--device cuda must have a GPU for each process, got {count} for LOCAL_RANK {number}"
        )
    return torch.device("cuda", number)


def _build_index(
    encoder: TextEncoder,
    texts: Texts,
    model: str,
    k: int | None,
    batch_size: int,
    max_length: int,
) -> Index:
    rows = encoder.encode(
        texts.texts,
        k=k,
        batch_size=batch_size,
        max_length=max_length,
        prompt_name=encoder.settings.prompt_for("document"),
    )
    return Index(rows, texts.ids, IndexMeta(resolve_model(model), max_length, k))


def _encode_queries(
    encoder: TextEncoder, queries: Texts, max_length: int, batch_size: int
) -> SparseRows:
    return encoder.encode(
        queries.texts,
        batch_size=batch_size,
        max_length=max_length,
        show_progress=False,
        prompt_name=encoder.settings.prompt_for("query"),
    )
