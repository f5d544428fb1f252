// gather on the CPU: rows of several tables, read and written together.
#include "../common/gather.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "dispatch.h"

namespace splade_fast::cpu {
namespace {

// Less is copied by one thread: waking the others takes longer.
constexpr int64_t kBytesOfAThread = 128 << 10;

struct Copy {
  const uint8_t* source;
  uint8_t* target;
  int64_t source_stride, target_stride, bytes;  // of a row
};

// Row from(i) of every source to row to(i) of its target, for 0 <= i < count.
template <typename From, typename To>
void copy_rows(const std::vector<Copy>& copies, int64_t count, From from, To to) {
  int64_t bytes = 1;
  for (const Copy& copy : copies) bytes += copy.bytes;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kBytesOfAThread / bytes), [&](int64_t begin, int64_t end) {
    for (const Copy& copy : copies) {
      if (copy.bytes == 0) continue;  // its tensors may have no memory
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(copy.target + to(i) * copy.target_stride, copy.source + from(i) * copy.source_stride, copy.bytes);
      }
    }
  });
}

bool is_written(const bool* mask, int64_t i) { return mask == nullptr || mask[i]; }

void check_range(const int64_t* indices, const bool* mask, int64_t count, int64_t table_rows) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(!is_written(mask, i) || (indices[i] >= 0 && indices[i] < table_rows),
                    "indices must be between 0 and ", table_rows - 1, ", the last row of the tables, got ", indices[i],
                    " at position ", i);
  }
}

Tensors gather_rows(const Tensors& tables, const Tensor& indices) {
  const int64_t table_rows = check_tables(tables, indices), count = indices.size(0);
  const Tensor places = torch::stable::contiguous(indices);
  const int64_t* place = const_data<int64_t>(places);
  if (!tables.empty()) check_range(place, nullptr, count, table_rows);
  Tensors sources, gathered;
  std::vector<Copy> copies;
  for (const Tensor& table : tables) {
    sources.push_back(has_whole_rows(table) ? table : torch::stable::contiguous(table));
    const Tensor& source = sources.back();
    std::vector<int64_t> shape(source.sizes().begin(), source.sizes().end());
    shape[0] = count;
    // A new tensor of a pinned table is not pinned.
    gathered.push_back(torch::stable::new_empty(source, shape));
    copies.push_back({const_data<uint8_t>(source), mutable_data<uint8_t>(gathered.back()), row_stride_bytes(source),
                      row_bytes(source), row_bytes(source)});
  }
  copy_rows(copies, count, [&](int64_t i) { return place[i]; }, [](int64_t i) { return i; });
  return gathered;
}

// Which of the writes remain: of several to one row, the last.
std::vector<int64_t> last_writes(const int64_t* indices, const bool* mask, int64_t count) {
  std::vector<std::pair<int64_t, int64_t>> writes;
  writes.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (is_written(mask, i)) writes.emplace_back(indices[i], i);
  }
  std::sort(writes.begin(), writes.end());
  std::vector<int64_t> last;
  for (size_t i = 0; i < writes.size(); ++i) {
    if (i + 1 == writes.size() || writes[i + 1].first != writes[i].first) last.push_back(writes[i].second);
  }
  return last;
}

void scatter_rows_(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                   const std::optional<Tensor>& mask) {
  const int64_t table_rows = check_written(tables, indices, rows, mask), count = indices.size(0);
  const Tensor places = torch::stable::contiguous(indices);
  const std::optional<Tensor> whole_mask = contiguous_or_none(mask);
  const int64_t* place = const_data<int64_t>(places);
  const bool* written = whole_mask ? const_data<bool>(*whole_mask) : nullptr;
  if (tables.empty()) return;
  check_range(place, written, count, table_rows);
  const Tensors sources = contiguous_sources(rows, tables);
  std::vector<Copy> copies;
  for (size_t t = 0; t < tables.size(); ++t) {
    copies.push_back({const_data<uint8_t>(sources[t]), mutable_data<uint8_t>(tables[t]), row_bytes(tables[t]),
                      row_stride_bytes(tables[t]), row_bytes(tables[t])});
  }
  const std::vector<int64_t> last = last_writes(place, written, count);
  copy_rows(
      copies, static_cast<int64_t>(last.size()), [&](int64_t i) { return last[i]; },
      [&](int64_t i) { return place[last[i]]; });
}

struct Aged {
  int32_t age;
  int64_t slot;
  // Of equal ages the lowest slot counts as the oldest.
  bool operator<(const Aged& other) const { return age != other.age ? age > other.age : slot < other.slot; }
};

// One pass: the oldest so far are kept, and once there are count of them, what is not older than the youngest
// of the oldest is passed over, whole blocks at a time.
Tensor oldest_slots(const Tensor& age, int64_t count) {
  constexpr int64_t kBlock = 256;
  STD_TORCH_CHECK(age.scalar_type() == ScalarType::Int && age.dim() == 1, "age must be int32 (slots,)");
  const int64_t slots = age.size(0);
  STD_TORCH_CHECK(count >= 0 && count <= slots, "count must be between 0 and the ", slots, " slots, got ", count);
  const Tensor ages = torch::stable::contiguous(age);
  const int32_t* source = const_data<int32_t>(ages);
  std::vector<Aged> found;
  found.reserve(count + kBlock);
  bool full = false;
  int32_t threshold = 0;
  for (int64_t first = 0; count > 0 && first < slots; first += kBlock) {
    const int64_t last = std::min(first + kBlock, slots);
    int32_t older = !full;
    for (int64_t slot = first; slot < last; ++slot) older |= source[slot] > threshold;
    if (!older) continue;
    for (int64_t slot = first; slot < last; ++slot) {
      if (!full || source[slot] > threshold) found.push_back({source[slot], slot});
    }
    if (static_cast<int64_t>(found.size()) < count) continue;
    std::nth_element(found.begin(), found.begin() + (count - 1), found.end());
    found.resize(count);
    threshold = found.back().age;
    full = true;
  }
  std::sort(found.begin(), found.end());
  const Tensor oldest = torch::stable::new_empty(age, std::vector<int64_t>{count}, ScalarType::Long);
  std::transform(found.begin(), found.begin() + count, mutable_data<int64_t>(oldest),
                 [](const Aged& item) { return item.slot; });
  return oldest;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&splade_fast::cpu::gather_rows));
  m.impl("oldest_slots", TORCH_BOX(&splade_fast::cpu::oldest_slots));
  m.impl("scatter_rows_", TORCH_BOX(&splade_fast::cpu::scatter_rows_));
}
