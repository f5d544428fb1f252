// Options that the op schemas carry as integers. splade_fast/_checks.py uses the same numbers.
#pragma once

#include <cstdint>

namespace splade_fast {

enum class Pooling : int64_t { kMax = 0, kSum = 1 };

enum class Activation : int64_t { kRelu = 0, kLog1pRelu = 1, kLog1pLog1pRelu = 2 };

}  // namespace splade_fast
