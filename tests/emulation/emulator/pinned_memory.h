// Tensors that count as pinned host memory, and work that seems to run on, for the tests of what stays alive.
#pragma once

namespace emulation {

bool is_pinned(const void* data);

bool is_work_running();

}  // namespace emulation
