// The kernels of all instruction sets that this machine supports, against loops in double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/simd/kernels.h"
#include "expect.h"
#include "instruction_sets.h"

using namespace splade_fast;
using namespace splade_fast::cpu;

static const float kInf = std::numeric_limits<float>::infinity();
static const float kNan = std::numeric_limits<float>::quiet_NaN();

static double saturate(double x, Activation activation) {
  const double weight = x < 0 ? 0 : x;
  if (activation == Activation::kRelu) return weight;
  return activation == Activation::kLog1pRelu ? std::log1p(weight) : std::log1p(std::log1p(weight));
}

// Products and sums of small integers are exact in every type, so results must be equal.
template <typename T>
static T small_integer(std::mt19937& random) {
  const float value = static_cast<float>(static_cast<int>(random() % 7) - 3);
  if constexpr (std::is_same_v<T, bfloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bfloat16{static_cast<uint16_t>(bits >> 16)};
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
static double to_double(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  } else {
    return static_cast<double>(value);
  }
}

template <typename T>
static void test_head_max(const Kernels<T>& kernel, int64_t tokens, int64_t dim, int64_t columns) {
  using Acc = Accumulator<T>;
  std::mt19937 random(static_cast<unsigned>(tokens * 31 + dim));
  std::vector<T> hidden(tokens * dim), weight(columns * dim);
  for (T& x : hidden) x = small_integer<T>(random);
  for (T& x : weight) x = small_integer<T>(random);
  std::vector<int32_t> sequence(tokens), position(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    sequence[t] = static_cast<int32_t>(t / 5);
    position[t] = static_cast<int32_t>(t % 5 + 7);
  }
  const int64_t tile = kernel.tile_tokens, stride = kernel.panel_columns, rows = tokens / 5 + 1;
  std::vector<char> packed_tokens((tokens / tile + 1) * kernel.packed_bytes(tile, dim) + 64);
  std::vector<char> packed_weight(kernel.packed_bytes(stride, dim) + 64);
  for (int64_t t = 0; t < tokens; t += tile) {
    kernel.pack(packed_tokens.data() + t / tile * kernel.packed_bytes(tile, dim), tile, hidden.data() + t * dim, dim,
                nullptr, std::min(tile, tokens - t), dim);
  }
  kernel.pack(packed_weight.data(), stride, weight.data(), dim, nullptr, columns, dim);
  std::vector<Acc> value(rows * stride, -std::numeric_limits<Acc>::infinity());
  std::vector<Position<Acc>> argmax(rows * stride, 0);
  kernel.head_max({packed_tokens.data(), packed_weight.data(), dim, tokens, sequence.data(), position.data(),
                   value.data(), argmax.data(), nullptr, stride, nullptr, Activation::kRelu, weight.data(), 0});
  for (int64_t row = 0; row * 5 < tokens; ++row) {
    for (int64_t v = 0; v < columns; ++v) {
      double best = -kInf;
      int64_t where = 0;
      for (int64_t t = row * 5; t < std::min(tokens, row * 5 + 5); ++t) {
        double logit = 0;
        for (int64_t d = 0; d < dim; ++d) logit += to_double(hidden[t * dim + d]) * to_double(weight[v * dim + d]);
        if (logit > best) {
          best = logit;
          where = position[t];
        }
      }
      EXPECT(value[row * stride + v] == best, "row %ld entry %ld: %g, not %g", static_cast<long>(row),
             static_cast<long>(v), static_cast<double>(value[row * stride + v]), best);
      EXPECT(argmax[row * stride + v] == where, "ties go to the lowest position");
    }
  }
}

template <typename T>
static void test_type(const Kernels<T>& kernel) {
  for (const int64_t tokens : {1, 5, 29}) {
    for (const int64_t dim : {0, 1, 3, 17, 64}) test_head_max<T>(kernel, tokens, dim, kernel.panel_columns - 1);
  }
}

// Relative error of the float activations over the whole positive range, in units of 2^-24.
static void test_activation(const Kernels<float>& kernel) {
  std::vector<float> x, y;
  for (float magnitude = 1e-38f; magnitude < 1e38f; magnitude *= 1.0007f) x.push_back(magnitude);
  y.resize(x.size());
  for (const Activation activation : {Activation::kRelu, Activation::kLog1pRelu, Activation::kLog1pLog1pRelu}) {
    std::vector<float> logits = x;
    kernel.activate_logits(logits.data(), nullptr, static_cast<int64_t>(x.size()), activation, y.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = saturate(x[i], activation);
      const double error = std::abs(y[i] - expected) / expected * 0x1p24;
      EXPECT(error <= 4, "%s: activation %ld of %g: error of %g half-ulps", "log1p", static_cast<long>(activation),
             static_cast<double>(x[i]), error);
    }
  }
  float special[] = {-kInf, -1, -0.0f, 0, kInf, kNan, 1}, pooled[7];
  kernel.activate_logits(special, nullptr, 7, Activation::kLog1pRelu, pooled);
  EXPECT(pooled[0] == 0 && pooled[1] == 0 && pooled[2] == 0 && pooled[3] == 0, "not positive: zero");
  EXPECT(pooled[4] == kInf && std::isnan(pooled[5]), "inf and NaN pass");
}

// The first NaN is the maximum, wherever it stands.
static void test_pool_nan(const Kernels<float>& kernel) {
  std::vector<float> rows[6];
  const float column[6] = {1, kNan, 5, kNan, -kInf, 2};
  std::vector<const float*> pointers;
  std::vector<int32_t> position;
  for (int r = 0; r < 6; ++r) {
    rows[r].assign(70, column[r]);
    pointers.push_back(rows[r].data());
    position.push_back(r);
  }
  std::vector<float> value(128, -kInf);
  std::vector<int32_t> argmax(128, 0);
  kernel.pool_max(pointers.data(), position.data(), 6, 70, value.data(), argmax.data());
  for (int v = 0; v < 70; ++v) EXPECT(std::isnan(value[v]) && argmax[v] == 1, "column %d", v);
}

// The k largest entries of a row, collected through a small buffer: NaN is the largest, and of equal entries the first
// are kept.
template <typename T>
static void test_prune(const Kernels<T>& kernel, int64_t columns, int64_t k, bool special) {
  using Acc = Accumulator<T>;
  std::mt19937 random(static_cast<unsigned>(columns * 7 + k));
  std::vector<Acc> wide(columns);
  for (Acc& x : wide) {
    x = static_cast<Acc>(static_cast<int>(random() % 200) - 100);
    if (special && random() % 8 == 0) {
      const Acc values[] = {kNan, -kNan, kInf, -kInf, 0, Acc(-0.0)};
      x = values[random() % 6];
    }
  }
  std::vector<T> row(columns);
  kernel.store(row.data(), wide.data(), columns);
  std::vector<int32_t> order(columns);
  for (int64_t i = 0; i < columns; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return wide[a] > wide[b] || (std::isnan(wide[a]) && !std::isnan(wide[b]));
  });
  order.resize(std::min(k, columns));
  std::sort(order.begin(), order.end());

  constexpr int64_t kSlack = RowEntries<Acc>::kSlack;
  const int64_t capacity = k + kSlack;
  std::vector<Acc> value(capacity + kSlack);
  std::vector<int32_t> column(capacity + kSlack);
  std::vector<SortKey<Acc>> key(capacity + kSlack);
  RowEntries<Acc> found{value.data(), column.data(), key.data(), capacity, 0};
  Acc threshold = kNan;  // no threshold
  for (int64_t next = 0; next < columns;) {
    next = kernel.collect(row.data(), next, columns, threshold, found);
    EXPECT(found.count <= capacity && (next == columns || found.count > k), "stops only when full");
    if (found.count <= k) continue;
    threshold = kernel.keep_largest(found, k);
    if (std::isnan(threshold)) break;
  }
  EXPECT(found.count == static_cast<int64_t>(order.size()), "%ld kept of %ld, k = %ld", static_cast<long>(found.count),
         static_cast<long>(columns), static_cast<long>(k));
  for (int64_t i = 0; i < found.count; ++i) {
    EXPECT(column[i] == order[i], "k = %ld: column %d, not %d", static_cast<long>(k), column[i], order[i]);
    const bool is_same = value[i] == wide[order[i]] || (std::isnan(value[i]) && std::isnan(wide[order[i]]));
    EXPECT(is_same, "value of column %d", column[i]);
  }
}

