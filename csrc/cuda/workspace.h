// Memory for what the launches of a call hand on: one tensor, cut into pieces.
//
//   const Tensor memory = new_workspace(like, [&](Pieces& pieces) {
//     task.starts = pieces.take<int32_t>(batch + 1);
//     task.keys = pieces.take<uint64_t>(batch * vocabulary);
//   });
#pragma once

#include <vector>

#include "common/integers.h"
#include "common/new_tensor.h"

namespace splade_fast::cuda {

// Pieces of memory, one behind the other.
class Pieces {
 public:
  explicit Pieces(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), end_(begin_) {}

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = end_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    end_ += static_cast<uintptr_t>(round_up(bytes, kAlignment));
    return reinterpret_cast<T*>(piece);
  }

  int64_t bytes() const { return static_cast<int64_t>(end_ - begin_); }

 private:
  static constexpr int64_t kAlignment = 256;
  uintptr_t begin_, end_;
};

// Calls lay_out(pieces) twice: to add up the bytes, and again with memory for them. Returns the memory.
template <typename LayOut>
torch::stable::Tensor new_workspace(const torch::stable::Tensor& like, const LayOut& lay_out) {
  Pieces sizes(nullptr);
  lay_out(sizes);
  const torch::stable::Tensor memory =
      new_tensor(like, std::vector<int64_t>{sizes.bytes()}, torch::headeronly::ScalarType::Byte);
  Pieces pieces(memory.mutable_data_ptr());
  lay_out(pieces);
  return memory;
}

}  // namespace splade_fast::cuda
