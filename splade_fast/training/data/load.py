"""Training data from files, folders, the hub and `datasets` objects, in one common form."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splade_fast._version import __version__
from splade_fast.search.texts import DataError, read_texts
from splade_fast.training.data.columns import (
    COLUMNS,
    Columns,
    Kind,
    Layout,
    Lookups,
    layout_of,
    row_of,
)
from splade_fast.training.data.lines import LINE_FILES, layout_and_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

_BUILDERS = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def load_training_data(
    source: str | os.PathLike[str] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    split: str = "train",
    streaming: bool = False,
    columns: Columns | None = None,
    queries: str | os.PathLike[str] | None = None,
    corpus: str | os.PathLike[str] | None = None,
    negatives_per_query: int | None = None,
    config: str | None = None,
) -> Dataset | IterableDataset:
    """Read examples of one kind: pairs, labelled pairs, hard negatives or scored lists.

    Whatever the source calls its columns, the result has those of its kind:

    - pairs: query, document
    - labelled pairs: query, document, label (a float from 0 to 1)
    - triples and hard negatives: query, document, negatives (a list of texts)
    - scored lists, for distillation: query, documents (a list of at least 2 texts), scores

    The usual names are understood: those of sentence-transformers (anchor, positive, negative,
    negative_1, sentence1, sentence2, label, score), Tevatron (positive_passages,
    negative_passages) and lists of pos and neg with pos_scores and neg_scores. Of several
    positives the first counts. One score beside n negatives for each of them is the margin by which
    the positive is better, and becomes the scores 0, -margin. Other columns are ignored.

    A .tsv file needs no header. Two columns are query and document; three are query, positive and
    negative, or with a number in the third one of the first line, query, document and label. It has
    a header if its first line is made of known names alone.

    Args:
        source: a file (.tsv, .jsonl, .csv, .json, .parquet, also followed by .gz), a folder written
            by save_to_disk or full of such files, a name on the hub, or an object of `datasets`.
        split: which one of a folder or name, where there are several.
        streaming: read while training, row by row, instead of converting everything first into
            memory-mapped files.
        columns: what the source's columns hold, if the names do not tell: {name: one of query,
            document, negatives, documents, label, scores, positive_scores, negative_scores}, or for
            a .tsv without a header a list of those; "-" ignores a column.
        queries, corpus: files for `splade_fast.search.texts.read_texts`: the queries or
            documents of the source are ids of their texts (MS MARCO's triples of ids, for
            example). They are held in memory; take streaming=True, or every text is
            written once for every example it is in.
        negatives_per_query: how many negatives each example must have at least; of a scored list
            one document more.
        config: which configuration of a name on the hub.

    Returns:
        A `datasets.Dataset`, or with streaming (or from such an object) an `IterableDataset`.

    Raises:
        DataError: nothing there, unknown columns, or a bad row: an empty text, a label out of
            range, lists of different lengths, too few negatives. Names the line or row. When
            streaming, rows are checked as they are read.
        ImportError: `datasets` is not installed.
    """
    datasets = import_datasets()
    if columns is not None and not isinstance(columns, Mapping):
        columns = tuple(columns)
    reader = _Reader(columns, _stamp(queries), _stamp(corpus), negatives_per_query)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        suffixes = path.name.lower().removesuffix(".gz")
        if suffixes.endswith(LINE_FILES):
            return _from_lines(reader, path, split, streaming)
        if suffixes.endswith(tuple(_BUILDERS)):
            if not path.is_file():
                raise DataError(f"no such file: {path}")
            builder = _BUILDERS[Path(suffixes).suffix]
            files = {split: str(path)}
            source = datasets.load_dataset(
                builder, data_files=files, split=split, streaming=streaming
            )
        else:
            source = _folder_or_name(path, os.fspath(source), split, config, streaming)
        name = str(path)
    else:
        name = "the dataset"
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in source:
            raise DataError(f"split must be one of {', '.join(source)}, got {split!r}")
        source = source[split]
    if not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            f"source must be a path, a name or an object of datasets, got {type(source).__name__}"
        )
    if streaming and isinstance(source, datasets.Dataset):
        source = source.to_iterable_dataset()
    return _from_dataset(reader, source, name)


def import_datasets() -> Any:
    """The `datasets` package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "training data needs the package datasets: pip install splade_fast[train]"
        ) from error
    return datasets


def kind_of(columns: Iterable[str]) -> Kind:
    """The kind of examples that have these columns, as load_training_data names them.

    Raises:
        DataError: they are those of no kind.
    """
    found = set(columns)
    for kind, expected in COLUMNS.items():
        if found == set(expected):
            return kind
    raise DataError(
        f"expected the columns of load_training_data, got {', '.join(sorted(found)) or 'none'}"
    )


