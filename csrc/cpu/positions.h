// The argmax of max pooling, stored in the smallest integer type that holds the positions.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/dispatch.h"

namespace splade_fast::cpu {

// Call body with a pointer to the elements, typed as the tensor is.
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

// Check, shared by all threads, that the positions given by a caller lie inside their sequences.
class PositionCheck {
 public:
  bool is_inside(int64_t position, int64_t length) {
    if (static_cast<uint64_t>(position) < static_cast<uint64_t>(length)) return true;
    has_outside_ = true;
    return false;
  }

  void check_all_inside() const {
    STD_TORCH_CHECK(!has_outside_, "argmax must hold positions inside the sequences, from a forward that saved it");
  }

 private:
  std::atomic<bool> has_outside_{false};
};

}  // namespace splade_fast::cpu
