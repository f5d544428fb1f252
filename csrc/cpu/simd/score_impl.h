// Kernels of score: sparse documents against a block of queries.
//
// A document is read once. Its entries are first reduced to hits, the columns that a query of the block uses. Each hit
// then adds value x row of the query table to sums in registers, with a lane for each query. The sum of a pair runs
// over ascending columns, so it does not depend on the block, the tile or the thread.
#pragma once

#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

constexpr int kSumVectors = 4;  // vectors of sums in registers: 64 queries with AVX-512

constexpr int64_t kRowsAhead = 4;  // rows to prefetch

// Whether a row holds inf or NaN. Such a row may skip no entry, because their product with 0 is NaN.
template <typename T>
inline bool has_nonfinite(const T* values, int64_t count) {
  using Acc = Accumulator<T>;
  Vec<Acc> zero = {};  // sum of x * 0, which is 0 or NaN
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) zero += load_vec(values + i) * Vec<Acc>{};
  if (i < count) zero += load_partial(values + i, count - i) * Vec<Acc>{};
  bool is_nan = false;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) is_nan |= zero[lane] != 0;
  return is_nan;
}

// Reduce the entries of a row to hits, one by one. With `should_keep_all`, entries whose column no query uses are hits
// too. Return the number of hits, or -1 if a column is out of range.
template <typename T>
inline int64_t collect_hits(const ScoreTask<T>& task, const int32_t* indices, const T* values, int64_t length,
                            bool should_keep_all) {
  int64_t hits = 0;
  bool has_outside = false;
  for (int64_t j = 0; j < length; ++j) {
    const uint32_t column = static_cast<uint32_t>(indices[j]);
    const bool is_inside = column < static_cast<uint64_t>(task.num_cols);
    has_outside |= !is_inside;
    const int32_t row = task.rows[is_inside ? column : task.num_cols];
    task.hit_rows[hits] = row;
    task.hit_values[hits] = to_acc(values[j]);
    hits += (row != 0) | should_keep_all;
  }
  return has_outside ? -1 : hits;
}

#if defined(__AVX512F__)
// Reduce 16 entries at a time.
template <typename T, typename = std::enable_if_t<sizeof(Accumulator<T>) == 4>>
inline int64_t collect_hits_by_vector(const ScoreTask<T>& task, const int32_t* indices, const T* values,
                                      int64_t length) {
  const __m512i num_cols = _mm512_set1_epi32(static_cast<int>(task.num_cols));
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  __mmask16 outside = 0, nonfinite = 0;
  int64_t hits = 0;
  for (int64_t j = 0; j < length; j += 16) {
    const int64_t rest = length - j;
    const __mmask16 used = rest >= 16 ? 0xffff : static_cast<__mmask16>((1 << rest) - 1);
    const __m512i columns = _mm512_maskz_loadu_epi32(used, indices + j);
    const __m512 value = reinterpret_cast<__m512>(rest >= 16 ? load_vec(values + j) : load_partial(values + j, rest));
    const __mmask16 inside = _mm512_mask_cmplt_epu32_mask(used, columns, num_cols);
    outside |= used & static_cast<__mmask16>(~inside);
    nonfinite |= static_cast<__mmask16>(~_mm512_cmp_ps_mask(_mm512_abs_ps(value), infinity, _CMP_LT_OQ));
    const __m512i row = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), inside, columns, task.rows, 4);
    const __mmask16 hit = _mm512_test_epi32_mask(row, row);
    _mm512_storeu_si512(task.hit_rows + hits, _mm512_maskz_compress_epi32(hit, row));
    _mm512_storeu_ps(task.hit_values + hits, _mm512_maskz_compress_ps(hit, value));
    hits += __builtin_popcount(hit);
  }
  if (outside) return -1;
  return nonfinite ? collect_hits(task, indices, values, length, true) : hits;
}
#elif defined(__AVX2__)
// The rows of the table of eight columns. Eight loads take less time than a gather on many machines.
inline __m256i load_rows(const int32_t* rows, __m256i columns) {
  alignas(32) uint32_t column[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(column), columns);
  return _mm256_setr_epi32(rows[column[0]], rows[column[1]], rows[column[2]], rows[column[3]], rows[column[4]],
                           rows[column[5]], rows[column[6]], rows[column[7]]);
}

// Reduce 8 entries at a time.
template <typename T, typename = std::enable_if_t<sizeof(Accumulator<T>) == 4>>
inline int64_t collect_hits_by_vector(const ScoreTask<T>& task, const int32_t* indices, const T* values,
                                      int64_t length) {
  const __m256i num_cols = _mm256_set1_epi32(static_cast<int>(task.num_cols));
  __m256i outside = _mm256_setzero_si256();
  Vec<float> nonfinite = {};  // sum of x * 0, which is 0 or NaN
  int64_t hits = 0;
  for (int64_t j = 0; j < length; j += 8) {
    const int64_t rest = length - j;
    __m256i columns;
    Vec<float> value;
    if (rest >= 8) {
      columns = load_bits<__m256i>(indices + j);
      value = load_vec(values + j);
    } else {
      int32_t padded[8] = {};
      std::memcpy(padded, indices + j, rest * sizeof(int32_t));
      columns = load_bits<__m256i>(padded);
      value = load_partial(values + j, rest);
    }
    // Columns out of range become num_cols, whose row is 0.
    columns = _mm256_min_epu32(columns, num_cols);
    outside = _mm256_or_si256(outside, _mm256_cmpeq_epi32(columns, num_cols));
    nonfinite += value * Vec<float>{};
    const Mask<float> row = reinterpret_cast<Mask<float>>(load_rows(task.rows, columns));
    unsigned hit = lane_bits<float>(row != 0);
    if (rest < 8) hit &= (1u << rest) - 1;
    store_bits(task.hit_rows + hits, compress(row, hit));
    store_bits(task.hit_values + hits, compress(value, hit));
    hits += __builtin_popcount(hit);
  }
  if (_mm256_movemask_epi8(outside) != 0) return -1;
  const Mask<float> finite = nonfinite == 0;
  return lane_bits<float>(finite) == 0xff ? hits : collect_hits(task, indices, values, length, true);
}
#endif

