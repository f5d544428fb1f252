// Static shared memory. prepare.py writes "__shared__ T name;" as "auto& name = emulation::shared_variable<T>();".
#pragma once

#include <cstddef>

#include "scheduler.h"

namespace emulation {

// For as many blocks as run at a time: none of them has a variable yet.
void reset_shared_variables(int blocks);

// What the running block has of the variable that is declared there. All its bits are set when the block
// begins: NaN, or -1.
void* find_shared_variable(Site declaration, size_t bytes);

template <typename T>
T& shared_variable(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return *static_cast<T*>(find_shared_variable({file, line}, sizeof(T)));
}

}  // namespace emulation
