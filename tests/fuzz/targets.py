"""Functions that the coverage-guided fuzzer calls with bytes; an exception is a finding."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.calls import CALLS
from tests.fuzz.files import (
    INDEX_FILES,
    load_index_or_refuse,
    load_or_refuse,
    load_search_file_or_refuse,
)
from tests.fuzz.inputs import DrawsOfBytes
from tests.fuzz.refusals import call_with_arguments_that_do_not_fit
from tests.fuzz.results import assert_same_as_plain_pytorch

BETWEEN_FILES = b"\n----\n"


def rows_file(content: bytes) -> None:
    load_or_refuse(content)


def index_folder(content: bytes) -> None:
    parts = content.split(BETWEEN_FILES, len(INDEX_FILES) - 1)
    parts += [b""] * (len(INDEX_FILES) - len(parts))
    load_index_or_refuse(dict(zip(INDEX_FILES, parts, strict=True)))


def search_file(content: bytes) -> None:
    load_search_file_or_refuse(content)


def entry_points(content: bytes) -> None:
    draws = DrawsOfBytes(content)
    call_with_arguments_that_do_not_fit(draws.choice(list(CALLS)), draws)


def results(content: bytes) -> None:
    draws = DrawsOfBytes(content)
    assert_same_as_plain_pytorch(draws.choice(list(CALLS)), draws)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (rows_file, index_folder, search_file, entry_points, results)
}