template <typename T>
inline int64_t collect_row(const ScoreTask<T>& task, const int32_t* indices, const T* values, int64_t length) {
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (sizeof(Accumulator<T>) == 4) return collect_hits_by_vector(task, indices, values, length);
#endif
  return collect_hits(task, indices, values, length, has_nonfinite(values, length));
}

template <typename T, int kVectors>
inline void add_hits(const ScoreTask<T>& task, int64_t hits, int64_t first, Accumulator<T>* scores) {
  using Acc = Accumulator<T>;
  Vec<Acc> sum[kVectors] = {};
  const Acc* table = task.table + first;
  for (int64_t i = 0; i < hits; ++i) {
    const Vec<Acc> value = broadcast<Vec<Acc>>(task.hit_values[i]);
    const Acc* row = table + task.hit_rows[i] * task.lanes;
    for (int j = 0; j < kVectors; ++j) sum[j] += value * load_bits<Vec<Acc>>(row + j * kLanes<Acc>);
  }
  for (int j = 0; j < kVectors; ++j) store_bits(scores + first + j * kLanes<Acc>, sum[j]);
}

// The loop over the hits of a row ends in a branch that cannot be predicted, after which the hardware starts to
// prefetch anew. So rows are prefetched here.
template <typename T>
inline void prefetch_row(const ScoreTask<T>& task, int64_t row) {
  constexpr int64_t kLine = 64;
  const char* indices = reinterpret_cast<const char*>(task.indices + row * task.width);
  const char* values = reinterpret_cast<const char*>(task.values + row * task.width);
  for (int64_t byte = 0; byte < task.width * 4; byte += kLine) __builtin_prefetch(indices + byte);
  for (int64_t byte = 0; byte < task.width * static_cast<int64_t>(sizeof(T)); byte += kLine) {
    __builtin_prefetch(values + byte);
  }
}

template <typename T>
int64_t score_rows(const ScoreTask<T>& task, int64_t begin, int64_t end) {
  using Acc = Accumulator<T>;
  Acc* scores = task.scores;
  for (int64_t n = begin; n < end; ++n, scores += task.lanes) {
    prefetch_row(task, n + kRowsAhead);
    const int64_t length = task.lengths[n];
    if (length < 0 || length > task.width) return n;
    const int64_t hits = collect_row(task, task.indices + n * task.width, task.values + n * task.width, length);
    if (hits < 0) return n;
    int64_t first = 0;
    for (; first + kSumVectors * kLanes<Acc> <= task.lanes; first += kSumVectors * kLanes<Acc>) {
      add_hits<T, kSumVectors>(task, hits, first, scores);
    }
    for (; first < task.lanes; first += kLanes<Acc>) add_hits<T, 1>(task, hits, first, scores);
  }
  return end;
}

// Transpose scores (count, lanes) to the rows of `queries` queries.
template <typename T>
void store_scores(T* target, int64_t stride, const Accumulator<T>* scores, int64_t lanes, int64_t queries,
                  int64_t count) {
  using Acc = Accumulator<T>;
  constexpr int kCount = kLanes<Acc>;
  for (int64_t n = 0; n < count; n += kCount) {
    const int64_t columns = count - n < kCount ? count - n : kCount;
    for (int64_t q = 0; q < queries; q += kCount) {
      Vec<Acc> square[kCount];
      for (int i = 0; i < kCount; ++i) {
        square[i] = i < columns ? load_bits<Vec<Acc>>(scores + (n + i) * lanes + q) : Vec<Acc>{};
      }
      transpose(square);
      const int64_t rows = queries - q < kCount ? queries - q : kCount;
      for (int64_t i = 0; i < rows; ++i) {
        T* row = target + (q + i) * stride + n;
        columns == kCount ? store_vec(row, square[i]) : store_partial(row, square[i], columns);
      }
    }
  }
}

// Sort keys of the scores.
template <typename Acc>
inline Mask<Acc> to_keys(Vec<Acc> scores) {
  typedef Mask<Acc> Int;
  const Int bits = reinterpret_cast<Int>(scores == 0 ? Vec<Acc>{} : scores);
  const Int lowest = broadcast<Int>(static_cast<SortKey<Acc>>(SortKey<Acc>(1) << (8 * sizeof(Acc) - 1)));
  const Int keys = bits < 0 ? bits ^ ~lowest : bits;
  return scores == scores ? keys : ~lowest;
}

template <typename Acc>
int64_t find_above_bounds(const Acc* scores, int64_t count, int64_t lanes, const SortKey<Acc>* bounds,
                          SortKey<Acc>* keys, int32_t* places) {
  int64_t found = 0;
  for (int64_t first = 0; first < count * lanes; first += lanes) {
    for (int64_t q = 0; q < lanes; q += kLanes<Acc>) {
      const Mask<Acc> key = to_keys<Acc>(load_bits<Vec<Acc>>(scores + first + q));
      const Mask<Acc> above = key > load_bits<Mask<Acc>>(bounds + q);
      if (!has_set_lane(above)) continue;
      for (int lane = 0; lane < kLanes<Acc>; ++lane) {
        if (!above[lane]) continue;
        keys[found] = key[lane];
        places[found++] = static_cast<int32_t>(first + q + lane);
      }
    }
  }
  return found;
}

}  // namespace
}  // namespace splade_fast::cpu
