// Kernels of the pruned index: upper bounds of all blocks of documents for a query, and scores of a group of blocks.
// The layout of the index is described in cpu/index/index.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd/dtypes.h"

namespace splade_fast::cpu {

constexpr int64_t kBlockDocuments = 8;
constexpr int64_t kGroupBlocks = 32;
constexpr int64_t kGroupDocuments = kBlockDocuments * kGroupBlocks;  // places in a group take one byte

// An entry with so many postings has a bit for each document of the group, in the first bytes that others use for a
// list of places. A vector of documents is then scored at once.
constexpr int64_t kBitmapBytes = kGroupDocuments / 8;

// Entries [begin, end) of a term. An entry has the postings of the term in one group.
struct TermEntries {
  const int32_t* group;  // of each entry of the index
  // (entries, kGroupBlocks), the largest value in each block, rounded up to a multiple of a step
  const uint8_t* maximum;
  int64_t begin, end;
  int64_t first_group;  // groups are counted from here
};

// Postings [start, end) of a term of a query.
template <typename Acc>
struct FoundPostings {
  int64_t start, end;
  Acc weight;
};

// Postings of an index.
template <typename T>
struct Postings {
  const int64_t* start;     // (entries + 1,) first posting of an entry
  const uint8_t* document;  // (postings,) ascending places in the group, or bits
  const T* value;           // (postings,)
  int64_t count;
};

// A query as it reads the postings, and scratch memory.
template <typename T, typename Acc>
struct PostingsQuery {
  int64_t terms;
  const Acc* weight;     // (terms,), by ascending column
  const int32_t* entry;  // (terms, groups) entry of a term in a group of the range, -1 if it has none
  int64_t groups;
  Postings<T> postings;
  FoundPostings<Acc>* postings_of_term;  // (terms + 1,)
  Acc* scores;                           // (kGroupDocuments,)
};

template <typename T, typename Acc>
struct PostingsKernels {
  // Compute the scores of a group, with the bits that score_rows computes. Return false if a posting is out of range.
  bool (*score_group)(const PostingsQuery<T, Acc>& query, int64_t group);
  // Add weight * value of the entries [begin, end) to the scores of the groups from first_group on, up to the first
  // entry of a later group, and return that one, or -1 if a group or a posting is out of range.
  int64_t (*add_term)(const Postings<T>& postings, const TermEntries& entries, Acc weight, int64_t groups, Acc* scores);
  // Find the places in a group whose scores have at least the sort key `least`, and return their number. Keys compare
  // well where the processor takes denormal numbers for zero.
  int64_t (*find_scores)(const Acc* scores, SortKey<Acc> least, int32_t* found);
};

struct IndexKernels {
  // Add weight * maximum to the bounds (groups, kGroupBlocks) of the blocks of a term, and store the entry of each
  // group in `entry` (groups,). Return false if a group is out of range.
  bool (*add_bounds)(const TermEntries& entries, float weight, int64_t groups, float* bounds, int32_t* entry);
  // largest[g] = the largest of the bounds of group g.
  void (*group_bounds)(const float* bounds, int64_t groups, float* largest);
  // Find the places with least <= bound < limit, and return their number. There is room to read whole vectors.
  int64_t (*find_bounds)(const float* bounds, int64_t count, float least, float limit, int32_t* found);
  PostingsKernels<float, float> f32;
  PostingsKernels<bfloat16, float> bf16;
  PostingsKernels<float16, float> f16;
  // Scores in float64.
  PostingsKernels<double, double> f64;
  PostingsKernels<float, double> wide_f32;
  PostingsKernels<bfloat16, double> wide_bf16;
  PostingsKernels<float16, double> wide_f16;
};

// Tables of all instruction sets of the build. This machine may not support all of them.
const IndexKernels& index_portable();
#if defined(__x86_64__)
const IndexKernels& index_avx2();
const IndexKernels& index_avx512();
#endif

// Table of the instruction set that instruction_set.cpp has chosen.
const IndexKernels& index_kernels();

template <typename T, typename Acc>
const PostingsKernels<T, Acc>& postings_kernels() {
  const IndexKernels& all = index_kernels();
  if constexpr (std::is_same_v<Acc, float>) {
    if constexpr (std::is_same_v<T, float>) return all.f32;
    if constexpr (std::is_same_v<T, bfloat16>) return all.bf16;
    if constexpr (std::is_same_v<T, float16>) return all.f16;
  } else {
    if constexpr (std::is_same_v<T, double>) return all.f64;
    if constexpr (std::is_same_v<T, float>) return all.wide_f32;
    if constexpr (std::is_same_v<T, bfloat16>) return all.wide_bf16;
    if constexpr (std::is_same_v<T, float16>) return all.wide_f16;
  }
}

}  // namespace splade_fast::cpu
