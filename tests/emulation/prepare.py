"""Copy csrc for the emulator, with the CUDA sources changed for a host compiler.

    python -m tests.emulation.prepare csrc build/csrc

Kernels and host functions stay what they are, but for the few replacements below and the mistakes
that tests switch on. Each has to find its text as often as it says: where a source has changed so
that one does not, the build stops and says which.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from tests.emulation.mistakes import MEMORY, MISTAKES, RACES, Mistake

EMULATOR = Path(__file__).parent / "emulator"
LIBRARY = "splade_fast_emulated"  # the ops' namespace; they are registered for CPU tensors


class PreparationError(Exception):
    """Error of a source that does not match its replacement."""


class Replacement(NamedTuple):
    file: str  # in csrc
    old: str
    new: str
    times: int = 1


def registration(file: str) -> Replacement:
    implementation = "STABLE_TORCH_LIBRARY_IMPL({}, {}, m)"
    return Replacement(
        file,
        implementation.format("splade_fast", "CUDA"),
        implementation.format(LIBRARY, "CPU"),
    )


REPLACEMENTS = [
    Replacement(
        "ops.cpp", "STABLE_TORCH_LIBRARY(splade_fast, m)", f"STABLE_TORCH_LIBRARY({LIBRARY}, m)"
    ),
    *(
        registration(f"cuda/{op}.cu")
        for op in (
            *("gather", "pool", "prune", "sample", "score/score", "score/search"),
            *("head/forward", "head/backward", "head/sm90/screened_op"),
        )
    ),
    # The tensors of the emulated GPU are the CPU's, but for those that a test has pinned.
    Replacement("cuda/gather.cu", ".is_cuda()", ".is_cpu()", 3),
    Replacement(
        "cuda/host_tables.h", "!table.is_cuda()", "emulation::is_pinned(table.const_data_ptr())"
    ),
    Replacement("cuda/gather.cu", "__assert_fail(", "device_assert("),
    # Small tiles, parts, waves and lists, so that a few slots or documents take several.
    Replacement("cuda/sample.cu", "kTileBytes = int64_t{16} << 20", "kTileBytes = 1"),
    Replacement("cuda/gather.cu", "kMinPart = 8192", "kMinPart = 64"),
    Replacement("cuda/score/search.cu", "kListBytes = int64_t{128} << 20", "kListBytes = 1 << 14"),
    Replacement("cuda/score/search.cu", "kFirstWave = 8192", "kFirstWave = 32"),
    Replacement("cuda/score/search.cu", "kSpare = 2048", "kSpare = 4"),
    Replacement("cuda/score/search.cu", "kTileBytes = int64_t{64} << 20", "kTileBytes = 1 << 12"),
    Replacement("cuda/workspace.h", "#pragma once", '#pragma once\n#include "gaps.h"'),
    Replacement(
        "cuda/workspace.h",
        "round_up(bytes, kAlignment)",
        "emulation::bytes_with_gap(piece, bytes, kAlignment, begin_ != 0)",
    ),
    # Cases differ in the size of the GPU, so it is asked for every time.
    Replacement("cuda/head/sm90/product.cuh", "if (found != known.end())", "if (false)"),
    Replacement(
        "cuda/head/sm90/product.cuh",
        "extern __shared__ uint8_t dynamic[];",
        "const uint8_t* const dynamic = nullptr;",
    ),
]

LAUNCH = re.compile(r"(?P<kernel>\w+(?:<[^<>;]*>)?)\s*<<<(?P<configuration>[^;]*?)>>>")
SHARED = re.compile(
    r"__shared__ (?:alignas\(\d+\) )?"
    r"(?P<type>(?:\w+::)*\w+(?:<[^<>;]*>)?) (?P<name>\w+)(?P<sizes>[^;]*);"
)


def launches_as_calls(text: str, file: str) -> str:
    """Rewrite kernel<<<configuration>>>(…) as emulation::Launch(configuration).of(kernel)(…)."""
    expected = text.count("<<<")
    text, found = LAUNCH.subn(r"emulation::Launch(\g<configuration>).of(\g<kernel>)", text)
    if found != expected:
        raise PreparationError(f"{file}: {found} of {expected} launches have the expected form")
    return text


def shared_as_references(text: str, file: str) -> str:
    """Rewrite __shared__ T name[n]; as a reference to what the running block has of it."""
    expected = text.count("__shared__")
    text, found = SHARED.subn(
        r"auto& \g<name> = emulation::shared_variable<\g<type>\g<sizes>>();", text
    )
    if found != expected:
        raise PreparationError(f"{file}: {found} of {expected} __shared__ have the expected form")
    return text


def replaced(text: str, replacement: Replacement) -> str:
    found = text.count(replacement.old)
    if found != replacement.times:
        expected = f"expected {replacement.times} of {replacement.old!r}"
        raise PreparationError(f"{replacement.file}: {expected}, found {found}")
    return text.replace(replacement.old, replacement.new)


def with_switch(name: str, mistake: Mistake) -> Replacement:
    return Replacement(
        mistake.file,
        mistake.behind + mistake.correct,
        mistake.behind + mistake.switchable(name),
    )


def prepared_texts(source: Path) -> dict[str, str]:
    """Return the text of each file, by its path in csrc."""
    texts = {
        path.relative_to(source).as_posix(): path.read_text()
        for folder in ("common", "cuda")
        for path in sorted((source / folder).rglob("*"))
        if path.is_file()
    }
    texts["ops.cpp"] = (source / "ops.cpp").read_text()
    texts["cuda/head/sm90/instructions.cuh"] = (EMULATOR / "instructions.cuh").read_text()
    for replacement in (
        *REPLACEMENTS,
        *(with_switch(*item) for item in (MISTAKES | RACES | MEMORY).items()),
    ):
        texts[replacement.file] = replaced(texts[replacement.file], replacement)
    for name, text in texts.items():
        if "STABLE_TORCH_LIBRARY_IMPL(splade_fast," in text:
            raise PreparationError(f"{name}: registers ops, and has no replacement for that")
    return {
        name: launches_as_calls(shared_as_references(text, name), name)
        if name.endswith((".cu", ".cuh"))
        else text
        for name, text in texts.items()
    }


def prepare(source: Path, target: Path) -> None:
    """Write the changed files only, so that nothing else is compiled again."""
    for name, text in prepared_texts(source).items():
        path = target / name
        # Messages and reports name the line of the original.
        text = f'#include "mistake.h"\n#line 1 "csrc/{name}"\n{text}'
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    try:
        prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    except PreparationError as error:
        sys.exit(f"tests/emulation/prepare.py: {error}")