template <typename T>
static void test_prune_sizes(const Kernels<T>& kernel) {
  for (const int64_t columns : {1, 7, 64, 65, 300, 1000}) {
    for (const int64_t k : {1, 2, 17, 128, 999}) {
      test_prune<T>(kernel, columns, k, false);
      test_prune<T>(kernel, columns, k, true);
    }
  }
}

// Scores of documents against a table of queries. Values are small integers, so that every sum is exact. Document n is
// empty if n % 4 == 1 and has all slots in use if n % 4 == 2. With `special`, some documents have inf and NaN.
template <typename T>
static void test_score(const Kernels<T>& kernel, int64_t queries, int64_t width, bool special) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = 90, kDocuments = 37;
  const int64_t lanes = (queries + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  std::mt19937 random(static_cast<unsigned>(queries * 131 + width));

  // Queries use two of three columns.
  std::vector<int32_t> table_row(kColumns + 1, 0);
  std::vector<Acc> table(lanes, 0);
  for (int64_t column = 0; column < kColumns; ++column) {
    if (column % 3 == 1) continue;
    table_row[column] = static_cast<int32_t>(table.size() / lanes);
    for (int64_t q = 0; q < lanes; ++q) table.push_back(q < queries ? static_cast<int>(random() % 7) - 3 : 0);
  }
  std::vector<int32_t> indices(kDocuments * width, -1), lengths(kDocuments);
  std::vector<Acc> wide(kDocuments * width, 0);
  for (int64_t n = 0; n < kDocuments; ++n) {
    const int64_t length = n % 4 == 1 ? 0 : n % 4 == 2 ? width : static_cast<int64_t>(random() % (width + 1));
    lengths[n] = static_cast<int32_t>(length);
    for (int64_t j = 0; j < length; ++j) {
      const int64_t entry = n * width + j;
      indices[entry] = static_cast<int32_t>(j * kColumns / width);  // ascending, at most kColumns - 1
      wide[entry] = static_cast<int>(random() % 7) - 3;
      if (special && n % 5 == 0 && random() % 4 == 0) wide[entry] = random() % 2 ? kInf : kNan;
    }
  }
  std::vector<T> values(wide.size());
  kernel.store(values.data(), wide.data(), static_cast<int64_t>(wide.size()));

  std::vector<int32_t> hit_rows(width + kMaxLanes);
  std::vector<Acc> hit_values(width + kMaxLanes), scores(kDocuments * lanes, kNan);
  const ScoreTask<T> task{table_row.data(), table.data(),      kColumns,       lanes,
                          indices.data(),   values.data(),     lengths.data(), width,
                          hit_rows.data(),  hit_values.data(), scores.data()};
  EXPECT(kernel.score_rows(task, 0, kDocuments) == kDocuments, "all documents are allowed");
  std::vector<Acc> expected(kDocuments * lanes);
  for (int64_t n = 0; n < kDocuments; ++n) {
    for (int64_t q = 0; q < lanes; ++q) {
      Acc sum = 0;
      for (int64_t j = n * width; j < n * width + lengths[n]; ++j) {
        sum += wide[j] * table[table_row[indices[j]] * lanes + q];  // 0 times inf is NaN
      }
      expected[n * lanes + q] = sum;
      const Acc found = scores[n * lanes + q];
      EXPECT(found == sum || (std::isnan(found) && std::isnan(sum)), "document %ld, query %ld: %g, not %g",
             static_cast<long>(n), static_cast<long>(q), static_cast<double>(found), static_cast<double>(sum));
    }
  }

  // The scores, stored to rows of a wider result.
  constexpr int64_t kStride = kDocuments + 3;
  std::vector<T> stored(queries * kStride), exact(expected.size());
  kernel.store_scores(stored.data(), kStride, expected.data(), lanes, queries, kDocuments);
  kernel.store(exact.data(), expected.data(), static_cast<int64_t>(expected.size()));
  for (int64_t q = 0; q < queries; ++q) {
    for (int64_t n = 0; n < kStride; ++n) {
      const double found = to_double(stored[q * kStride + n]);
      const double wanted = n < kDocuments ? to_double(exact[n * lanes + q]) : 0;
      EXPECT(found == wanted || (std::isnan(found) && std::isnan(wanted)), "stored document %ld, query %ld: %g, not %g",
             static_cast<long>(n), static_cast<long>(q), found, wanted);
    }
  }

  // An invalid document stops the scores, and its number is returned.
  if (width < 3) return;
  for (const int32_t column : {static_cast<int32_t>(kColumns), -1, std::numeric_limits<int32_t>::min()}) {
    std::vector<int32_t> outside = indices;
    outside[14 * width + width - 1] = column;
    ScoreTask<T> bad = task;
    bad.indices = outside.data();
    EXPECT(kernel.score_rows(bad, 3, kDocuments) == 14, "column %d in document 14", column);
  }
  for (const int32_t length : {-1, static_cast<int32_t>(width + 1)}) {
    std::vector<int32_t> wrong = lengths;
    wrong[14] = length;
    ScoreTask<T> bad = task;
    bad.lengths = wrong.data();
    EXPECT(kernel.score_rows(bad, 3, kDocuments) == 14, "length %d of document 14", length);
  }
}

