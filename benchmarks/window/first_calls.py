"""Say what runs at all: import, build facts, and one call of each kernel of the head.

Each call has a process of its own, so that a hang or a fault of one leaves the others their turn.
"""

import subprocess
import sys
from typing import Any

import torch

CALLS = ("chunked", "fused", "screened")
_SECONDS = {"cuda": 30, "cpu": 600}
# batch, length, dim, vocabulary
_SIZES = {"cuda": (32, 128, 768, 30522), "cpu": (2, 16, 64, 500)}


def main(names: list[str]) -> int:
    """Make the calls of these names here; without names, all calls in processes of their own."""
    if names:
        for name in names:
            _call(name)
        return 0
    import splade_fast

    for name, value in splade_fast.build_info().items():
        print(f"{name}: {value}", flush=True)
    return max(_run(name) for name in CALLS)


def _run(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.window.first_calls", name]
    seconds = _SECONDS[_device()]
    try:
        status = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        status = 124
    print(f"{name}: exit {status}", flush=True)
    return abs(status)


def _call(name: str) -> None:
    """Compare one kernel of the head with the reference in fp64."""
    from benchmarks.harness.checks import relative_error
    from benchmarks.window.heads import run_head
    from splade_fast import reference

    device = _device()
    generator = torch.Generator(device).manual_seed(0)
    batch, length, dim, vocabulary = _SIZES[device]
    options: dict[str, Any] = {"device": device, "generator": generator, "dtype": torch.bfloat16}
    hidden = torch.randn(batch, length, dim, **options)
    weight = torch.randn(vocabulary, dim, **options) / dim**0.5
    with torch.inference_mode():
        pooled = run_head(name, hidden, weight)
        exact = torch.cat(
            [reference.splade_head(hidden.double(), part.double()) for part in weight.split(2048)],
            dim=1,
        )
    error = relative_error(pooled, exact)
    limit = 4 * torch.finfo(pooled.dtype).eps
    print(f"{name}: relative error {error:.1e}", flush=True)
    if error > limit:
        sys.exit(f"{name}: the relative error must be at most {limit:.1e}, got {error:.1e}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
