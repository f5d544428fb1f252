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

// Memory that is 0 before the product: the count of candidates, the tiles, then the keys.
struct Zeros {
  static constexpr int64_t kCountBytes = sizeof(uint4);
  int64_t tile_bytes, key_bytes;

  explicit Zeros(const sm90::HeadTask& head)
      : tile_bytes(round_up(sm90::token_tiles(head.shape) * static_cast<int64_t>(sizeof(ScreenTile)), sizeof(uint4))),
        key_bytes(head.shape.batch * head.shape.vocabulary * (head.outputs.max_logits != nullptr ? 8 : 4)) {}

  int64_t bytes() const { return kCountBytes + tile_bytes + key_bytes; }
  void hand_out(uint8_t* memory, TokensToRound& tokens, sm90::ScreenedTask& task) const {
    task.count = reinterpret_cast<unsigned long long*>(memory);
    task.tiles = tokens.tiles = reinterpret_cast<ScreenTile*>(memory + kCountBytes);
    task.head.keys = memory + kCountBytes + tile_bytes;
  }
};

void head_screened(const HeadInput& input, Activation activation, const HeadOutputs& outputs, const Tensor& mean,
                   const Tensor& packed, const Tensor& rows, const Tensor& report, const OnDevice& device,
                   const char* op) {
  PackedHead packed_head(input, half_operand(input.weight.scalar_type()), activation, outputs);
  const Zeros zeros(packed_head.head);
  const int64_t vocabulary = input.vocabulary(), padded_dim = screen_padded_dim(input.dim());
  sm90::ScreenedTask task{};
  TokensToRound tokens{};
  EntriesToDescribe described{};
  task.capacity = candidate_capacity(input.rows(), vocabulary);
  const Tensor memory = new_workspace(input.weight, [&](Pieces& pieces) {
    uint8_t* const zeroed = packed_head.lay_out(pieces, zeros.bytes());
    task.head = packed_head.head;
    zeros.hand_out(zeroed, tokens, task);
    task.candidates = pieces.take<sm90::CandidatePair>(task.capacity);
    tokens.integers = pieces.take<int8_t>(input.rows() * padded_dim);
    tokens.largest = pieces.take<float>(input.rows());
    described.entries = pieces.take<ScreenEntry>(vocabulary);
  });
  task.head.only_if = {task.count, static_cast<unsigned long long>(task.capacity)};
  task.weight = const_data<int8_t>(packed);
  task.tokens = tokens.integers;
  task.entries = described.entries;
  task.report = mutable_data<int64_t>(report);

  tokens.tokens = rows_to_round(task.head.tokens, input.weight, mean);
  tokens.room = input.rows();
  tokens.count = task.head.rows.starts + input.batch;
  tokens.tile_tokens = sm90::kTileTokens;

  described.weight = task.head.weight;
  described.bias = task.head.outputs.bias;
  described.facts = const_data<float>(rows);
  described.vocabulary = vocabulary;
  described.count = task.count;
  described.too_many = task.head.only_if.more_than + 1;
  check_cuda(launch_round_tokens(packed_head.pack, tokens, described, device.multiprocessors(), device.stream()), op);
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