// Scores above the bound of their query, where NaN is above all numbers and -0 equals 0.
template <typename T>
static void test_find_above_bounds(const Kernels<T>& kernel) {
  using Acc = Accumulator<T>;
  using Key = SortKey<Acc>;
  constexpr Key kLowest = std::numeric_limits<Key>::min(), kHighest = std::numeric_limits<Key>::max();
  constexpr int64_t kLanes = 2 * kMaxLanes, kCount = 9;
  const Acc ranked[] = {-kInf, -3, Acc(-0.5), 0, Acc(0.25), 1, 7, kInf, kNan};  // ascending
  std::vector<Key> all(kCount * kLanes, 0), bounds(kLanes, kLowest), keys(kCount * kLanes);
  std::vector<int32_t> places(kCount * kLanes);
  std::vector<Acc> scores(kCount * kLanes);
  for (int64_t i = 0; i < kCount; ++i) std::fill_n(&scores[i * kLanes], kLanes, ranked[i]);
  EXPECT(kernel.find_above_bounds(scores.data(), kCount, kLanes, bounds.data(), all.data(), places.data()) ==
             kCount * kLanes,
         "all are above the lowest key");
  for (int64_t i = 1; i < kCount; ++i) EXPECT(all[i * kLanes] > all[(i - 1) * kLanes], "keys ascend at %ld", long(i));
  const auto find_key = [&](Acc score) {
    for (int64_t i = 0; i < kCount; ++i) {
      if (score == ranked[i] || (std::isnan(score) && std::isnan(ranked[i]))) return all[i * kLanes];
    }
    return kLowest;
  };

  std::mt19937 random(3);
  for (Acc& score : scores) {
    score = ranked[random() % kCount];
    if (score == 0 && random() % 2) score = Acc(-0.0);
    if (std::isnan(score) && random() % 2) score = -score;
  }
  for (Key& bound : bounds) bound = random() % 4 ? all[random() % kCount * kLanes] : kHighest;
  const int64_t found =
      kernel.find_above_bounds(scores.data(), kCount, kLanes, bounds.data(), keys.data(), places.data());
  int64_t next = 0;
  for (int64_t place = 0; place < kCount * kLanes; ++place) {
    const Key key = find_key(scores[place]);
    if (key <= bounds[place % kLanes]) continue;
    EXPECT(next < found && places[next] == place && keys[next] == key, "score at %ld", static_cast<long>(place));
    ++next;
  }
  EXPECT(next == found, "%ld scores, not %ld", static_cast<long>(found), static_cast<long>(next));
}

