// The host side that the dense and the screened head of sm_90a share: the packed tokens of a call.
#pragma once

#include "cuda/head/head.h"
#include "cuda/head/sm90/dense.h"
#include "cuda/head/sm90/pack.h"
#include "cuda/workspace.h"

namespace splade_fast::cuda {

inline sm90::Shape shape_of_input(const HeadInput& input) {
  return {input.rows(), input.batch, input.vocabulary(), input.dim()};
}

inline uintptr_t address_of(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

// Returns a tensor whose data begins at a multiple of 16 bytes, as the kernels need: itself, or a copy.
inline Tensor aligned(const Tensor& tensor) {
  if (address_of(tensor) % kVectorBytes == 0) return tensor;
  Tensor copy = new_tensor(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The task that packs the real tokens, and that of a kernel behind it, but for what lay_out() and the caller add.
class PackedHead {
 public:
  PackedHead(const HeadInput& input, hopper::Operand operand, Activation activation, const HeadOutputs& outputs) {
    if (input.mask) mask_ = aligned(*input.mask);
    pack.sequences = input.sequences();
    pack.batch = input.batch;
    pack.mask = mask_ ? const_data<bool>(*mask_) : nullptr;
    pack.rows = input.tokens.const_data_ptr();
    pack.row_bytes = input.dim() * static_cast<int64_t>(input.tokens.element_size());

    head.shape = shape_of_input(input);
    head.operand = operand;
    head.tokens = pack.rows;
    head.weight = input.weight.const_data_ptr();
    head.outputs.vocabulary = input.vocabulary();
    head.outputs.pooled = outputs.pooled.mutable_data_ptr();
    head.outputs.pooled_in_acc = outputs.pooled.scalar_type() == ScalarType::Float;
    head.outputs.max_logits = outputs.saved ? outputs.max_logits.mutable_data_ptr() : nullptr;
    head.outputs.positions = outputs.argmax.mutable_data_ptr();
    head.outputs.position_bytes = static_cast<int>(outputs.argmax.element_size());
    head.outputs.bias = input.bias ? input.bias->const_data_ptr() : nullptr;
    head.outputs.activation = activation;
  }

  // zero_bytes: of the memory that is 0 for the launches behind, which the caller shares out. Returns it.
  uint8_t* lay_out(Pieces& pieces, int64_t zero_bytes) {
    const int64_t tiles = sm90::token_tiles(head.shape);
    pack.starts = pieces.take<int32_t>(pack.batch + 1);
    pack.first_sequences = pieces.take<int32_t>(tiles);
    if (pack.mask != nullptr) {
      pack.source_rows = pieces.take<int32_t>(head.shape.rows);
      pack.packed = pieces.take<uint8_t>(head.shape.rows * pack.row_bytes);
      head.tokens = pack.packed;
    }
    pack.zero_vectors = ceil_div(zero_bytes, sizeof(uint4));
    pack.zeros = pieces.take<uint4>(pack.zero_vectors);
    head.rows = {pack.starts, pack.source_rows, pack.sequences.length, static_cast<int>(pack.batch),
                 static_cast<int>(tiles)};
    head.first_sequences = pack.first_sequences;
    return reinterpret_cast<uint8_t*>(pack.zeros);
  }

  PackTask pack{};
  sm90::HeadTask head{};

 private:
  std::optional<Tensor> mask_;
};

}  // namespace splade_fast::cuda
