"""Checks of document ids, before anything is written."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

DocumentId = str | int


def plain_ids(
    ids: Iterable[Any],
    count: int,
    *,
    max_bytes: int | None = None,
    allows_white_space: bool = True,
    to_stored: Callable[[DocumentId], DocumentId] = str,
) -> list[DocumentId]:
    """Return the ids as str and int. Raise for the first id that a format cannot hold.

    Args:
        ids: strings and integers, also those of NumPy.
        count: number of rows.
        max_bytes: largest size of an id in UTF-8.
        allows_white_space: whether an id may contain white space.
        to_stored: function that returns what the format stores for an id; no two may be equal.

    Raises:
        TypeError: an id is neither a string nor an integer.
        ValueError: there is not one id for each row, or an id is empty, not Unicode, too long, has
            white space, or equals another.
    """
    if isinstance(ids, str | bytes):
        raise TypeError(f"ids must be a list of ids, got {type(ids).__name__}")
    found = [plain_id(id_, f" in row {row}") for row, id_ in enumerate(ids)]
    if len(found) != count:
        raise ValueError(f"ids must be one per row, {count}, got {len(found)}")
    for row, id_ in enumerate(found):
        _check_text(str(id_), row, max_bytes, allows_white_space)
    _check_unique(found, to_stored)
    return found


def plain_id(id_: Any, place: str = "") -> DocumentId:
    """Return an id as str or int. Raise TypeError, with the place of the id, if it is neither."""
    if isinstance(id_, str):
        return str(id_)
    if not isinstance(id_, bool):
        try:
            return operator.index(id_)
        except TypeError:
            pass
    raise TypeError(f"ids must be strings or integers, got {type(id_).__name__}{place}")


def _check_text(text: str, row: int, max_bytes: int | None, allows_white_space: bool) -> None:
    if not text:
        raise ValueError(f"ids must not be empty, got '' in row {row}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(
            f"ids must be text that UTF-8 can encode, got {reprlib.repr(text)} in row {row}"
        ) from None
    if max_bytes is not None and size > max_bytes:
        raise ValueError(
            f"ids must have at most {max_bytes} bytes for this format, "
            f"got {size} bytes in row {row}, {reprlib.repr(text)}"
        )
    if not allows_white_space and text.split() != [text]:
        raise ValueError(
            f"ids must have no white space for this format, got {reprlib.repr(text)} in row {row}"
        )


def _check_unique(ids: list[DocumentId], to_stored: Callable[[DocumentId], DocumentId]) -> None:
    first_rows: dict[DocumentId, int] = {}
    for row, id_ in enumerate(ids):
        try:
            stored = to_stored(id_)
        except ValueError as error:
            raise ValueError(f"{error} in row {row}") from error
        first = first_rows.setdefault(stored, row)
        if first != row:
            same = "" if stored == id_ == ids[first] else f", which are both stored as {stored!r}"
            raise ValueError(
                f"ids must be unique, got {ids[first]!r} in row {first} "
                f"and {id_!r} in row {row}{same}"
            )