// The products of pairs have the bits of the products of a tile. The maximum over one token is a product of a tile.
template <typename T>
static void test_multiply_pairs(const Kernels<T>& kernel, int64_t count, int64_t dim) {
  using Acc = Accumulator<T>;
  std::mt19937 random(static_cast<unsigned>(count * 13 + dim));
  std::normal_distribution<double> normal;
  std::vector<Acc> wide(2 * count * dim);
  for (Acc& x : wide) x = static_cast<Acc>(normal(random));
  std::vector<T> rows(wide.size());
  kernel.store(rows.data(), wide.data(), static_cast<int64_t>(wide.size()));
  std::vector<const T*> tokens(count), entries(count);
  for (int64_t i = 0; i < count; ++i) {
    tokens[i] = rows.data() + i * dim;
    entries[i] = rows.data() + (count + i * 7 % count) * dim;
  }
  std::vector<Acc> products(count);
  kernel.multiply_pairs(tokens.data(), entries.data(), count, dim, products.data());
  std::vector<char> packed_token(kernel.packed_bytes(kernel.tile_tokens, dim) + 64);
  std::vector<char> packed_entry(kernel.packed_bytes(kernel.panel_columns, dim) + 64);
  const int32_t zero = 0;
  for (int64_t i = 0; i < count; ++i) {
    kernel.pack(packed_token.data(), kernel.tile_tokens, tokens[i], dim, nullptr, 1, dim);
    kernel.pack(packed_entry.data(), kernel.panel_columns, entries[i], dim, nullptr, 1, dim);
    std::vector<Acc> value(kernel.panel_columns, -std::numeric_limits<Acc>::infinity());
    kernel.head_max({packed_token.data(), packed_entry.data(), dim, 1, &zero, &zero, value.data(), nullptr, nullptr,
                     kernel.panel_columns, nullptr, Activation::kRelu, entries[i], 0});
    EXPECT(products[i] == value[0], "pair %ld of dim %ld: %g, not %g", static_cast<long>(i), static_cast<long>(dim),
           static_cast<double>(products[i]), static_cast<double>(value[0]));
  }
}

