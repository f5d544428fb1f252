"""Seeds of the coverage-guided fuzzer: inputs that each reached new code.

seeds/TARGET.txt holds one seed per line, in hex. libFuzzer needs a folder with one file each:
python -m tests.fuzz.seed_files unpack|pack TARGET FOLDER
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"


def kept_inputs(target: str) -> list[bytes]:
    lines = (SEEDS / f"{target}.txt").read_text(encoding="ascii").splitlines()
    return [bytes.fromhex(line) for line in lines]


def unpack(target: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for content in kept_inputs(target):
        (folder / hashlib.sha1(content).hexdigest()).write_bytes(content)


def pack(target: str, folder: Path) -> None:
    """Replace the seeds of a target by the files of a folder."""
    found = sorted({path.read_bytes() for path in folder.iterdir()}, key=lambda x: (len(x), x))
    lines = "".join(f"{content.hex()}\n" for content in found if content)
    (SEEDS / f"{target}.txt").write_text(lines, encoding="ascii")


if __name__ == "__main__":
    {"unpack": unpack, "pack": pack}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
