// The argmax of max pooling, stored in the smallest integer type that holds the positions.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace splade_fast::cpu {

// body(pointer to the elements) for the position type of the tensor.
template <typename Body>
void dispatch_positions(const Tensor& positions, Body body) {
  switch (positions.scalar_type()) {
    case ScalarType::Byte:
      return body(mutable_data<uint8_t>(positions));
    case ScalarType::Short:
      return body(mutable_data<int16_t>(positions));
    default:
      return body(mutable_data<int32_t>(positions));
  }
}

template <typename Source>
void store_positions(const Tensor& positions, int64_t offset, const Source* source, int64_t count) {
  dispatch_positions(positions, [&](auto* target) {
    using Stored = std::remove_pointer_t<decltype(target)>;
    for (int64_t i = 0; i < count; ++i) target[offset + i] = static_cast<Stored>(source[i]);
  });
}

inline void load_positions(const Tensor& positions, int64_t offset, int64_t* target, int64_t count) {
  dispatch_positions(positions, [&](const auto* source) {
    for (int64_t i = 0; i < count; ++i) target[i] = source[offset + i];
  });
}

}  // namespace splade_fast::cpu
