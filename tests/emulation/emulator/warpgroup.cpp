#include "warpgroup.h"

#include <array>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulation::hopper {
namespace {

constexpr int kRows = 64, kColumns = 256, kDepth = 16, kAccumulators = kRows * kColumns / kWarpgroupThreads;

// Element (row, depth) of a K-major operand with 128-byte swizzle: rows of 128 bytes in groups of eight, and bits 7-9
// of the address, exclusive-or, in its bits 4-6.
uint32_t element_address(uint64_t descriptor, int row, int depth) {
  const auto field = [&](int first, int bits) {
    return static_cast<uint32_t>(descriptor >> first) & ((1u << bits) - 1);
  };
  if (field(62, 2) != 1 || field(49, 3) != 0) fail("a matrix descriptor of another layout");
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  const uint32_t r = static_cast<uint32_t>(row), d = static_cast<uint32_t>(depth);
  const uint32_t address = start + r % 8 * 128 + r / 8 * stride + d * 2;
  return address ^ ((address >> 7 & 7) << 4);
}

float to_float(uint16_t bits, bool is_bfloat16) {
  if (is_bfloat16) return __bfloat162float({bits});
  __half half;
  std::memcpy(&half, &bits, sizeof(bits));
  return __half2float(half);
}

template <int kOperandRows>
std::vector<float> load_operand(const SharedMemory& memory, uint64_t descriptor, bool is_bfloat16) {
  std::vector<float> operand(static_cast<size_t>(kOperandRows * kDepth));
  for (int row = 0; row < kOperandRows; ++row) {
    for (int depth = 0; depth < kDepth; ++depth) {
      operand[static_cast<size_t>(row * kDepth + depth)] =
          to_float(memory.load(element_address(descriptor, row, depth)), is_bfloat16);
    }
  }
  return operand;
}

void run(const Product& product, const SharedMemory& memory) {
  const std::vector<float> a = load_operand<kRows>(memory, product.a, product.is_bfloat16);
  const std::vector<float> b = load_operand<kColumns>(memory, product.b, product.is_bfloat16);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    for (int i = 0; i < kAccumulators; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      const float *x = &a[static_cast<size_t>(row * kDepth)], *y = &b[static_cast<size_t>(column * kDepth)];
      float sum = product.accumulates ? product.d[thread][i] : 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += x[k] * y[k];
      product.d[thread][i] = sum;
    }
  }
}

}  // namespace

// The last thread to come does the work.
template <typename Work>
void Warpgroup::together(const std::string& call, Work work) {
  if (arrived_ == 0) call_ = call;
  if (call_ != call) fail("the threads of a warpgroup have diverged: " + call_ + " and " + call);
  const unsigned generation = generation_;
  if (++arrived_ == kWarpgroupThreads) {
    arrived_ = 0;
    work();
    ++generation_;
  }
  wait_until([this, generation] { return generation_ != generation; });
}

void Warpgroup::multiply(float* d, uint64_t a, uint64_t b, bool accumulates, bool is_bfloat16) {
  const int thread = current_thread() % kWarpgroupThreads;
  if (arrived_ > 0 && (product_.a != a || product_.b != b || product_.accumulates != accumulates)) {
    fail("the threads of a warpgroup multiply different operands");
  }
  product_.a = a;
  product_.b = b;
  product_.accumulates = accumulates;
  product_.is_bfloat16 = is_bfloat16;
  product_.d[thread] = d;
  together("wgmma", [this] { open_.push_back(product_); });
}

// Products are done at the latest or at the earliest time, as it happens: operands and accumulators must be what they
// should be at both.
void Warpgroup::commit() {
  together("commit", [this] {
    committed_.push_back(std::move(open_));
    open_.clear();
    if (random_below(4) == 0) finish_groups(0);
  });
}

void Warpgroup::wait(int pending) {
  together("wait", [this, pending] {
    if (!open_.empty()) fail("a wait for products that are not committed");
    finish_groups(static_cast<size_t>(pending));
  });
}

void Warpgroup::finish_groups(size_t pending) {
  for (; committed_.size() > pending; committed_.pop_front()) {
    for (const Product& product : committed_.front()) run(product, *memory_);
  }
}

}  // namespace emulation::hopper
