// head_prepare and head_forward_screened on CUDA: sm_90a, max pooling, bfloat16 and float16.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/head/sm90/packed_head.h"
#include "cuda/head/sm90/screened.h"

namespace splade_fast::cuda {
namespace {

bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

hopper::Operand half_operand(ScalarType half) {
  return half == ScalarType::BFloat16 ? hopper::Operand::kBfloat16 : hopper::Operand::kFloat16;
}

void check_runs(const Tensor& weight, const std::optional<Tensor>& basis, const std::optional<Tensor>& order,
                const OnDevice& device) {
  STD_TORCH_CHECK(sm90::is_built() && device.compute_capability() == 90,
                  "the screened head runs on GPUs of compute capability 9.0, with a library that has sm_90a");
  STD_TORCH_CHECK(is_half(weight.scalar_type()), "the screened head takes bfloat16 or float16 on a GPU, got ",
                  torch::headeronly::toString(weight.scalar_type()));
  STD_TORCH_CHECK(weight.size(1) % 8 == 0 && weight.size(1) <= kScreenMaxDim,
                  "the screened head takes a multiple of 8 and at most ", kScreenMaxDim, " dimensions on a GPU, got ",
                  weight.size(1));
  STD_TORCH_CHECK(!basis && !order, "basis and order must be None on a GPU");
}

void check_mean(const Tensor& mean, const Tensor& weight) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.dim() == 1 && mean.size(0) == weight.size(1) &&
                      mean.device() == weight.device(),
                  "mean must be float32 (", weight.size(1), ",) on the device of weight");
}

