// Schemas of all ops. The CPU library registers them, and the CUDA library only adds implementations.
//
// Arguments that several ops share:
//   pooling: 0 = max, 1 = sum.
//   activation: 0 = relu, 1 = log1p(relu), 2 = log1p(log1p(relu)).
//   attention_mask: bool (B, L), None with cu_seqlens. cu_seqlens: int32 (B + 1,).
//   save_for_backward: return max_logits (B, V), in the accumulation type, and argmax (B, V), the positions within the
//     sequences, for the backward of max pooling. Otherwise both have no elements.
//   needs_...: whether a gradient is needed. A gradient that is not needed has no elements.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(splade_fast, m) {
  m.def(
      "pool_forward(Tensor logits, Tensor? attention_mask, int pooling, int activation, "
      "bool save_for_backward) -> (Tensor pooled, Tensor max_logits, Tensor argmax)");
  m.def("pool_backward_max(Tensor grad, Tensor max_logits, Tensor argmax, int length, int activation) -> Tensor");
  m.def("pool_backward_sum(Tensor grad, Tensor logits, Tensor? attention_mask, int activation) -> Tensor");

  // Choose between head_forward_dense and head_forward_screened; splade_fast/ops/head/forward.py implements it.
  // algorithm: 0 = auto, 1 = dense, 2 = screened.
  // source: the tensor that weight was cast from, if it was cast. The prepared weight is cached for this tensor.
  // float_output: return pooled in float32 for every dtype of hidden, because autocast runs log1p in float32.
  m.def(
      "head_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, "
      "int pooling, int activation, bool save_for_backward, bool float_output, int algorithm, Tensor? source) "
      "-> (Tensor pooled, Tensor max_logits, Tensor argmax)");
  // allow_tf32: let a float32 product read its operands as TF32. Only a CUDA kernel does so.
  m.def(
      "head_forward_dense(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, "
      "int pooling, int activation, bool save_for_backward, bool float_output, bool allow_tf32=False) "
      "-> (Tensor pooled, Tensor max_logits, Tensor argmax)");
  // Prepare the weight for head_forward_screened: packed has the rows of weight in int8, and rows has scales and
  // norms. mean: (D,) float32, about the mean of the hidden states that will be encoded. basis: (2, D, padded D)
  // float32, matrices P and Q by which hidden states and rows of weight are multiplied, with
  //   basis_error >= ‖P·Qᵀ - 1‖.
  // order: (V,) int32, needed with basis: the order in which the vocabulary entries are packed.
  // CUDA takes no basis and has another layout of packed and rows.
  m.def(
      "head_prepare(Tensor weight, Tensor mean, Tensor? basis=None, Tensor? order=None, float basis_error=0) "
      "-> (Tensor packed, Tensor rows)");
  // Write packed and rows, which head_prepare made of a weight of the same shape. Only the CPU has a kernel.
  m.def(
      "head_prepare_into(Tensor weight, Tensor mean, Tensor? basis, Tensor? order, float basis_error, "
      "Tensor(a!) packed, Tensor(b!) rows) -> ()");
  // report: int64 (4,): declined, pairs compared one by one, pairs multiplied in full precision, and percent of the
  // int8
  //   product that was made.
  // may_decline: let the op decline if the dense product is estimated to cost less. The outputs then have no elements.
  // CUDA takes max pooling of bfloat16 and float16, with at least one token and dimension. There, declined means that
  // the dense kernels have computed the outputs, whatever may_decline is.
  m.def(
      "head_forward_screened(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, "
      "int pooling, int activation, bool save_for_backward, bool float_output, Tensor mean, Tensor packed, "
      "Tensor rows, Tensor? basis, Tensor? order, bool may_decline) -> (Tensor pooled, Tensor max_logits, Tensor "
      "argmax, Tensor report)");
  m.def(
      "head_backward_max(Tensor grad, Tensor max_logits, Tensor argmax, Tensor hidden, Tensor weight, "
      "Tensor? cu_seqlens, int activation, bool needs_hidden, bool needs_weight, bool needs_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "head_backward_sum(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, "
      "Tensor? cu_seqlens, int activation, bool needs_hidden, bool needs_weight, bool needs_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  // Return the entries of each row of x (B, V) that pass every criterion that is not None (see csrc/common/prune.h),
  // as padded rows: values (B, K), padded with 0; indices (B, K), int32 and ascending, padded with -1; lengths (B,),
  // int32. K is the length of the longest row on the CPU, and min(k, V) on CUDA and if k is the only criterion. mass
  // has no CUDA kernel.
  m.def(
      "prune_rows(Tensor x, int? k, float? threshold, float? max_ratio, float? mass) "
      "-> (Tensor values, Tensor indices, Tensor lengths)");
  // Return padded rows (B, K) as dense rows (B, num_cols). Only the CPU has a kernel.
  m.def("dense_rows(Tensor values, Tensor indices, Tensor lengths, int num_cols) -> Tensor");

  // Queries are sparse rows as documents are, or dense (Q, V), with query_indices and query_lengths None.
  m.def(
      "sparse_scores(Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols) -> Tensor");
  m.def(
      "sparse_scores_backward(Tensor grad, Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols, bool needs_query, bool needs_doc) "
      "-> (Tensor grad_query_values, Tensor grad_doc_values)");
  m.def(
      "sparse_search(Tensor? query_indices, Tensor query_values, Tensor? query_lengths, "
      "Tensor doc_indices, Tensor doc_values, Tensor doc_lengths, int num_cols, int k) "
      "-> (Tensor scores, Tensor ids)");

  // Pruned index of rows that are finite and at least 0, for searches on the CPU. index: its tensors, see
  // csrc/cpu/index/index.h. order: int32 (rows,), every row once, neighbours alike.
  // First entry and first posting of each column, with those behind the last, and the steps of the maxima.
  m.def(
      "index_count(Tensor indices, Tensor values, Tensor lengths, int num_cols, Tensor order) "
      "-> (Tensor term_start, Tensor posting_start, Tensor step)");
  // Write all tensors of the index but term_start and step, which are those that index_count has returned.
  m.def(
      "index_fill(Tensor indices, Tensor values, Tensor lengths, int num_cols, Tensor order, Tensor posting_start, "
      "Tensor(a!)[] index) -> ()");
  // Raise an error if an index that comes from a file is not one that index_fill has written.
  m.def("index_check(Tensor[] index, bool should_check_numbers=True) -> ()");
  // Results are those of sparse_search among the documents that `allowed`, bool (rows,), and min_score leave. Places
  // that remain have id -1 and score -inf. algorithm: 0 auto, 1 blocks, 2 accumulators, with the same results.
  m.def(
      "index_search(Tensor? query_indices, Tensor query_values, Tensor? query_lengths, Tensor[] index, int k, "
      "float min_score, Tensor? allowed, int algorithm=0) -> (Tensor scores, Tensor ids)");

  // tables: any dtype and shape (rows, ...), all with the same number of rows. indices: int64 (count,).
  // With CUDA indices the tables may lie in pinned host memory. The rows are returned on the device of the indices.
  m.def("gather_rows(Tensor[] tables, Tensor indices) -> Tensor[]");
  // Of several writes to one row the last remains. mask: bool (count,), where false rows are not written and may have
  // any index.
  m.def("scatter_rows_(Tensor(a!)[] tables, Tensor indices, Tensor[] rows, Tensor? mask) -> ()");

  // One step of a cache of items. An item is a slot: a row of each table, an age (int32) and a flag valid (bool).
  // Rows of the first tables are refreshed, new items replace the oldest ones in all tables (of equal ages, the lowest
  // slot first), and all other ages grow by one. use_lru: give a refreshed item the age of a new one.
  // See splade_fast/ops/gather.py.
  m.def(
      "update_cache_(Tensor(a!)[] tables, Tensor(b!) age, Tensor(c!) valid, Tensor[] new_rows, Tensor? new_mask, "
      "Tensor[] refreshed_rows, Tensor? refreshed_slots, Tensor? refreshed_mask, bool use_lru) -> ()");

  // Gumbel-Max draws, see splade_fast/ops/sample.py.
  // state: int64 (2,), the seed and the step, which the caller advances.
  // valid: bool (slots,) or (queries, slots). exclude: bool (queries, slots), or int64 (queries, any) slots.
  // exact: keep the top_k highest scores instead of the highest score of each of top_k groups.
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
