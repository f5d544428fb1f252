// The host side that the dense and the screened head of sm_90a share: the packed tokens of a call.
#pragma once

#include "cuda/head/head.h"
#include "cuda/head/sm90/dense.h"
#include "cuda/head/sm90/pack.h"

namespace splade_fast::cuda {

inline sm90::Shape shape_of_input(const HeadInput& input) {
  return {input.rows(), input.batch, input.vocabulary(), input.dim()};
}

inline uintptr_t address_of(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

// Packs the real tokens, and fills in the task of a kernel but for its keys. zeros: int32, set to 0 on the way.
class PackedHead {
 public:
  PackedHead(const HeadInput& input, hopper::Operand operand, Activation activation, const HeadOutputs& outputs,
             const OnDevice& device, const char* op, const std::optional<Tensor>& zeros = std::nullopt)
      : starts_(new_ints(input, input.batch + 1)),
        first_sequences_(new_ints(input, sm90::token_tiles(shape_of_input(input)))),
        source_rows_(new_ints(input, input.mask ? input.rows() : 0)),
        packed_(input.mask ? new_tensor(input.tokens, input.tokens.sizes()) : input.tokens) {
    const sm90::Shape shape = shape_of_input(input);
    PackTask pack{};
    pack.sequences = input.sequences();
    pack.batch = shape.batch;
    pack.mask = input.mask ? const_data<bool>(*input.mask) : nullptr;
    pack.rows = input.tokens.const_data_ptr();
    pack.row_bytes = shape.dim * static_cast<int64_t>(input.tokens.element_size());
    pack.starts = mutable_data<int32_t>(starts_);
    pack.tiles = static_cast<int>(sm90::token_tiles(shape));
    pack.first_sequences = mutable_data<int32_t>(first_sequences_);
    if (zeros) {
      pack.zeros = mutable_data<int32_t>(*zeros);
      pack.zero_count = zeros->numel();
    }
    if (input.mask) {
      pack.source_rows = mutable_data<int32_t>(source_rows_);
      pack.packed = packed_.mutable_data_ptr();
    }
    check_cuda(launch_pack(pack, device.multiprocessors(), device.stream()), op);

    task_.shape = shape;
    task_.operand = operand;
    task_.tokens = packed_.const_data_ptr();
    task_.weight = input.weight.const_data_ptr();
    task_.rows = {pack.starts, pack.source_rows, input.length, static_cast<int>(shape.batch), pack.tiles};
    task_.first_sequences = pack.first_sequences;
    task_.outputs.vocabulary = shape.vocabulary;
    task_.outputs.pooled = outputs.pooled.mutable_data_ptr();
    task_.outputs.pooled_in_acc = outputs.pooled.scalar_type() == ScalarType::Float;
    task_.outputs.max_logits = outputs.saved ? outputs.max_logits.mutable_data_ptr() : nullptr;
    task_.outputs.positions = outputs.argmax.mutable_data_ptr();
    task_.outputs.position_bytes = static_cast<int>(outputs.argmax.element_size());
    task_.outputs.bias = input.bias ? input.bias->const_data_ptr() : nullptr;
    task_.outputs.activation = activation;
  }

  const sm90::HeadTask& task() const { return task_; }

 private:
  static Tensor new_ints(const HeadInput& input, int64_t count) {
    return new_tensor(input.weight, std::vector<int64_t>{count}, ScalarType::Int);
  }

  Tensor starts_, first_sequences_, source_rows_, packed_;
  sm90::HeadTask task_{};
};

}  // namespace splade_fast::cuda
