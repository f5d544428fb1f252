"""Python under a sanitizer, with the emulated library built for it.

    python -m tests.emulation.sanitized thread|address [pytest arguments]

thread: ThreadSanitizer finds races. address: AddressSanitizer and UBSan end the run at the first
access outside of memory, misaligned address or undefined operation.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.library import ROOT, build

FIXED_PLACES = ["setarch", "--addr-no-randomize"]  # ThreadSanitizer cannot cope with random ones
RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}
OPTIONS = {
    # Only what was built here is looked at: Python and torch were not.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:report_signal_unsafe=0:report_thread_leaks=0"
    ":halt_on_error=0:exitcode=0:history_size=4",
    # Python frees little when it ends.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def library_of_compiler(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def skip_unless_possible() -> None:
    """Skip a test where the sanitizers of GCC or a fixed place in memory are not to be had."""
    if shutil.which("gcc") is None or not Path(library_of_compiler("libtsan.so")).is_absolute():
        pytest.skip("the sanitizers of tests/emulation are GCC's, and there is no gcc with libtsan")
    if subprocess.run([*FIXED_PLACES, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("ThreadSanitizer needs setarch --addr-no-randomize, which this machine refuses")


def run(sanitizer: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest. Its output goes where that of this process goes."""
    build(sanitizer)
    # The C++ library is loaded early, for the sanitizer to see its exceptions.
    preloaded = map(library_of_compiler, (RUNTIMES[sanitizer], "libstdc++.so.6"))
    return subprocess.run(
        [
            *(*FIXED_PLACES, sys.executable, "-m", "pytest"),
            *("-p", "no:cacheprovider", "-p", "no:xdist", *arguments),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            **OPTIONS,
            "EMULATION_SANITIZER": sanitizer,
            "LD_PRELOAD": " ".join(preloaded),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]).returncode)
