// Every op schema of the package, in one place. The CPU library carries them; the CUDA library only adds
// implementations.
//
// pooling: 0 = max, 1 = sum.  activation: 0 = relu, 1 = log1p(relu), 2 = log1p(log1p(relu)).
// save_for_backward: also return what the max backward needs, max_logits (B, V) in the accumulation type and
// argmax (B, V) as positions within the sequence; both have no elements otherwise.
// attention_mask is bool (B, L); cu_seqlens is int32 (B + 1,) and excludes it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(splade_fast, m) {
  m.def(
      "pool_forward(Tensor logits, Tensor? attention_mask, int pooling, int activation, "
      "bool save_for_backward) -> (Tensor pooled, Tensor max_logits, Tensor argmax)");
  m.def("pool_backward_max(Tensor grad, Tensor max_logits, Tensor argmax, int length, int activation) -> Tensor");
  m.def("pool_backward_sum(Tensor grad, Tensor logits, Tensor? attention_mask, int activation) -> Tensor");

  // The dense product or the screened one: ops/head/forward.py chooses between the two below.
  // algorithm: 0 = auto, 1 = dense, 2 = screened. source: what weight was cast from, if it was; what is remembered of
  // the weight goes by it.
  // float_output: pooled in float32 whatever the dtype of hidden (autocast runs log1p in float32).
  m.def(
      "head_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, "
      "int pooling, int activation, bool save_for_backward, bool float_output, int algorithm, Tensor? source) "
      "-> (Tensor pooled, Tensor max_logits, Tensor argmax)");
  // allow_tf32: a float32 product may read its operands as TF32, which one kernel of CUDA can.
  m.def(
      "head_forward_dense(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, "
      "int pooling, int activation, bool save_for_backward, bool float_output, bool allow_tf32=False) "
      "-> (Tensor pooled, Tensor max_logits, Tensor argmax)");
  // The weight for head_forward_screened: int8 rows of weight, and facts about each. mean (D,) float32 is about the
  // mean of the hidden states that will come. basis (2, D, padded D) float32, if any: matrices P and Q by which hidden
  // states and rows of weight are multiplied, basis_error >= ‖P·Qᵀ - 1‖; order (V,) int32 goes with it, the entries in
  // the order in which they are packed. CUDA takes no basis, and lays both out in another way.
  m.def(
      "head_prepare(Tensor weight, Tensor mean, Tensor? basis=None, Tensor? order=None, float basis_error=0) "
      "-> (Tensor packed, Tensor rows)");
  // report: declined (only if it may: nothing is computed then, the outputs have no elements), tokens compared, pairs
  // multiplied in full precision, percent of the int8 product that was made.
  // On CUDA, which pools by max and takes bfloat16 and float16 with at least one token and dimension, declined means
  // that the dense kernels have computed everything, whether it may or not.
  m.def(
      "head_forward_screened(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, "
      "int pooling, int activation, bool save_for_backward, bool float_output, Tensor mean, Tensor packed, "
      "Tensor rows, Tensor? basis, Tensor? order, bool may_decline) -> (Tensor pooled, Tensor max_logits, Tensor "
      "argmax, Tensor report)");
  // A gradient that is not needed comes back without elements.
  m.def(
      "head_backward_max(Tensor grad, Tensor max_logits, Tensor argmax, Tensor hidden, Tensor weight, "
      "Tensor? cu_seqlens, int activation, bool needs_hidden, bool needs_weight, bool needs_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "head_backward_sum(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, "
      "Tensor? cu_seqlens, int activation, bool needs_hidden, bool needs_weight, bool needs_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  // The entries of each row of x (B, V) that are not <= threshold, as padded rows (B, K): values, then 0; their
  // columns, int32 and ascending, then -1; int32 lengths (B,). None: that criterion is off. K is the longest row's
  // length on the CPU and min(k, V) on CUDA, and on both where k is the only criterion, which min(k, V) entries of
  // every row meet. mass has no CUDA kernel.
  m.def(
      "prune_rows(Tensor x, int? k, float? threshold, float? max_ratio, float? mass) "
      "-> (Tensor values, Tensor indices, Tensor lengths)");
  // Padded rows (B, K) back to (B, num_cols), zero elsewhere. The CPU has a kernel.
  m.def("dense_rows(Tensor values, Tensor indices, Tensor lengths, int num_cols) -> Tensor");

  // Queries are sparse rows like the documents, or dense (Q, V): then query_indices and query_lengths are None.
  m.def(
      "sparse_scores(Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols) -> Tensor");
  // A gradient that is not needed comes back without elements.
  m.def(
      "sparse_scores_backward(Tensor grad, Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols, bool needs_query, bool needs_doc) "
      "-> (Tensor grad_query_values, Tensor grad_doc_values)");
  m.def(
      "sparse_search(Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols, int k) "
      "-> (Tensor scores, Tensor ids)");

  // Tables have any dtype and (rows, ...) with the same number of rows each; indices are int64 (count,). With CUDA
  // indices the tables may also lie in pinned host memory; the gathered rows are on the device of the indices.
  m.def("gather_rows(Tensor[] tables, Tensor indices) -> Tensor[]");
  // Of several writes to one row the last remains. mask is bool (count,): false is not written, whatever its index.
  m.def("scatter_rows_(Tensor(a!)[] tables, Tensor indices, Tensor[] rows, Tensor? mask) -> ()");

  // A step of a cache of items, rows of tables with an int32 age and a bool valid each: rows of the first tables are
  // refreshed, new items replace the oldest ones (of equal ages the lowest slot first) in all tables, every other age
  // grows by one. use_lru: a refreshed item is as young as a new one. See splade_fast/ops/gather.py.
  m.def(
      "update_cache_(Tensor(a!)[] tables, Tensor(b!) age, Tensor(c!) valid, Tensor[] new_rows, Tensor? new_mask, "
      "Tensor[] refreshed_rows, Tensor? refreshed_slots, Tensor? refreshed_mask, bool use_lru) -> ()");

  // Gumbel-Max draws, see splade_fast/ops/sample.py. state is int64 (2,): seed and step, which the caller advances.
  // valid is bool (slots,) or (queries, slots); exclude bool (queries, slots), or int64 (queries, any) slots. exact:
  // keep the top_k highest scores, not one of each of top_k groups.
  m.def(
      "sample_dense(Tensor queries, Tensor cache, Tensor state, int num_samples, float scale, float inv_temp, "
      "int? top_k, bool exact, Tensor? valid, Tensor? exclude, int slot_offset, int query_offset) "
      "-> (Tensor scores, Tensor perturbed, Tensor logsumexp, Tensor indices)");
  m.def(
      "sample_sparse(Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols, "
      "Tensor state, int num_samples, float scale, float inv_temp, "
      "int? top_k, bool exact, Tensor? valid, Tensor? exclude, int slot_offset, int query_offset) "
      "-> (Tensor scores, Tensor perturbed, Tensor logsumexp, Tensor indices)");
  m.def(
      "sample_scores(Tensor scores, Tensor state, int num_samples, float inv_temp, Tensor? valid, int slot_offset, "
      "int query_offset) "
      "-> (Tensor drawn_scores, Tensor perturbed, Tensor logsumexp, Tensor indices)");
}
