"""Instruction sets that all contenders of a benchmark are held to."""

import os
import sys
from collections.abc import Sequence

# Ours, ATen's, MKL's and oneDNN's, which OpenVINO uses too. ONNX Runtime takes no such setting and
# keeps what the machine has.
LEVELS = {
    "avx2": {
        "SPLADE_FAST_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "SPLADE_FAST_ISA": "avx512bf16",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
}


def restart_with(isa: str | None, arguments: Sequence[str]) -> None:
    """Start this program again with an instruction set, unless it has that already.

    Libraries read the choice once, when they are loaded.

    Args:
        isa: a key of LEVELS, or None for what the machine has.
        arguments: arguments of the program.
    """
    if isa is None or all(os.environ.get(name) == value for name, value in LEVELS[isa].items()):
        return
    command = [sys.executable, "-m", "benchmarks", *arguments]
    os.execve(sys.executable, command, os.environ | LEVELS[isa])
