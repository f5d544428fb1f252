// head forward on CUDA. For every architecture: a GEMM through torch writes a chunk of logits, some rows x some
// vocabulary entries, that stays in the second-level cache, and the kernel of pool reduces it from there. On sm_90a the
// kernel of sm90/dense.cu can replace both.
//
// The chunk has the dtype of hidden, as the product of torch has, so bfloat16 and float16 logits are rounded once
// before the maximum; bias, sum and activation are in float32. The product follows torch's own setting of TF32. Padded
// input multiplies all B * L rows, because the host does not know the number of real tokens without waiting for the
// device. Packed input costs its real tokens.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string_view>
#include <tuple>

#include "common/torch_ops.h"
#include "cuda/head/sm90/packed_head.h"
#include "cuda/pool.h"

namespace splade_fast::cuda {
namespace {

constexpr int64_t kChunkBytes = int64_t{32} << 20;
constexpr int64_t kChunkRows = 8192;  // more rows would leave too few columns for a good GEMM
constexpr int64_t kColumnStep = 64;   // keeps rows of a chunk aligned for vectors of every dtype

// Returns the number of columns of a chunk: as many as fit, with all chunks of about the same width.
int64_t chunk_columns(int64_t rows, int64_t vocabulary, int64_t element_bytes) {
  const int64_t fit = kChunkBytes / (std::max<int64_t>(rows, 1) * element_bytes);
  const int64_t most = std::max(fit / kColumnStep * kColumnStep, kColumnStep);
  const int64_t chunks = ceil_div(vocabulary, most);
  return ceil_div(ceil_div(vocabulary, chunks), kColumnStep) * kColumnStep;
}

// Sets the sequences with rows in [row, row + count). Of packed rows the host does not know the boundaries.
void set_rows(PoolTask& task, const HeadInput& input, int64_t row, int64_t count) {
  task.first_row = row;
  task.end_row = row + count;
  task.first_sequence = 0;
  task.num_sequences = input.batch;
  if (!input.cu_seqlens && count > 0) {
    task.first_sequence = row / input.length;
    task.num_sequences = ceil_div(row + count, input.length) - task.first_sequence;
  }
}

void set_columns(PoolTask& task, const HeadInput& input, const HeadOutputs& outputs, int64_t column, int64_t columns,
                 int64_t row_stride) {
  const auto at_column = [&](const Tensor& tensor) -> void* {
    return static_cast<char*>(tensor.mutable_data_ptr()) + column * static_cast<int64_t>(tensor.element_size());
  };
  task.columns = columns;
  task.readable = std::min(ceil_div(columns, kColumnStep) * kColumnStep, row_stride);
  if (input.bias) {
    task.bias = static_cast<const char*>(input.bias->const_data_ptr()) +
                column * static_cast<int64_t>(input.bias->element_size());
  }
  task.pooled = at_column(outputs.pooled);
  if (outputs.saved) {
    task.max_logits = at_column(outputs.max_logits);
    task.positions = at_column(outputs.argmax);
  }
}

// The running result of the sequence that two blocks of rows share, for the whole vocabulary. At most one sequence is
// cut at a time; a launch reads one row of this and writes the other.
class Carries {
 public:
  Carries(const HeadInput& input, bool needed) {
    if (!needed) return;
    const std::vector<int64_t> shape{2, input.vocabulary()};
    value_ = new_tensor(input.weight, shape, accumulation_type(input.weight.scalar_type()));
    position_ = new_tensor(input.weight, shape, ScalarType::Int);
  }

  PoolCarry at(int64_t block, int64_t column) const {
    if (!value_) return {nullptr, nullptr};
    const int64_t index = block % 2 * value_->size(1) + column;
    return {static_cast<char*>(value_->mutable_data_ptr()) + index * static_cast<int64_t>(value_->element_size()),
            mutable_data<int32_t>(*position_) + index};
  }

