// kernel<<<grid, block, shared bytes, stream>>>(arguments), as prepare.py writes it: Launch(…).of(kernel)(arguments).
#pragma once

#include <tuple>
#include <type_traits>

#include "scheduler.h"

namespace emulation {

template <typename... Parameters>
struct Bound {
  void (*kernel)(Parameters...);
  dim3 grid, block;
  int cluster;

  template <typename... Arguments>
  void operator()(Arguments&&... arguments) const {
    // Copied once, as launches copy them.
    const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    run_grid(grid, block, cluster, [&] { std::apply(kernel, values); });
  }
};

struct Launch {
  dim3 grid, block;

  Launch(dim3 grid, dim3 block, size_t shared_bytes = 0, void* /*stream*/ = nullptr) : grid(grid), block(block) {
    if (shared_bytes != 0) fail("dynamic shared memory: the emulation has it for cudaLaunchKernelEx alone");
  }

  template <typename... Parameters>
  Bound<Parameters...> of(void (*kernel)(Parameters...)) const {
    return {kernel, grid, block, 1};
  }
};

}  // namespace emulation