@dataclass(frozen=True)
class _Stamp:
    """A file and what changes with its content, so that no cached result outlives it."""

    path: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> _Stamp:
        if not Path(path).is_file():
            raise DataError(f"no such file: {path}")
        found = Path(path).stat()
        return cls(os.fspath(path), found.st_size, found.st_mtime_ns)


def _stamp(path: str | os.PathLike[str] | None) -> _Stamp | None:
    return None if path is None else _Stamp.of(path)


@functools.lru_cache(maxsize=2)  # the queries and the corpus, once for all epochs
def _texts_of_ids(stamp: _Stamp) -> Mapping[str, str]:
    texts = read_texts(stamp.path)
    return dict(zip(texts.ids, texts.texts, strict=True))


@dataclass(frozen=True)
class _Reader:
    """Turns rows of a source into examples."""

    columns: Columns | None
    queries: _Stamp | None
    corpus: _Stamp | None
    negatives_per_query: int | None

    @property
    def ids(self) -> Lookups:
        return Lookups(
            None if self.queries is None else _texts_of_ids(self.queries),
            None if self.corpus is None else _texts_of_ids(self.corpus),
        )

    def layout(self, names: Iterable[str]) -> Layout:
        """Of a source whose columns have names."""
        if self.columns is not None and not isinstance(self.columns, Mapping):
            raise DataError("columns must be {name: part} for a source whose columns have names")
        return layout_of(names, renamed=self.columns, ids=self.ids)

    def example(self, record: Mapping[str, Any], layout: Layout, where: str) -> dict[str, Any]:
        try:
            row = row_of(record, layout, self.ids)
            self._check_negatives(row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return row

    def _check_negatives(self, row: dict[str, Any]) -> None:
        least = self.negatives_per_query
        if least is None:
            return
        found = len(row["documents"]) - 1 if "documents" in row else len(row.get("negatives", []))
        if found < least:
            raise DataError(f"expected at least {least} negatives, got {found}")


def _from_lines(
    reader: _Reader, path: Path, split: str, streaming: bool
) -> Dataset | IterableDataset:
    datasets = import_datasets()
    file = _Stamp.of(path)
    arguments = {
        "generator": _examples_of_file,
        "features": _features(layout_and_rows(path, reader.columns, reader.ids)[0].kind),
        "gen_kwargs": {"reader": reader, "file": file, "version": __version__},
        "split": datasets.Split(split),
    }
    if streaming:
        return datasets.IterableDataset.from_generator(**arguments)
    try:
        return datasets.Dataset.from_generator(**arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _examples_of_file(reader: _Reader, file: _Stamp, version: str) -> Iterator[dict[str, Any]]:
    # file and version: what a cached result depends on beside the reader
    layout, rows = layout_and_rows(Path(file.path), reader.columns, reader.ids)
    for where, record in rows:
        yield reader.example(record, layout, where)


def _folder_or_name(path: Path, name: str, split: str, config: str | None, streaming: bool) -> Any:
    """What a folder, or a name on the hub, holds."""
    datasets = import_datasets()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)  # memory-mapped
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} must be a file, a folder of data or a dataset on the hub: {error}"
        ) from error


def _from_dataset(
    reader: _Reader, source: Dataset | IterableDataset, name: str
) -> Dataset | IterableDataset:
    names = source.column_names
    if names is None:  # a stream whose rows alone tell
        names = list(next(iter(source), {}))
    if not names:
        raise DataError(f"{name} must hold at least one example, got none")
    try:
        layout = reader.layout(names)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return source.map(
        _Convert(reader, layout, name),
        with_indices=True,
        remove_columns=names,
        features=_features(layout.kind),
    )


@dataclass(frozen=True)
class _Convert:
    """The function that `map` applies to every row, numbered from 0."""

    reader: _Reader
    layout: Layout
    name: str

    def __call__(self, record: Mapping[str, Any], number: int) -> dict[str, Any]:
        return self.reader.example(record, self.layout, f"{self.name}, row {number}")


def _features(kind: Kind) -> Features:
    datasets = import_datasets()
    text, number = datasets.Value("string"), datasets.Value("float32")
    types = {
        "query": text,
        "document": text,
        "label": number,
        "negatives": datasets.List(text),
        "documents": datasets.List(text),
        "scores": datasets.List(number),
    }
    return datasets.Features({column: types[column] for column in COLUMNS[kind]})