// Returns a tensor whose data begins at a multiple of 16 bytes, as the kernels need: itself, or a copy.
Tensor aligned(const Tensor& tensor) {
  if (address_of(tensor) % hopper::kChunkBytes == 0) return tensor;
  Tensor copy = new_tensor(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

RowsToRound rows_to_round(const void* rows, const Tensor& weight, const Tensor& mean) {
  return {rows, weight.scalar_type() == ScalarType::BFloat16, weight.size(1), const_data<float>(mean)};
}

std::tuple<Tensor, Tensor> prepare(const Tensor& given_weight, const Tensor& given_mean,
                                   const std::optional<Tensor>& basis, const std::optional<Tensor>& order,
                                   double /*basis_error*/) {
  const char* op = "head_prepare";
  check_floating("weight", given_weight, 2);
  check_mean(given_mean, given_weight);
  const OnDevice device(given_weight, op);
  check_runs(given_weight, basis, order, device);
  const Tensor weight = aligned(as_contiguous(given_weight)), mean = as_contiguous(given_mean);
  const int64_t vocabulary = weight.size(0), padded_dim = screen_padded_dim(weight.size(1));
  const Tensor packed = new_tensor(weight, std::vector<int64_t>{vocabulary, padded_dim}, ScalarType::Char);
  const Tensor rows = new_tensor(weight, std::vector<int64_t>{kWeightFacts, vocabulary}, ScalarType::Float);
  if (weight.numel() > 0) {
    const WeightToRound task{rows_to_round(weight.const_data_ptr(), weight, mean), vocabulary,
                             mutable_data<int8_t>(packed), mutable_data<float>(rows)};
    check_cuda(launch_round_weight(task, device.multiprocessors(), device.stream()), op);
  }
  return {packed, rows};
}

// Memory that is zero before the product: the count of candidates and the tiles. Keys have memory of their own.
class Zeros {
 public:
  explicit Zeros(const HeadInput& input)
      : memory_(new_tensor(input.weight,
                           std::vector<int64_t>{kCountBytes / 4 + sm90::token_tiles(shape_of_input(input)) *
                                                                      static_cast<int64_t>(sizeof(ScreenTile) / 4)},
                           ScalarType::Int)) {}

  const Tensor& memory() const { return memory_; }
  unsigned long long* count() const { return static_cast<unsigned long long*>(memory_.mutable_data_ptr()); }
  ScreenTile* tiles() const {
    return reinterpret_cast<ScreenTile*>(static_cast<char*>(memory_.mutable_data_ptr()) + kCountBytes);
  }

 private:
  static constexpr int64_t kCountBytes = 16;
  Tensor memory_;
};

void head_screened(const HeadInput& input, Activation activation, const HeadOutputs& outputs, const Tensor& mean,
                   const Tensor& packed, const Tensor& rows, const Tensor& report, const OnDevice& device,
                   const char* op) {
  const Zeros zeros(input);
  const PackedHead packed_head(input, half_operand(input.weight.scalar_type()), activation, outputs, device, op,
                               zeros.memory());
  const int64_t vocabulary = input.vocabulary(), padded_dim = screen_padded_dim(input.dim());
  const int64_t capacity = candidate_capacity(input.rows(), vocabulary);
  const auto new_of = [&](ScalarType dtype, int64_t first, int64_t second) {
    return new_tensor(input.weight, std::vector<int64_t>{first, second}, dtype);
  };
  const Tensor integers = new_of(ScalarType::Char, input.rows(), padded_dim);
  const Tensor largest = new_of(ScalarType::Float, input.rows(), 1), entries = new_of(ScalarType::Float, vocabulary, 4);
  const Tensor candidates = new_of(ScalarType::Int, capacity, 2);
  const int64_t key_vectors = ceil_div(input.batch * vocabulary * (outputs.saved ? 8 : 4), sizeof(uint4));
  const Tensor keys = new_of(ScalarType::Int, key_vectors, sizeof(uint4) / sizeof(int32_t));

  sm90::ScreenedTask task{};
  task.head = packed_head.task();
  task.head.keys = keys.mutable_data_ptr();
  task.head.only_if = {zeros.count(), static_cast<unsigned long long>(capacity)};
  task.weight = const_data<int8_t>(packed);
  task.tokens = const_data<int8_t>(integers);
  task.tiles = zeros.tiles();
  task.entries = static_cast<const ScreenEntry*>(entries.const_data_ptr());
  task.candidates = static_cast<sm90::CandidatePair*>(candidates.mutable_data_ptr());
  task.count = zeros.count();
  task.capacity = capacity;
  task.report = mutable_data<int64_t>(report);

  const TokensToRound tokens{rows_to_round(task.head.tokens, input.weight, mean),
                             input.rows(),
                             task.head.rows.starts + input.batch,
                             sm90::kTileTokens,
                             mutable_data<int8_t>(integers),
                             mutable_data<float>(largest),
                             zeros.tiles()};
  const EntriesToDescribe described{task.head.weight,
                                    task.head.outputs.bias,
                                    const_data<float>(rows),
                                    vocabulary,
                                    static_cast<ScreenEntry*>(entries.mutable_data_ptr()),
                                    zeros.count(),
                                    task.head.only_if.more_than + 1,
                                    static_cast<uint4*>(keys.mutable_data_ptr()),
                                    key_vectors};
  check_cuda(launch_round_tokens(tokens, described, device.multiprocessors(), device.stream()), op);
  check_cuda(sm90::launch_screened_head(task, device.multiprocessors(), device.stream()), op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                                   const std::optional<Tensor>& cu_seqlens, int64_t pooling_code,
                                                   int64_t activation_code, bool save, bool float_output,
                                                   const Tensor& mean, const Tensor& packed, const Tensor& rows,
                                                   const std::optional<Tensor>& basis,
                                                   const std::optional<Tensor>& order, bool /*may_decline*/) {
  const char* op = "head_forward_screened";
  STD_TORCH_CHECK(check_pooling(pooling_code) == Pooling::kMax, "the screened head pools by max on a GPU");
  const Activation activation = check_activation(activation_code);
  HeadInput input = check_input(hidden, weight, bias, mask, cu_seqlens);
  check_mean(mean, weight);
  const OnDevice device(hidden, op);
  check_runs(weight, basis, order, device);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Char && rows.scalar_type() == ScalarType::Float &&
                      packed.dim() == 2 && packed.size(0) == input.vocabulary() &&
                      packed.size(1) == screen_padded_dim(input.dim()) && rows.dim() == 2 &&
                      rows.size(0) == kWeightFacts && rows.size(1) == input.vocabulary() && packed.is_contiguous() &&
                      rows.is_contiguous() && packed.device() == weight.device() && rows.device() == weight.device(),
                  "packed and rows must be what head_prepare made of weight");
  const HeadOutputs outputs = new_outputs(input, hidden, Pooling::kMax, save, float_output);
  const bool is_empty = outputs.pooled.numel() == 0;
  const std::vector<int64_t> facts{4};
  const Tensor report =
      is_empty ? new_zeros_tensor(hidden, facts, ScalarType::Long) : new_tensor(hidden, facts, ScalarType::Long);
  if (!is_empty) {
    input.tokens = aligned(input.tokens);
    input.weight = aligned(input.weight);
    const int64_t bytes = input.dim() * static_cast<int64_t>(weight.element_size());
    STD_TORCH_CHECK(sm90::fits(shape_of_input(input), half_operand(weight.scalar_type()),
                               address_of(input.tokens) | address_of(input.weight)),
                    "the screened head takes fewer tokens and entries on a GPU than ", input.rows(), " and ",
                    input.vocabulary(), ", of ", bytes, " bytes each, and at least one token and dimension");
    head_screened(input, activation, outputs, as_contiguous(mean), packed, rows, report, device, op);
  }
  return {outputs.pooled, outputs.max_logits, outputs.argmax, report};
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("head_prepare", TORCH_BOX(&splade_fast::cuda::prepare));
  m.impl("head_forward_screened", TORCH_BOX(&splade_fast::cuda::forward));
}
