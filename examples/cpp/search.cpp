// Learned sparse retrieval from C++: the program computes document vectors with the fused head, prunes them to sparse
// rows, searches them exactly, and computes the gradient of the head. It checks each result against LibTorch.
//
// Linking splade_fast registers its ops. The program calls them through the dispatcher of torch, by the schemas in
// csrc/ops.cpp.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <optional>
#include <tuple>

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalDouble = std::optional<double>;

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Values of the arguments pooling and activation, see csrc/ops.cpp.
constexpr int64_t kMax = 0, kLog1pRelu = 1;

struct Pooled {
  Tensor values;              // (B, V)
  Tensor max_logits, argmax;  // (B, V), saved for the gradient
};

Pooled head(const Tensor& hidden, const Tensor& weight, const Tensor& mask) {
  static const auto forward =
      op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                            const OptionalTensor&, int64_t, int64_t, bool, bool, bool)>(
          "splade_fast::head_forward_dense");
  auto [values, max_logits, argmax] =
      forward.call(hidden, weight, std::nullopt, mask, std::nullopt, kMax, kLog1pRelu, true, false, false);
  return {values, max_logits, argmax};
}

// Returns the gradient of hidden.
Tensor head_backward(const Tensor& grad, const Pooled& pooled, const Tensor& hidden, const Tensor& weight) {
  static const auto backward =
      op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const OptionalTensor&, int64_t, bool, bool, bool)>(
          "splade_fast::head_backward_max");
  return std::get<0>(backward.call(grad, pooled.max_logits, pooled.argmax, hidden, weight, std::nullopt, kLog1pRelu,
                                   true, false, false));
}

struct SparseRows {
  Tensor values, indices, lengths;
};

SparseRows prune(const Tensor& vectors, int64_t k) {
  static const auto prune_rows =
      op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, std::optional<int64_t>, OptionalDouble, OptionalDouble,
                                            OptionalDouble)>("splade_fast::prune_rows");
  auto [values, indices, lengths] = prune_rows.call(vectors, k, 0.0, std::nullopt, std::nullopt);
  return {values, indices, lengths};
}

// Returns scores and ids (Q, k) of the best documents for dense queries.
std::tuple<Tensor, Tensor> search(const Tensor& queries, const SparseRows& documents, int64_t k) {
  static const auto sparse_search =
      op<std::tuple<Tensor, Tensor>(const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                    const Tensor&, const Tensor&, int64_t, int64_t)>("splade_fast::sparse_search");
  return sparse_search.call(std::nullopt, queries, std::nullopt, documents.indices, documents.values, documents.lengths,
                            queries.size(1), k);
}

bool check(bool is_correct, const char* what) {
  std::printf("%-60s %s\n", what, is_correct ? "ok" : "FAILED");
  return is_correct;
}

int main() {
  const int64_t documents = 32, length = 20, dim = 64, vocabulary = 5000, k = 256;
  at::manual_seed(0);
  const Tensor hidden = at::randn({documents, length, dim}), weight = at::randn({vocabulary, dim}) / 8;
  const Tensor real_tokens = at::randint(1, length + 1, {documents, 1});
  const Tensor mask = at::arange(length).unsqueeze(0) < real_tokens;  // bool (B, L)

  const Pooled pooled = head(hidden, weight, mask);
  const Tensor logits = at::matmul(hidden, weight.t()).masked_fill(mask.logical_not().unsqueeze(-1), -1);
  const auto [maximum, position] = logits.max(1);
  bool is_correct =
      check(at::allclose(pooled.values, maximum.relu().log1p(), 1e-5, 1e-6), "head: the formula in LibTorch");

  const Tensor grad = at::randn_like(pooled.values);
  const Tensor coefficient = at::where(maximum > 0, grad / (1 + maximum), at::zeros({}));
  Tensor expected = at::zeros_like(hidden);
  for (int64_t b = 0; b < documents; ++b) {
    expected[b].index_add_(0, position[b], coefficient[b].unsqueeze(1) * weight);
  }
  is_correct &=
      check(at::allclose(head_backward(grad, pooled, hidden, weight), expected, 1e-4, 1e-5), "head: its gradient");

  const SparseRows rows = prune(pooled.values, k);
  const Tensor largest = std::get<0>(pooled.values.topk(k, 1)).sum(1);
  is_correct &= check(at::allclose(rows.values.sum(1), largest, 1e-4, 1e-5), "prune: the k largest of each document");

  const auto [scores, ids] = search(pooled.values, rows, 1);
  const Tensor kept = at::zeros({documents, vocabulary});
  for (int64_t b = 0; b < documents; ++b) {
    const int64_t used = rows.lengths[b].item<int64_t>();
    kept[b].index_put_({rows.indices[b].narrow(0, 0, used).to(at::kLong)}, rows.values[b].narrow(0, 0, used));
  }
  const auto [best, best_ids] = at::matmul(pooled.values, kept.t()).max(1);
  is_correct &= check(at::equal(ids.squeeze(1), best_ids), "search: the best document of each query");
  is_correct &= check(at::allclose(scores.squeeze(1), best, 1e-5, 1e-5), "search: its score");
  return is_correct ? 0 : 1;
}
