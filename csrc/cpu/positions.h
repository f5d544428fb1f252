// The argmax of max pooling, stored in the smallest integer type that holds the positions.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/dispatch.h"

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

// Whether positions that the caller brings along are inside their sequences; asked by every thread.
class PositionCheck {
 public:
  bool is_inside(int64_t position, int64_t length) {
    if (static_cast<uint64_t>(position) < static_cast<uint64_t>(length)) return true;
    outside_ = true;
    return false;
  }

  void refuse_outside() const {
    STD_TORCH_CHECK(!outside_, "argmax must hold positions inside the sequences, from a forward that saved it");
  }

 private:
  std::atomic<bool> outside_{false};
};

}  // namespace splade_fast::cpu
