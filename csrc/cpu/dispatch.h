// Dispatch from dtypes to the element types of the CPU kernels.
#pragma once

#include "common/dispatch.h"
#include "cpu/simd/dtypes.h"

namespace splade_fast::cpu {

template <typename Body>
void dispatch_floating(ScalarType dtype, Body body) {
  dispatch_floating_as<bfloat16, float16>(dtype, body);
}

}  // namespace splade_fast::cpu
