// The CPU's element types by dtype.
#pragma once

#include "../common/dispatch.h"
#include "dtypes.h"

namespace splade_fast::cpu {

template <typename Body>
void dispatch_floating(ScalarType dtype, Body body) {
  dispatch_floating_as<bfloat16, float16>(dtype, body);
}

}  // namespace splade_fast::cpu
