"""Comparison of numbered files with the files of an export in one piece."""

from itertools import groupby

import numpy as np
import pyarrow as pa
import scipy.sparse
from pyarrow import parquet

from splade_fast.export.formats import FORMATS


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_joined(folder, whole, name):
    """Assert that the numbered files of a format hold what the files of `whole` hold."""
    shared = set(FORMATS[name].shared)
    numbered = sorted(path for path in folder.iterdir() if path.name not in shared)
    groups = {stem: list(files) for stem, files in groupby(numbered, _stem)}
    assert groups.keys() | shared == {path.name for path in whole.iterdir()}
    for file, parts in groups.items():
        assert [path.stem[-6:] for path in parts] == [f"{n:06}" for n in range(len(parts))]
        _assert_same(parts, whole / file)
    for file in shared:
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def _stem(path):
    return path.stem[:-7] + path.suffix


def _assert_same(parts, whole):
    if whole.suffix == ".parquet":
        tables = [parquet.read_table(part) for part in parts]
        expected = parquet.read_table(whole)
        assert pa.concat_tables(tables).equals(expected)
        assert all(table.schema.equals(expected.schema, check_metadata=True) for table in tables)
    elif whole.suffix == ".npz":
        joined = scipy.sparse.vstack([scipy.sparse.load_npz(part) for part in parts])
        expected = scipy.sparse.load_npz(whole)
        for array in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(joined, array), getattr(expected, array))
    elif whole.suffix == ".json":
        texts = [part.read_text()[1:-1] for part in parts]
        assert "[" + ", ".join(text for text in texts if text) + "]" == whole.read_text()
    else:
        assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()
