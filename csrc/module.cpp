// The Python module _C, which holds facts about the build. The ops are in separate libraries, because those do not
// depend on the version of Python.
#include <pybind11/pybind11.h>

#include "build_facts.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build of splade_fast";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["version"] = SPLADE_FAST_VERSION;
    facts["torch_target"] = SPLADE_FAST_TORCH_TARGET;
    facts["torch_headers"] = SPLADE_FAST_TORCH_HEADERS;
    facts["compiler"] = SPLADE_FAST_COMPILER;
    facts["cpu_instruction_sets"] = SPLADE_FAST_ISAS;
    facts["cuda"] = SPLADE_FAST_CUDA_VERSION;
    facts["cuda_architectures"] = SPLADE_FAST_CUDA_ARCHITECTURES;
    facts["cuda_kernels"] = SPLADE_FAST_CUDA_KERNELS;
    return facts;
  });
}
