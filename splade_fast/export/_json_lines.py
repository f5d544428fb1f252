"""Vectors as JSON text, written by templates: json.dumps takes several times as long."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import Documents
from splade_fast.ops.sparse_rows import SparseRows


def token_names(
    id_to_token: Sequence[str] | Mapping[int, str] | None,
    num_cols: int,
    fits: Callable[[str], bool] = bool,
) -> list[str]:
    """A name for each column; `[#c]` for a column c whose token is missing or does not fit.

    Args:
        id_to_token: names of the columns, e.g. `tokenizer.convert_ids_to_tokens(range(V))`; None
            names them by their numbers.
        num_cols: V.
        fits: whether the format can hold a name.

    Raises:
        ValueError: two columns have the same name.
    """
    if id_to_token is None:
        return [str(column) for column in range(num_cols)]
    if isinstance(id_to_token, Mapping):
        tokens = [id_to_token.get(column) for column in range(num_cols)]
    else:
        tokens = [*id_to_token[:num_cols], *[None] * (num_cols - len(id_to_token))]
    names = [
        token if isinstance(token, str) and token and fits(token) else f"[#{column}]"
        for column, token in enumerate(tokens)
    ]
    if len(set(names)) != len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise ValueError(f"id_to_token must name every column differently, got {twice!r} twice")
    return names


def encoded(value: object) -> str:
    """One value as compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def number_format(rows: SparseRows) -> str:
    """As many digits as bring back the same numbers; 16-bit values are written as float32."""
    return "%.17g" if rows.dtype == torch.float64 else "%.9g"


def templates(names: Sequence[str], number: str) -> list[str]:
    """`"name":%…` for each name, to be filled with a number."""
    return [encoded(name).replace("%", "%%") + ":" + number for name in names]


def named_vectors(chunk: Documents, fields: Sequence[str]) -> Iterator[str]:
    """{"token":weight,…} of each document, by ascending column; `fields` are from `templates`."""
    columns, values, bounds = chunk.columns.tolist(), chunk.values.tolist(), chunk.bounds()
    for start, stop in pairwise(bounds):
        template = ",".join([fields[column] for column in columns[start:stop]])
        yield "{" + template % tuple(values[start:stop]) + "}"


def write_lines(path: Path, lines_of_chunks: Iterable[Iterable[str]]) -> int:
    """Write lines to a file; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for lines in lines_of_chunks:
            written = list(lines)
            file.writelines(written)
            count += len(written)
    return count


def write_texts_and_vectors(
    path: str | os.PathLike[str], chunks: Iterable[Documents], fields: Sequence[str], text_key: str
) -> int:
    """A folder with `documents.jsonl`: lines {"id", text_key, "vector"}; extras are the texts."""
    with new_folder(path) as folder:
        return write_lines(
            folder / "documents.jsonl",
            (_text_and_vector_lines(chunk, fields, text_key) for chunk in chunks),
        )


def _text_and_vector_lines(chunk: Documents, fields: Sequence[str], text_key: str) -> Iterator[str]:
    vectors = named_vectors(chunk, fields)
    for id_, text, vector in zip(chunk.ids, chunk.extras, vectors, strict=True):
        yield f'{{"id":{encoded(str(id_))},"{text_key}":{encoded(text or "")},"vector":{vector}}}\n'
