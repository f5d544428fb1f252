"""Checksum of texts, which tells whether a run goes on with the data that it began with."""

from __future__ import annotations

import zlib
from collections.abc import Iterable


def count_and_checksum(records: Iterable[Iterable[str]]) -> tuple[int, int]:
    """Return the number of records, and a checksum of the texts in them."""
    count = crc = 0
    for record in records:
        crc = zlib.crc32(("\t".join(record) + "\n").encode("utf-8", "surrogatepass"), crc)
        count += 1
    return count, crc
