"""Numbers and names of columns: as keys of dicts, and as tokens of a vocabulary."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile("[0-9]{1,10}")  # columns are int32
_NAME_OF_NUMBER = re.compile(rf"\[#({_NUMBER.pattern})\]")
TokenNames = Sequence[str | None] | Mapping[int, str]


def column_number(key: Any) -> int | None:
    """Return the number that an integer or its decimal text names; None for anything else.

    JSON turns the keys of objects to text, and NumPy and torch have integers of their own.
    """
    if type(key) is int:
        return key
    if isinstance(key, bool):
        return None
    if isinstance(key, str):
        return int(key) if _NUMBER.fullmatch(key) else None
    try:
        return operator.index(key)
    except TypeError:
        return None


def number_in_name(name: Any) -> int | None:
    """Return c for the name `[#c]`, which `name_columns` gives; None for anything else."""
    match = _NAME_OF_NUMBER.fullmatch(name) if isinstance(name, str) else None
    return None if match is None else int(match[1])


def name_columns(
    id_to_token: TokenNames,
    num_cols: int,
    is_usable: Callable[[str], bool] = bool,
) -> list[str]:
    """Return a name for each column: its token, or `[#c]` for column c without a usable token.

    Args:
        id_to_token: names of the columns, e.g. `tokenizer.convert_ids_to_tokens(range(V))`. It may
            name fewer columns than there are, as where a model pads its vocabulary.
        num_cols: number of columns, V.
        is_usable: function that returns whether a name can be used.

    Raises:
        TypeError: a name is neither a string nor None, or the key of a mapping is not an integer.
        ValueError: two columns have the same name.
    """
    names = [
        token if token and is_usable(token) else f"[#{column}]"
        for column, token in enumerate(_tokens(id_to_token, num_cols))
    ]
    if len(set(names)) != len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise ValueError(f"id_to_token must name every column differently, got {twice!r} twice")
    return names


def _tokens(id_to_token: TokenNames, num_cols: int) -> list[str | None]:
    """Return the token of each column, None where it has none."""
    tokens: list[str | None] = [None] * num_cols
    pairs: Iterable[tuple[Any, Any]] = (
        id_to_token.items() if isinstance(id_to_token, Mapping) else enumerate(id_to_token)
    )
    for key, token in pairs:
        column = column_number(key)
        if column is None:
            raise TypeError(f"id_to_token must have columns as keys, got {key!r}")
        if not isinstance(token, str | None):
            got = type(token).__name__
            raise TypeError(f"id_to_token must name columns by strings, got {got} for {key!r}")
        if 0 <= column < num_cols:
            tokens[column] = token
    return tokens
