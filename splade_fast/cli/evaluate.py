"""`splade-fast evaluate`: measure a model on judged queries, and compare it with another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from splade_fast.cli.errors import clean_up_on_sigterm, exit_with_2_on_bad_input
from splade_fast.cli.options import (
    BatchSize,
    ChosenLength,
    Exhaustive,
    KeptEntries,
    OtherModel,
    QueryModel,
)
from splade_fast.encoders.text_encoder import TextEncoder, check_vocabularies
from splade_fast.ops.score import sparse_search
from splade_fast.search.index import Index, IndexMeta, resolve_model
from splade_fast.search.kept_index import KeptIndex
from splade_fast.search.models import load_encoders, load_query_encoder_of_index
from splade_fast.search.queries import encode_queries
from splade_fast.search.search_once import Search, search_once
from splade_fast.search.significance import (
    PerQuery,
    Test,
    compare_runs,
    read_per_query,
    write_per_query,
)
from splade_fast.search.texts import DataError, Texts, read_qrels, read_texts


def evaluate(
    queries: Annotated[str | None, typer.Option(help="File of queries.")] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="File of judgements, TREC or BEIR format.")
    ] = None,
    index: Annotated[Path | None, typer.Option(help="Folder written by `encode`.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus, instead of an index.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="BEIR folder or hub name such as a NanoBEIR set, instead of these files; "
            "NAME:SPLIT names a split. Repeat it for several sets and their mean."
        ),
    ] = None,
    model: OtherModel = None,
    query_model: QueryModel = None,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: ChosenLength = None,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids",
            help="Do not search the document that has the id of the query, as in BEIR.",
        ),
    ] = False,
    measures: Annotated[
        str | None,
        typer.Option(help="Measures of ir_measures; default: 'MRR@10 nDCG@10 Recall@100'."),
    ] = None,
    per_query: Annotated[
        Path | None, typer.Option(help="File to write, with the value of each query.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of --per-query of another run to compare with; two files are compared with "
            "each other, without a model."
        ),
    ] = None,
    test: Annotated[Test, typer.Option(help="Paired significance test of --compare.")] = "t",
    exhaustive: Exhaustive = False,
) -> None:
    """Print measures of a model on a corpus, an index or data sets.

    With --compare, print the means of both runs, their difference and its p-value.
    """
    from splade_fast.search.measures import Measures

    with exit_with_2_on_bad_input():
        chosen = Measures(None if measures is None else measures.split())
        if compare is not None and len(compare) == 2:
            _check_alone(queries, qrels, index, corpus, data, model)
            _print_comparisons(read_per_query(compare[0]), read_per_query(compare[1]), test)
            return
        if compare is not None and len(compare) > 2:
            raise DataError(f"give --compare once or twice, got {len(compare)} files")
        if index is not None and (k is not None or max_length is not None):
            raise DataError("give --k and --max-length with --corpus; an index has its own")
        options = _Options(
            model,
            query_model,
            k,
            batch_size,
            max_length or 256,
            ignore_identical_ids,
            chosen.depth,
            exhaustive,
        )
        if data:
            _check_alone(queries, qrels, index, corpus)
            found = _search_data(data, options, chosen.names)
        elif queries is None or qrels is None:
            raise DataError("give --queries and --qrels, or --data")
        else:
            found = {qrels.stem: _search_files(queries, qrels, index, corpus, options)}
        _print_means({name: chosen.means(*judged) for name, judged in found.items()})
        if per_query is not None or compare:
            values = {name: chosen.per_query(*judged) for name, judged in found.items()}
            if per_query is not None:
                write_per_query(per_query, values)
            if compare:
                _print_comparisons(values, read_per_query(compare[0]), test)


@dataclass(frozen=True)
class _Options:
    """Options of encoding and searching."""

    model: str | None
    query_model: str | None
    k: int | None
    batch_size: int
    max_length: int
    ignore_identical_ids: bool
    depth: int
    exhaustive: bool


Judged = tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]  # judgements and run


def _check_alone(*others: Any) -> None:
    if any(other is not None and other != [] for other in others):
        raise DataError(
            "give --data, or two files of --compare, without the options of other sources"
        )


def _search_files(
    queries: str, qrels: Path, index: Path | None, corpus: str | None, options: _Options
) -> Judged:
    """Return the judgements in a file, and the hits in an index or a corpus."""
    from splade_fast.search.evaluation import search_judged, select_judged, select_qrels

    if (index is None) == (corpus is None):
        raise DataError("give either --index or --corpus")
    judgements = read_qrels(qrels)
    judged = select_judged(read_texts(queries), judgements)
    kept = KeptIndex(index) if index is not None and not options.exhaustive else None
    if index is not None:
        searched = Index.load(index) if kept is None else kept.index
        judgements = select_qrels(judgements, judged.ids, searched.ids)
        encoder = load_query_encoder_of_index(
            searched, model=options.model, query_model=options.query_model
        )
    else:
        texts = read_texts(str(corpus))
        judgements = select_qrels(judgements, judged.ids, texts.ids)
        documents, encoder = _load_encoders(options, "--corpus")
        searched = _build_index(documents, texts, options)
    vectors = encode_queries(encoder, judged.texts, searched.meta.max_length, options.batch_size)
    with clean_up_on_sigterm():
        run = search_judged(
            judged.ids,
            vectors,
            searched.ids,
            searched.rows,
            depth=options.depth,
            ignore_identical_ids=options.ignore_identical_ids,
            search=_choose_search(options, kept),
        )
    return judgements, run


def _choose_search(options: _Options, kept: KeptIndex | None = None) -> Search:
    """Return the search of a folder if one is given, and of any documents otherwise."""
    if kept is not None:
        return lambda queries, _, k: kept.search(queries, k)
    return sparse_search if options.exhaustive else search_once


def _search_data(
    sources: Sequence[str], options: _Options, measures: Sequence[str]
) -> dict[str, Judged]:
    """Return the judgements of each source, and the hits in its corpus."""
    from splade_fast.search.retrieval_data import read_all_retrieval_data
    from splade_fast.training.evaluator import RetrievalEvaluator

    sets = read_all_retrieval_data(sources)
    encoder, query_encoder = _load_encoders(options, "--data")
    found = {}
    for name, data in sets.items():
        evaluator = RetrievalEvaluator.from_data(
            data,
            max_query_length=options.max_length,
            max_document_length=options.max_length,
            batch_size=options.batch_size,
            document_top_k=options.k,
            ignore_identical_ids=options.ignore_identical_ids,
            measures=measures,
        )
        vectors = evaluator.encode(encoder, query_encoder, show_progress=True)
        found[name] = evaluator.qrels, evaluator.search(*vectors, search=_choose_search(options))
    return found


def _load_encoders(options: _Options, source: str) -> tuple[TextEncoder, TextEncoder]:
    """Return the encoders of documents and queries."""
    if options.model is None:
        raise DataError(f"give --model with {source}")
    documents, queries = load_encoders(options.model, options.query_model)
    check_vocabularies(documents, queries)
    return documents, queries


def _build_index(encoder: TextEncoder, texts: Texts, options: _Options) -> Index:
    rows = encoder.encode(
        texts.texts,
        k=options.k,
        batch_size=options.batch_size,
        max_length=options.max_length,
        prompt_name=encoder.settings.prompt_for("document"),
    )
    meta = IndexMeta(resolve_model(options.model or ""), options.max_length, options.k)
    return Index(rows, texts.ids, meta)


def _print_means(means: Mapping[str, Mapping[str, float]]) -> None:
    """Print lines `measure<TAB>value`, or a table of several sets and their mean."""
    if len(means) == 1:
        [values] = means.values()
        for name, value in values.items():
            typer.echo(f"{name}\t{value:.4f}")
        return
    from splade_fast.training.evaluator import mean_of_sets

    rows = {**means, "mean": mean_of_sets(means)}
    typer.echo("\t".join(["data", *rows["mean"]]))
    for name, values in rows.items():
        typer.echo("\t".join([name, *(f"{value:.4f}" for value in values.values())]))


def _print_comparisons(
    runs: Mapping[str, PerQuery], others: Mapping[str, PerQuery], test: Test
) -> None:
    """Print a line for each set and measure: both means, their difference and its p-value."""
    shared = [name for name in runs if name in others]
    if not shared:
        raise DataError(
            f"both runs must have data in common, got {', '.join(runs)} and {', '.join(others)}"
        )
    typer.echo("data\tmeasure\tqueries\tmean\tother mean\tdifference\tp")
    for name in shared:
        for found in compare_runs(runs[name], others[name], test=test):
            typer.echo(
                f"{name}\t{found.measure}\t{found.queries}\t{found.mean:.4f}\t"
                f"{found.other_mean:.4f}\t{found.difference:+.4f}\t{found.p_value:.4g}"
            )