 private:
  std::optional<Tensor> value_, position_;
};

void head_by_chunks(const HeadInput& input, Pooling pooling, Activation activation, const HeadOutputs& outputs,
                    const OnDevice& device, const char* op) {
  const ScalarType dtype = input.weight.scalar_type();
  const int64_t rows = input.rows(), vocabulary = input.vocabulary(), block_rows = std::min(rows, kChunkRows);
  const int64_t width = chunk_columns(block_rows, vocabulary, static_cast<int64_t>(input.weight.element_size()));
  const Tensor chunk = new_tensor(input.weight, std::vector<int64_t>{block_rows, width});
  const Carries carries(input, rows > block_rows);

  PoolTask task{};
  task.logits = chunk.const_data_ptr();
  task.sequence_stride = input.length * width;
  task.row_stride = width;
  task.sequences = input.sequences();
  task.mask = input.mask ? const_data<bool>(*input.mask) : nullptr;
  task.activation = activation;
  task.vocabulary = vocabulary;
  task.pooled_in_acc = outputs.pooled.scalar_type() != dtype;
  task.position_bytes = static_cast<int>(outputs.argmax.element_size());
  // Blocks of rows are the outer loop, so that the tokens of a block stay in the cache beside the chunk. Input without
  // rows takes one turn, which writes the results of empty sequences.
  for (int64_t row = 0, block = 0; row < rows || block == 0; row += block_rows, ++block) {
    const int64_t count = std::min(block_rows, rows - row);
    set_rows(task, input, row, count);
    for (int64_t column = 0; column < vocabulary; column += width) {
      const int64_t columns = std::min(width, vocabulary - column);
      if (count > 0) {
        const Tensor target = narrowed(narrowed(chunk, 0, 0, count), 1, 0, columns);
        const Tensor entries = narrowed(input.weight, 0, column, columns);
        aten::mm_out(target, narrowed(input.tokens, 0, row, count), torch::stable::transpose(entries, 0, 1));
      }
      set_columns(task, input, outputs, column, columns, width);
      task.carry_in = carries.at(block, column);
      task.carry_out = carries.at(block + 1, column);
      pool_rows(task, dtype, pooling, device, op);
    }
  }
}

// The kernel of sm_90a ------------------------------------------------------------------------------------------

// The kernel has not run on a GPU, so the caller has to ask for it: SPLADE_FAST_HOPPER=1.
bool is_sm90_wanted() {
  const char* value = std::getenv("SPLADE_FAST_HOPPER");
  return value != nullptr && std::string_view(value) == "1";
}

// Returns the operand type of the kernel for a dtype, if it supports the dtype.
std::optional<hopper::Operand> find_operand(ScalarType dtype, bool allow_tf32) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return hopper::Operand::kBfloat16;
    case ScalarType::Half:
      return hopper::Operand::kFloat16;
    case ScalarType::Float:
      return allow_tf32 ? std::optional(hopper::Operand::kTfloat32) : std::nullopt;
    default:
      return std::nullopt;
  }
}

// Whether the kernel can run and the caller has asked for it.
bool should_run_sm90(const HeadInput& input, hopper::Operand operand, const OnDevice& device) {
  return sm90::is_built() && is_sm90_wanted() && device.compute_capability() == 90 &&
         sm90::fits(shape_of_input(input), operand, address_of(input.tokens) | address_of(input.weight));
}

void head_sm90(const HeadInput& input, hopper::Operand operand, Activation activation, const HeadOutputs& outputs,
               const OnDevice& device, const char* op) {
  PackedHead packed(input, operand, activation, outputs);
  const Tensor memory = new_workspace(input.weight, [&](Pieces& pieces) {
    packed.head.keys = packed.lay_out(pieces, sm90::key_bytes(packed.head.shape, outputs.saved));
  });
  check_cuda(launch_pack(packed.pack, device.multiprocessors(), device.stream()), op);
  check_cuda(sm90::launch_head(packed.head, device.stream()), op);
}

// Host function --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                           const std::optional<Tensor>& cu_seqlens, int64_t pooling_code,
                                           int64_t activation_code, bool save, bool float_output, bool allow_tf32) {
  const char* op = "head_forward";
  const Pooling pooling = check_pooling(pooling_code);
  const Activation activation = check_activation(activation_code);
  const HeadInput input = check_input(hidden, weight, bias, mask, cu_seqlens);
  const OnDevice device(hidden, op);
  const HeadOutputs outputs = new_outputs(input, hidden, pooling, save, float_output);
  if (outputs.pooled.numel() > 0) {
    const std::optional<hopper::Operand> operand =
        pooling == Pooling::kMax ? find_operand(hidden.scalar_type(), allow_tf32) : std::nullopt;
    if (operand && should_run_sm90(input, *operand, device)) {
      head_sm90(input, *operand, activation, outputs, device, op);
    } else {
      head_by_chunks(input, pooling, activation, outputs, device, op);
    }
  }
  return {outputs.pooled, outputs.max_logits, outputs.argmax};
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("head_forward_dense", TORCH_BOX(&splade_fast::cuda::forward));
}
