#include "warpgroup.h"

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "synchronization.h"

namespace emulation::hopper {
namespace {

constexpr int kRows = 64, kColumns = 256, kDimBytes = 32, kChunkBytes = 16,
              kAccumulators = kRows * kColumns / kWarpgroupThreads;

// Element (row, dim) of a K-major operand with 128-byte swizzle: rows of 128 bytes in groups of eight, and bits 7-9
// of the address, exclusive-or, in its bits 4-6.
uint32_t element_address(uint64_t descriptor, int row, int dim_byte) {
  const auto field = [&](int first, int bits) {
    return static_cast<uint32_t>(descriptor >> first) & ((1u << bits) - 1);
  };
  if (field(62, 2) != 1 || field(49, 3) != 0) fail("a matrix descriptor of another layout");
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  const uint32_t r = static_cast<uint32_t>(row), d = static_cast<uint32_t>(dim_byte);
  const uint32_t address = start + r % 8 * 128 + r / 8 * stride + d;
  return address ^ ((address >> 7 & 7) << 4);
}

template <typename Type, int kOperandRows>
std::vector<typename Type::Sum> load_operand(const SharedMemory& memory, uint64_t descriptor) {
  using Bits = typename Type::Bits;
  std::vector<typename Type::Sum> operand;
  for (int row = 0; row < kOperandRows; ++row) {
    for (int byte = 0; byte < kDimBytes; byte += kChunkBytes) {
      memory.record_read(element_address(descriptor, row, byte), kChunkBytes);
    }
    for (int byte = 0; byte < kDimBytes; byte += static_cast<int>(sizeof(Bits))) {
      operand.push_back(Type::value(memory.load<Bits>(element_address(descriptor, row, byte))));
    }
  }
  return operand;
}

template <typename Type>
void run(const Product& product, const SharedMemory& memory) {
  using Sum = typename Type::Sum;
  constexpr int kDims = kDimBytes / static_cast<int>(sizeof(typename Type::Bits));
  const std::vector<Sum> a = load_operand<Type, kRows>(memory, product.a);
  const std::vector<Sum> b = load_operand<Type, kColumns>(memory, product.b);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    race::written(product.d[thread], kAccumulators * sizeof(Sum));
    for (int i = 0; i < kAccumulators; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      const Sum *x = &a[static_cast<size_t>(row * kDims)], *y = &b[static_cast<size_t>(column * kDims)];
      Sum& target = static_cast<Sum*>(product.d[thread])[i];
      Sum sum = product.accumulates ? target : Sum(0);
      for (int k = 0; k < kDims; ++k) sum += x[k] * y[k];
      target = sum;
    }
  }
}

}  // namespace

float Bfloat16::value(uint16_t bits) { return __bfloat162float({bits}); }

float Float16::value(uint16_t bits) {
  __half half;
  std::memcpy(&half, &bits, sizeof(bits));
  return __half2float(half);
}

// float32 without the low 13 of its bits.
float Tfloat32::value(uint32_t bits) {
  bits &= ~uint32_t{0x1fff};
  float result;
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

// The last thread to come does the work.
template <typename Work>
void Warpgroup::together(const std::string& call, Work work) {
  expect_whole_warp();
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

template <typename Type>
void Warpgroup::multiply(typename Type::Sum* d, uint64_t a, uint64_t b, bool accumulates) {
  const int thread = current_thread() % kWarpgroupThreads;
  if (arrived_ > 0 && (product_.a != a || product_.b != b || product_.accumulates != accumulates)) {
    fail("the threads of a warpgroup multiply different operands");
  }
  const race::Unseen unseen;
  if (arrived_ == 0) product_.issued = race::Order();
  product_.issued.release();
  product_.a = a;
  product_.b = b;
  product_.accumulates = accumulates;
  product_.run = run<Type>;
  product_.d[thread] = d;
  together("wgmma", [this] { open_.push_back(product_); });
}

template void Warpgroup::multiply<Bfloat16>(float*, uint64_t, uint64_t, bool);
template void Warpgroup::multiply<Float16>(float*, uint64_t, uint64_t, bool);
template void Warpgroup::multiply<Tfloat32>(float*, uint64_t, uint64_t, bool);
template void Warpgroup::multiply<Int8>(int32_t*, uint64_t, uint64_t, bool);

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
  finished_.acquire();
}

void Warpgroup::finish_groups(size_t pending) {
  for (; committed_.size() > pending; committed_.pop_front()) {
    const race::Turn turn(tensor_cores_);
    for (const Product& product : committed_.front()) {
      product.issued.acquire();
      product.run(product, *memory_);
    }
    finished_.release();
  }
}

}  // namespace emulation::hopper
