"""RetrievalData: queries, corpus and judgements of a BEIR folder or of a data set on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splade_fast.search.lines import quote_start
from splade_fast.search.qrels import Qrels, parse_judgement, read_qrels
from splade_fast.search.texts import DataError, Texts, parse_text_record, read_texts

# Configurations of data sets on the hub. MTEB's call the judgements "default".
_JUDGEMENTS = ("qrels", "default")


@dataclass
class RetrievalData:
    """Queries, a corpus and judgements, with a name for tables."""

    name: str
    queries: Texts
    corpus: Texts
    qrels: Qrels


def read_retrieval_data(source: str | os.PathLike[str]) -> RetrievalData:
    """Read a BEIR folder or a data set of that layout.

    A BEIR folder holds `corpus.jsonl`, `queries.jsonl` and a file in `qrels` for each split, also
    with .gz. A data set, on the hub or in a folder that `datasets` loads, has the configurations
    `corpus`, `queries` and `qrels` or `default`, as NanoBEIR and the sets of MTEB have.

    Args:
        source: folder or hub name. `SOURCE:SPLIT` names the split of the judgements, such as
            `scifact:train`; without it, it is test, or the only one.

    Raises:
        DataError: there is no such source, a file is damaged, or the split is missing.
        ImportError: `datasets` is not installed, for a data set.

    Example::

        >>> from pathlib import Path
        >>> from splade_fast.search.retrieval_data import read_retrieval_data
        >>> Path("nano/qrels").mkdir(parents=True)
        >>> _ = Path("nano/corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "fox"}')
        >>> _ = Path("nano/queries.jsonl").write_text('{"_id": "q1", "text": "a fox"}')
        >>> _ = Path("nano/qrels/test.tsv").write_text("q1\\td1\\t1")
        >>> read_retrieval_data("nano").qrels
        {'q1': {'d1': 1}}
    """
    name, split = _split_name(os.fspath(source))
    folder = Path(name)
    label = folder.name or name
    label = label if split is None else f"{label}:{split}"
    if _find(folder, "corpus.jsonl") is None:
        return _load_data_set(name, split, label)
    queries = _find(folder, "queries.jsonl")
    if queries is None:
        raise DataError(f"{name} must hold queries.jsonl beside corpus.jsonl, got none")
    files = {
        file.name.removesuffix(".gz").removesuffix(".tsv"): file
        for file in sorted((folder / "qrels").glob("*"))
        if file.name.removesuffix(".gz").endswith(".tsv")
    }
    qrels = files[_choose_split(list(files), split, "qrels", name)]
    corpus = _find(folder, "corpus.jsonl")
    assert corpus is not None
    return RetrievalData(label, read_texts(queries), read_texts(corpus), read_qrels(qrels))


def read_all_retrieval_data(sources: Sequence[str]) -> dict[str, RetrievalData]:
    """Read several sources, by name.

    Sources of one name, as where two folders have the same, go by their whole source.

    Raises:
        DataError: see `read_retrieval_data`; or a source is given twice.
    """
    if len(set(sources)) < len(sources):
        raise DataError(f"each source must be given once, got {', '.join(sources)}")
    found = [read_retrieval_data(source) for source in sources]
    names = [data.name for data in found]
    for source, data in zip(sources, found, strict=True):
        if names.count(data.name) > 1:
            data.name = source
    return {data.name: data for data in found}


def _split_name(source: str) -> tuple[str, str | None]:
    """Return the name and the split of `NAME:SPLIT`."""
    name, colon, split = source.rpartition(":")
    if Path(source).exists() or not colon or not name or "/" in split or "\\" in split:
        return source, None
    return name, split


def _find(folder: Path, name: str) -> Path | None:
    """Return the file of a name in a folder, compressed or not."""
    return next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)


def _choose_split(splits: list[str], wanted: str | None, role: str, name: str) -> str:
    """Return the split of a role: the wanted, the one of the role's name, test, or the only one."""
    if role == "qrels" and wanted is not None and wanted not in splits:
        raise DataError(
            f"the split of {name} must be one of {', '.join(splits) or 'none'}, got {wanted!r}"
        )
    choices = [one for one in (wanted, role, "test") if one in splits]
    if choices:
        return str(choices[0])
    if len(splits) != 1:
        raise DataError(
            f"{role} of {name} must have one split, test or a named one ({name}:SPLIT), "
            f"got {', '.join(splits) or 'none'}"
        )
    return splits[0]


def _load_data_set(name: str, split: str | None, label: str) -> RetrievalData:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} needs the package datasets: pip install splade_fast[train]"
        ) from error
    try:
        configurations = datasets.get_dataset_config_names(name)
        roles = {role: role for role in ("queries", "corpus") if role in configurations}
        judgements = [role for role in _JUDGEMENTS if role in configurations]
        if len(roles) < 2 or not judgements:
            raise DataError(
                f"{name} must have the configurations corpus, queries and qrels or default, "
                f"got {', '.join(configurations) or 'none'}"
            )
        roles["qrels"] = judgements[0]
        parts = {role: datasets.load_dataset(name, config) for role, config in roles.items()}
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(
            f"{name} must be a BEIR folder or a data set on the hub: {error.__cause__ or error}"
        ) from error
    rows = {
        role: part[_choose_split(list(part), split, role, name)] for role, part in parts.items()
    }
    return RetrievalData(
        label,
        _read_texts_of_rows(rows["queries"], f"queries of {name}"),
        _read_texts_of_rows(rows["corpus"], f"corpus of {name}"),
        _read_judgements_of_rows(rows["qrels"], f"qrels of {name}"),
    )


def _read_texts_of_rows(rows: Any, place: str) -> Texts:
    texts = Texts([], [])
    for where, row in _iterate_rows(rows, place):
        try:
            text_id, text = parse_text_record(row, quote_start(str(row)))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        texts.ids.append(text_id)
        texts.texts.append(text)
    return Texts(texts.ids, texts.texts)  # checks that no id is repeated


def _read_judgements_of_rows(rows: Any, place: str) -> Qrels:
    qrels: Qrels = {}
    for where, row in _iterate_rows(rows, place):
        try:
            query, document, relevance = parse_judgement(row, quote_start(str(row)))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        qrels.setdefault(query, {})[document] = relevance
    return qrels


def _iterate_rows(rows: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows):
        yield f"{place}, row {number}", row
