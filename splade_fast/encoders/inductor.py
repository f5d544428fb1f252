"""Options of inductor, the compiler behind torch.compile, on a CPU."""

from typing import Any

import torch

_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}


def vector_options() -> dict[str, Any]:
    """Return the option that names the width of this processor's vectors.

    The cache of inductor keeps kernels as source code, whose loops take steps of such a vector, and
    does not ask which processor it was written for. With a cache from a processor with AVX-512, a
    processor with AVX2 would compute half of the numbers. Caches differ where an option does.
    """
    bits = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    return {} if bits is None else {"cpp.simdlen": bits}