template <typename T>
static void test_pair_sizes(const Kernels<T>& kernel) {
  for (const int64_t count : {1, 15, 16, 33}) {
    for (const int64_t dim : {0, 1, 15, 16, 33, 128, 129, 300, 768}) test_multiply_pairs<T>(kernel, count, dim);
  }
}

template <typename T>
static void test_combine(const Kernels<T>& kernel) {
  using Acc = Accumulator<T>;
  std::mt19937 random(11);
  for (const int64_t count : {0, 1, 2, 7}) {
    for (const int64_t dim : {1, 7, 16, 33, 128, 300}) {
      std::vector<T> rows(7 * dim), found(dim + 1, T{});
      for (T& x : rows) x = small_integer<T>(random);
      std::vector<Acc> factors(count);
      for (Acc& factor : factors) factor = static_cast<Acc>(to_double(small_integer<T>(random)));
      std::vector<const T*> given(count);
      for (int64_t i = 0; i < count; ++i) given[i] = rows.data() + (i * 3 % 7) * dim;
      kernel.combine(found.data(), factors.data(), given.data(), count, dim);
      for (int64_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(factors[i]) * to_double(given[i][d]);
        EXPECT(to_double(found[d]) == sum, "combine of %d rows, dim %d: element %d", (int)count, (int)dim, (int)d);
      }
      EXPECT(to_double(found[dim]) == 0, "combine of %d rows writes past %d", (int)count, (int)dim);
    }
  }
}

template <typename T>
static void test_score_sizes(const Kernels<T>& kernel) {
  for (const int64_t queries : {1, 15, 16, 17, 48, 64, 80}) {
    for (const int64_t width : {1, 5, 16, 33, 90}) {
      test_score<T>(kernel, queries, width, false);
      test_score<T>(kernel, queries, width, true);
    }
  }
  test_find_above_bounds<T>(kernel);
}

static void test_all(const AllKernels& kernels) {
  test_type(kernels.f32);
  test_type(kernels.f64);
  test_type(kernels.bf16);
  test_type(kernels.f16);
  test_prune_sizes(kernels.f32);
  test_prune_sizes(kernels.f64);
  test_prune_sizes(kernels.bf16);
  test_prune_sizes(kernels.f16);
  test_score_sizes(kernels.f32);
  test_score_sizes(kernels.f64);
  test_score_sizes(kernels.bf16);
  test_score_sizes(kernels.f16);
  test_pair_sizes(kernels.f32);
  test_pair_sizes(kernels.f64);
  test_pair_sizes(kernels.bf16);
  test_pair_sizes(kernels.f16);
  test_combine(kernels.f32);
  test_combine(kernels.f64);
  test_combine(kernels.bf16);
  test_combine(kernels.f16);
  test_activation(kernels.f32);
  test_pool_nan(kernels.f32);
}

int main() {
  for_each_instruction_set(test_all);
  return 0;
}
