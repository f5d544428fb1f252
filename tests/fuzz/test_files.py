"""Damaged index files are refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.fuzz.files import (
    build_file,
    load_index_or_refuse,
    load_or_refuse,
    load_search_file_or_refuse,
    sound_file,
    sound_index,
    sound_search_file,
)

SOUND = sound_file()
SOUND_INDEX = sound_index()
SOUND_SEARCH_FILE = sound_search_file()
TENSORS = {
    "indices": torch.tensor([[0, 2]], dtype=torch.int32),
    "values": torch.tensor([[1.0, 2.0]]),
    "lengths": torch.tensor([2], dtype=torch.int32),
}
HEADER = {"format": "splade_fast.SparseRows", "version": 1, "num_cols": 3}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_sound_files_load():
    assert load_or_refuse(SOUND) is not None
    assert load_index_or_refuse(SOUND_INDEX) is not None
    assert load_search_file_or_refuse(SOUND_SEARCH_FILE) is not None


@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=8))
def test_changed_bytes(changes):
    content = bytearray(SOUND)
    for place, byte in changes:
        content[place] = byte
    load_or_refuse(bytes(content))


@given(st.integers(0, len(SOUND)), st.binary(max_size=20))
def test_cut_short_or_longer(length, more):
    rows = load_or_refuse(SOUND[:length] + more)
    assert rows is None or SOUND[:length] + more == SOUND


@given(st.binary(max_size=200))
def test_any_bytes(content):
    assert load_or_refuse(content) is None


@given(json_values | st.text())
@example({"format": "splade_fast.SparseRows"})
@example([])
def test_any_header(header):
    load_or_refuse(build_file(TENSORS, header))


@pytest.mark.parametrize("name", sorted(TENSORS))
@given(st.data())
def test_any_tensor(name, data):
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.float32, torch.bool]))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    entries = data.draw(st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 3, 2**31 - 1]))
    tensors = {**TENSORS, name: torch.full(shape, entries).to(dtype)}
    load_or_refuse(build_file(tensors, HEADER))


@given(json_values, st.sampled_from(["ids.json", "meta.json"]), st.booleans())
@example({"format_version": 1}, "meta.json", True)
@example({"model": 1, "max_length": 256, "k": None, "format_version": 1}, "meta.json", True)
def test_any_part_of_an_index(content, name, well_formed):
    text = json.dumps(content) if well_formed else repr(content)
    load_index_or_refuse({**SOUND_INDEX, name: text.encode("utf-8", "surrogatepass")})


@given(st.lists(st.tuples(st.integers(0, len(SOUND_SEARCH_FILE) - 1), st.integers(0, 255))))
def test_changed_bytes_of_a_search_file(changes):
    content = bytearray(SOUND_SEARCH_FILE)
    for place, byte in changes:
        content[place] = byte
    load_search_file_or_refuse(bytes(content))


@given(st.data())
def test_changed_numbers_of_a_search_file(data):
    tensors = load(SOUND_SEARCH_FILE)
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].view(-1)
    place = data.draw(st.integers(0, len(flat) - 1))
    entry = data.draw(st.sampled_from([-(2**31), -1, 0, 1, 2, 31, 32, 255, 2**31 - 1]))
    flat[place] = torch.tensor(entry).to(flat.dtype)
    header = {"format": "splade_fast.SparseIndex", "version": 1, "num_cols": 3}
    load_search_file_or_refuse(save(tensors, metadata={"sparse_index": json.dumps(header)}))


@given(st.integers(0, len(SOUND_SEARCH_FILE)), st.binary(max_size=20))
def test_search_files_cut_short_or_longer(length, more):
    content = SOUND_SEARCH_FILE[:length] + more
    assert load_search_file_or_refuse(content) is None or content == SOUND_SEARCH_FILE
