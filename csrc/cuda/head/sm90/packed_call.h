// What the fused heads of sm_90a share on the host: their outputs, and the packed tokens of a call.
#pragma once

#include "cuda/head/head.h"
#include "cuda/head/sm90/dense.h"
#include "cuda/head/sm90/pack.h"

namespace splade_fast::cuda {

struct HeadOutputs {
  Tensor pooled, max_logits, argmax;
  bool saved;
};

inline HeadOutputs new_outputs(const HeadInput& input, const Tensor& hidden, Pooling pooling, bool save,
                               bool float_output) {
  const ScalarType dtype = hidden.scalar_type(), acc = accumulation_type(dtype);
  const bool saved = save && pooling == Pooling::kMax;
  const std::vector<int64_t> shape{input.batch, input.vocabulary()}, none{0};
  return {new_tensor(hidden, shape, float_output ? acc : dtype), new_tensor(hidden, saved ? shape : none, acc),
          new_tensor(hidden, saved ? shape : none, head_position_type(hidden, input.cu_seqlens)), saved};
}

inline sm90::Shape fused_shape(const HeadInput& input) {
  return {input.rows(), input.batch, input.vocabulary(), input.depth()};
}

inline uintptr_t address_of(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

// Packs the tokens that count, and says what the fused kernel needs, all but its keys.
class FusedHead {
 public:
  FusedHead(const HeadInput& input, hopper::Operand operand, Activation activation, const HeadOutputs& outputs,
            const OnDevice& device, const char* op)
      : starts_(new_ints(input, input.batch + 1)),
        first_sequences_(new_ints(input, sm90::token_tiles(fused_shape(input)))),
        source_rows_(new_ints(input, input.mask ? input.rows() : 0)),
        packed_(input.mask ? new_tensor(input.tokens, input.tokens.sizes()) : input.tokens) {
    const sm90::Shape shape = fused_shape(input);
    PackTask pack{};
    pack.sequences = input.sequences();
    pack.batch = shape.batch;
    pack.mask = input.mask ? const_data<bool>(*input.mask) : nullptr;
    pack.rows = input.tokens.const_data_ptr();
    pack.row_bytes = shape.depth * static_cast<int64_t>(input.tokens.element_size());
    pack.starts = mutable_data<int32_t>(starts_);
    if (input.mask) {
      pack.source_rows = mutable_data<int32_t>(source_rows_);
      pack.packed = packed_.mutable_data_ptr();
    }
    check_cuda(launch_pack(pack, device.multiprocessors(), device.stream()), op);

    task_.shape = shape;
    task_.operand = operand;
    task_.tokens = packed_.const_data_ptr();
    task_.weight = input.weight.const_data_ptr();
    task_.rows = {pack.starts, pack.source_rows, input.length, static_cast<int>(shape.batch),
                  static_cast<int>(sm90::token_tiles(shape))};
    task_.first_sequences = mutable_data<int32_t>(first_sequences_);
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
