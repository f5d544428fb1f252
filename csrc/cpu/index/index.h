// Layout of a pruned index, and its tensors as build, check and search share them.
//
// Documents have an order in which neighbours are alike. kBlockDocuments neighbours are a block, and kGroupBlocks
// neighbouring blocks a group. An entry has the postings of one term in one group: the documents with the term, and
// their values. Entries are sorted by term, then by group, and the postings of an entry by document.
#pragma once

#include <vector>

#include "common/dispatch.h"
#include "common/integers.h"
#include "cpu/dispatch.h"
#include "cpu/simd/index.h"

namespace splade_fast::cpu {

// Tensors of an index, in the order in which the ops take and return them.
struct IndexTensors {
  enum { kTermStart, kStep, kGroup, kStart, kMaximum, kDocument, kValue, kId, kTensors };
};

template <typename T>
struct PrunedIndex {
  int64_t num_cols, entries, postings, documents;
  const int64_t* term_start;  // (num_cols + 1,) first entry of a term
  const double* step;         // (num_cols,) unit of the maxima of a term, with 24 significant bits
  const int32_t* group;       // (entries,)
  const int64_t* start;       // (entries + 1,) first posting of an entry
  const uint8_t* maximum;   // (entries, kGroupBlocks) a value in a block is at most maximum * step; 0 without postings
  const uint8_t* document;  // (postings,) places of the documents in the group of an entry, or bits; see simd/index.h
  const T* value;           // (postings,)
  const int32_t* id;        // (documents,) row of a document

  int64_t groups() const { return ceil_div(documents, kGroupDocuments); }
};

// Check dtypes and shapes, and call body(PrunedIndex<T>).
template <typename Body>
void with_index(const std::vector<Tensor>& tensors, Body body) {
  using I = IndexTensors;
  STD_TORCH_CHECK(tensors.size() == I::kTensors, "index must have ", int64_t{I::kTensors}, " tensors, got ",
                  tensors.size());
  const auto check = [&](int place, const char* name, ScalarType dtype, int64_t dims) {
    const Tensor& tensor = tensors[place];
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == dims && tensor.is_contiguous() && tensor.is_cpu(),
                    name, " of the index must be contiguous ", torch::headeronly::toString(dtype), " with ", dims,
                    " dimensions on the CPU, got ", describe(tensor));
  };
  check(I::kTermStart, "term_start", ScalarType::Long, 1);
  check(I::kStep, "step", ScalarType::Double, 1);
  check(I::kGroup, "group", ScalarType::Int, 1);
  check(I::kStart, "start", ScalarType::Long, 1);
  check(I::kMaximum, "maximum", ScalarType::Byte, 2);
  check(I::kDocument, "document", ScalarType::Byte, 1);
  check(I::kValue, "value", tensors[I::kValue].scalar_type(), 1);
  check(I::kId, "id", ScalarType::Int, 1);
  const int64_t num_cols = tensors[I::kStep].size(0), entries = tensors[I::kGroup].size(0);
  const int64_t postings = tensors[I::kDocument].size(0), documents = tensors[I::kId].size(0);
  const Tensor& maximum = tensors[I::kMaximum];
  STD_TORCH_CHECK(tensors[I::kTermStart].size(0) == num_cols + 1 && tensors[I::kStart].size(0) == entries + 1 &&
                      maximum.size(0) == entries && maximum.size(1) == kGroupBlocks &&
                      tensors[I::kValue].size(0) == postings && entries <= INT32_MAX &&
                      documents < INT32_MAX - kGroupDocuments,
                  "tensors of the index must have fitting shapes");
  dispatch_floating(tensors[I::kValue].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    body(PrunedIndex<T>{num_cols, entries, postings, documents, const_data<int64_t>(tensors[I::kTermStart]),
                        const_data<double>(tensors[I::kStep]), const_data<int32_t>(tensors[I::kGroup]),
                        const_data<int64_t>(tensors[I::kStart]), const_data<uint8_t>(maximum),
                        const_data<uint8_t>(tensors[I::kDocument]), const_data<T>(tensors[I::kValue]),
                        const_data<int32_t>(tensors[I::kId])});
  });
}

// Exact in the accumulation type.
inline float to_number(float value) { return value; }
inline double to_number(double value) { return value; }
inline float to_number(float16 value) { return static_cast<float>(value); }
inline float to_number(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

}  // namespace splade_fast::cpu
