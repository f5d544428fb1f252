"""`splade-fast mine`: write hard negatives of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splade_fast.cli.errors import (
    advise_to_resume,
    clean_up_on_sigterm,
    exit_with_2_on_bad_input,
    refuse_torchrun,
)
from splade_fast.cli.options import (
    BatchSize,
    ChosenLength,
    Device,
    KeptEntries,
    OtherModel,
    QueryModel,
    Resume,
    select_device,
)
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.recipe.negatives import NegativeRules, Sampling
from splade_fast.recipe.part_files import PartFiles
from splade_fast.search.index import Index
from splade_fast.search.models import load_encoders, load_query_encoder_of_index
from splade_fast.search.texts import DataError

_RULES = NegativeRules()


def mine(
    out: Annotated[Path, typer.Argument(help="File to write, of JSON lines; must not exist.")],
    queries: Annotated[Path | None, typer.Option(help="File of queries; needs --qrels.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="File of documents.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="File of judgements of the queries.")] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="Training pairs, instead of --queries and --qrels."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Index of the corpus by `encode`; by default it is encoded.")
    ] = None,
    model: OtherModel = None,
    query_model: QueryModel = None,
    num_negatives: Annotated[
        int, typer.Option(min=1, help="Negatives of each query and positive.")
    ] = _RULES.num_negatives,
    min_negatives: Annotated[
        int | None,
        typer.Option(min=1, help="Leave pairs with fewer out; default: --num-negatives."),
    ] = None,
    first_rank: Annotated[
        int, typer.Option(min=1, help="Rank of the first hit that may be a negative.")
    ] = _RULES.first_rank,
    last_rank: Annotated[int, typer.Option(min=1, help="Rank of the last.")] = _RULES.last_rank,
    relative_margin: Annotated[
        float | None,
        typer.Option(help="A negative scores at most (1 - margin) times the positive's score."),
    ] = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="A negative scores at most the positive's score - margin.")
    ] = None,
    max_score: Annotated[float | None, typer.Option(help="Largest score of a negative.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Least score of a negative.")] = None,
    sampling: Annotated[
        Sampling, typer.Option(help="The first hits that are left, or random ones.")
    ] = _RULES.sampling,
    seed: Annotated[int, typer.Option(help="Seed of --sampling random.")] = _RULES.seed,
    min_relevance: Annotated[
        int, typer.Option(min=1, help="Least relevance of a positive.")
    ] = _RULES.min_relevance,
    ids_only: Annotated[bool, typer.Option("--ids-only", help="Write ids without texts.")] = False,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: ChosenLength = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Queries searched at a time.")] = 1024,
    device: Annotated[Device, typer.Option(help="Device of the model and the search.")] = "cpu",
    resume: Resume = False,
) -> None:
    """Write hard negatives: documents that a model ranks high, though they are not relevant.

    Each line holds a query, a positive and negatives, for `train` and `score`. The command prints
    the number of hits that each guard dropped.
    """
    with exit_with_2_on_bad_input():
        refuse_torchrun("mine")
        from splade_fast.recipe.mine import mine_hard_negatives
        from splade_fast.recipe.tasks import MiningTask

        if index is not None and (k is not None or max_length is not None):
            raise DataError("give --k and --max-length without --index; an index has its own")
        if pairs is not None:
            if queries is not None or qrels is not None:
                raise DataError("give either --pairs or --queries and --qrels")
            task = MiningTask.from_pairs(pairs, corpus)
        elif queries is not None and corpus is not None and qrels is not None:
            task = MiningTask.from_judgements(queries, corpus, qrels)
        else:
            raise DataError("give --queries, --corpus and --qrels together, or --pairs")
        encoder, query_encoder = _load_encoders(index, model, query_model)
        place = select_device(device)
        rules = NegativeRules(
            num_negatives=num_negatives,
            min_negatives=min_negatives,
            first_rank=first_rank,
            last_rank=last_rank,
            relative_margin=relative_margin,
            absolute_margin=absolute_margin,
            max_score=max_score,
            min_score=min_score,
            sampling=sampling,
            seed=seed,
            min_relevance=min_relevance,
        )
        with clean_up_on_sigterm(), advise_to_resume(PartFiles(out), "mined", should_resume=resume):
            report = mine_hard_negatives(
                encoder.to(place),
                task,
                out,
                rules,
                query_encoder=query_encoder.to(place),
                index=index,
                has_texts=not ids_only,
                k=k,
                batch_size=batch_size,
                max_length=max_length or 256,
                chunk_size=chunk_size,
                resume=resume,
            )
        for line in report.lines():
            typer.echo(line)


def _load_encoders(
    index: Path | None, model: str | None, query_model: str | None
) -> tuple[TextEncoder, TextEncoder]:
    """Return the encoders of documents and queries; with an index, that of queries twice."""
    if index is not None:
        loaded = Index.load(index, should_check=False)  # mine_hard_negatives checks it
        encoder = load_query_encoder_of_index(loaded, model=model, query_model=query_model)
        return encoder, encoder
    if model is None:
        raise DataError("give --model, or an --index that knows its own")
    return load_encoders(model, query_model)
