// Checking of a pruned index that comes from a file: everything on which the result of a search depends.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "cpu/index/index.h"

namespace splade_fast::cpu {
namespace {

bool has_short_mantissa(double number) {
  int exponent = 0;
  const double mantissa = std::ldexp(std::frexp(number, &exponent), 24);
  return mantissa == std::floor(mantissa);
}

// Places of the documents of an entry, ascending.
std::vector<int64_t> list_places(const uint8_t* documents, int64_t count) {
  std::vector<int64_t> places;
  if (count >= kBitmapBytes) {
    for (int64_t place = 0; place < kGroupDocuments; ++place) {
      if (documents[place / 8] >> place % 8 & 1) places.push_back(place);
    }
    return places;
  }
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(i == 0 || documents[i] > documents[i - 1], "documents of an entry must ascend, got ",
                    int64_t{documents[i]}, " after ", int64_t{documents[i - 1]});
    places.push_back(documents[i]);
  }
  return places;
}

template <typename T>
void check_entry(const PrunedIndex<T>& index, int64_t entry, double step) {
  const int64_t start = index.start[entry], end = index.start[entry + 1];
  STD_TORCH_CHECK(start <= end && end <= index.postings, "postings of entry ", entry, " must ascend to at most ",
                  index.postings, ", got ", start, " to ", end);
  const int64_t first = index.group[entry] * kGroupDocuments;
  const uint8_t* const maximum = index.maximum + entry * kGroupBlocks;
  bool has_postings[kGroupBlocks] = {};
  int64_t posting = start;
  for (const int64_t place : list_places(index.document + start, end - start)) {
    const int64_t block = place / kBlockDocuments;
    STD_TORCH_CHECK(posting < end && first + place < index.documents, "entry ", entry, " must have ", end - start,
                    " documents below ", index.documents, ", got ", first + place);
    const double value = to_number(index.value[posting++]);
    STD_TORCH_CHECK(value >= 0 && std::isfinite(value) && value <= maximum[block] * step, "values of entry ", entry,
                    " must be between 0 and ", maximum[block] * step, ", got ", value);
    has_postings[block] = true;
  }
  STD_TORCH_CHECK(posting == end, "entry ", entry, " must have ", end - start, " documents, got ", posting - start);
  for (int64_t block = 0; block < kGroupBlocks; ++block) {
    STD_TORCH_CHECK(has_postings[block] || maximum[block] == 0, "maxima of entry ", entry,
                    " must be 0 for blocks without postings, got ", int64_t{maximum[block]});
  }
}

template <typename T>
void check(const PrunedIndex<T>& index) {
  STD_TORCH_CHECK(index.term_start[0] == 0 && index.term_start[index.num_cols] == index.entries,
                  "entries must be counted from 0 to ", index.entries, ", got ", index.term_start[0], " to ",
                  index.term_start[index.num_cols]);
  STD_TORCH_CHECK(index.start[0] == 0 && index.start[index.entries] == index.postings,
                  "postings must be counted from 0 to ", index.postings, ", got ", index.start[0], " to ",
                  index.start[index.entries]);
  for (int64_t column = 0; column < index.num_cols; ++column) {
    const int64_t begin = index.term_start[column], end = index.term_start[column + 1];
    STD_TORCH_CHECK(begin <= end && end <= index.entries, "entries of term ", column, " must ascend, got ", begin,
                    " to ", end);
    const double step = index.step[column];
    STD_TORCH_CHECK(step >= 0 && std::isfinite(step) && has_short_mantissa(step), "step of term ", column,
                    " must be finite, at least 0 and of 24 bits, got ", step);
    for (int64_t entry = begin, last = -1; entry < end; last = index.group[entry++]) {
      STD_TORCH_CHECK(index.group[entry] > last && index.group[entry] < index.groups(), "groups of term ", column,
                      " must ascend, got ", index.group[entry], " after ", last);
      check_entry(index, entry, step);
    }
  }
  std::vector<bool> is_seen(index.documents);
  for (int64_t place = 0; place < index.documents; ++place) {
    const int64_t id = index.id[place];
    STD_TORCH_CHECK(id >= 0 && id < index.documents && !is_seen[id], "ids must name every document once, got ", id);
    is_seen[id] = true;
  }
}

void index_check(const std::vector<Tensor>& tensors, bool should_check_numbers) {
  with_index(tensors, [&](const auto& index) {
    if (should_check_numbers) check(index);
  });
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) { m.impl("index_check", TORCH_BOX(&splade_fast::cpu::index_check)); }
