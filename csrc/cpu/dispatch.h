// The CPU's element types by dtype, and what else of tensors its files share.
#pragma once

#include "common/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/memory.h"

namespace splade_fast::cpu {

template <typename Body>
void dispatch_floating(ScalarType dtype, Body body) {
  dispatch_floating_as<bfloat16, float16>(dtype, body);
}

inline void prefer_huge_pages(const Tensor& fresh) {
  prefer_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

}  // namespace splade_fast::cpu
