"""Loading of training data from files, folders, the hub and `datasets` objects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splade_fast._version import __version__
from splade_fast.search.source_files import check_rereadable
from splade_fast.search.texts import DataError
from splade_fast.training.data.layout import COLUMNS, Columns, Kind, Layout
from splade_fast.training.data.lines import LINE_FILES, read_layout_and_rows
from splade_fast.training.data.reader import ExampleReader, FileVersion

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

    The result has the columns of its kind, whatever their names in the source:

    - pairs: query, document
    - labelled pairs: query, document, label (a float from 0 to 1)
    - triples and hard negatives: query, document, negatives (a list of texts)
    - scored lists, for distillation: query, documents (a list of at least 2 texts), scores

    The names of these sources are known: sentence-transformers (anchor, positive, negative,
    negative_1, sentence1, sentence2, label, score), Tevatron (positive_passages,
    negative_passages), and lists pos and neg with pos_scores and neg_scores. The first of several
    positives is used. If an example has n negatives and n scores, a score is the margin of the
    positive over a negative; the margins become the scores 0, -margin. Other columns are ignored.

    A .tsv file needs no header. Two columns are query and document. Three columns are query,
    positive and negative, or query, document and label if the third field of the first line is a
    number. The first line is a header if all its fields are known names, or if it names a query and
    a document; other columns are then ignored.

    Args:
        source: a file (.tsv, .jsonl, .csv, .json or .parquet, each also with .gz), a folder of such
            files or from save_to_disk, a name on the hub, or an object of `datasets`.
        split: split to read of a folder or name with several splits.
        streaming: whether to read row by row during the training. Otherwise all rows are converted
            first, into memory-mapped files.
        columns: {name: part} for columns whose names do not tell the part, or a list of parts for a
            .tsv, whose header they replace. The parts are query, document, negatives, documents,
            label, scores, positive_scores and negative_scores; "-" ignores a column.
        queries: file for `splade_fast.search.texts.read_texts` with the texts of the queries, if
            the source holds ids, as MS MARCO's triples do. The texts are kept in memory. Prefer
            streaming=True, since the conversion would write a text once for each of its examples.
        corpus: file with the texts of the documents, likewise.
        negatives_per_query: number of negatives that each example must have at least; a scored list
            must have one document more.
        config: configuration of a name on the hub.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` with streaming=True or from a stream.

    Raises:
        DataError: the source is missing or a pipe, its columns are unknown, or a row is bad: an
            empty text, a label out of range, lists of different lengths, too few negatives. The
            message names the line or row. With streaming a row is checked when it is read.
        ImportError: `datasets` is not installed.

    Example::

        >>> from pathlib import Path
        >>> _ = Path("pairs.tsv").write_text("quick fox\\ta quick brown fox\\n")
        >>> from splade_fast.training import load_training_data
        >>> list(load_training_data("pairs.tsv", streaming=True))
        [{'query': 'quick fox', 'document': 'a quick brown fox'}]
    """
    datasets = import_datasets()
    if columns is not None and not isinstance(columns, Mapping):
        columns = tuple(columns)
    reader = ExampleReader(
        columns,
        None if queries is None else FileVersion.read(queries),
        None if corpus is None else FileVersion.read(corpus),
        negatives_per_query,
    )
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        suffixes = path.name.lower().removesuffix(".gz")
        if suffixes.endswith(LINE_FILES):
            return _load_lines(reader, path, split, streaming)
        if suffixes.endswith(tuple(_BUILDERS)):
            source = _load_file(path, _BUILDERS[Path(suffixes).suffix], split, streaming)
        else:
            source = _load_folder_or_name(path, os.fspath(source), split, config, streaming)
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
    return _convert_dataset(reader, source, name)


def import_datasets() -> Any:
    """Return the module `datasets`.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "training data needs the package datasets: pip install splade_fast[train]"
        ) from error
    return datasets


def _load_lines(
    reader: ExampleReader, path: Path, split: str, streaming: bool
) -> Dataset | IterableDataset:
    datasets = import_datasets()
    file = FileVersion.read(path)
    layout, _ = read_layout_and_rows(path, reader.columns, reader.lookups)
    arguments = {
        "generator": _generate_examples,
        "features": _make_features(layout.kind),
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


def _generate_examples(
    reader: ExampleReader, file: FileVersion, version: str
) -> Iterator[dict[str, Any]]:
    # datasets caches the result by the arguments, so `version` is one though it is not used.
    layout, rows = read_layout_and_rows(Path(file.path), reader.columns, reader.lookups)
    for place, record in rows:
        yield reader.convert(record, layout, place)


def _load_file(path: Path, builder: str, split: str, streaming: bool) -> Any:
    datasets = import_datasets()
    check_rereadable(path)
    files = {split: str(path)}
    try:
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error.__cause__ or error
        if isinstance(reason, OSError) and reason.errno is not None:
            raise reason from None  # such as a full disk
        raise DataError(f"{path} must be a whole {builder} file: {reason}") from error


def _load_folder_or_name(
    path: Path, name: str, split: str, config: str | None, streaming: bool
) -> Any:
    datasets = import_datasets()
    if path.exists() and not path.is_dir():
        check_rereadable(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)  # memory-mapped
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(
            f"{name} must be a file, a folder of data or a dataset on the hub: "
            f"{error.__cause__ or error}"
        ) from error


def _convert_dataset(
    reader: ExampleReader, source: Dataset | IterableDataset, name: str
) -> Dataset | IterableDataset:
    names = source.column_names
    if names is None:  # a stream whose columns only its rows tell
        try:
            names = list(next(iter(source), {}))
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
    if not names:
        raise DataError(f"{name} must hold at least one example, got none")
    try:
        layout = reader.infer_layout(names)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return source.map(
        _RowConverter(reader, layout, name),
        with_indices=True,
        remove_columns=names,
        features=_make_features(layout.kind),
    )


@dataclass(frozen=True)
class _RowConverter:
    """Function that `map` applies to every row and its number, from 0."""

    reader: ExampleReader
    layout: Layout
    name: str

    def __call__(self, record: Mapping[str, Any], number: int) -> dict[str, Any]:
        return self.reader.convert(record, self.layout, f"{self.name}, row {number}")


def _make_features(kind: Kind) -> Features:
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
