"""Inputs that the coverage-guided fuzzer has found, run as tests."""

from __future__ import annotations

import pytest

from tests.fuzz.seed_files import SEEDS, kept_inputs, pack, unpack
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs(target):
    inputs = kept_inputs(target)
    assert inputs
    for content in inputs:
        try:
            TARGETS[target](content)
        except Exception as error:
            raise AssertionError(f"{target} with the bytes {content.hex()}") from error


def test_every_kept_input_belongs_to_a_target():
    assert {path.name for path in SEEDS.iterdir()} == {f"{target}.txt" for target in TARGETS}


def test_they_are_unpacked_and_packed_for_libfuzzer(tmp_path, monkeypatch):
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr("tests.fuzz.seed_files.SEEDS", tmp_path / "seeds")
    (tmp_path / "seeds" / "rows_file.txt").write_text("00\n6162\n")
    unpack("rows_file", tmp_path / "folder")
    (tmp_path / "folder" / "another").write_bytes(b"ab")
    (tmp_path / "folder" / "new").write_bytes(b"c")
    pack("rows_file", tmp_path / "folder")
    assert kept_inputs("rows_file") == [b"\0", b"c", b"ab"]
