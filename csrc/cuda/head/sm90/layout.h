// The layout of tiles in shared memory and in registers for wgmma: plain integer functions, which the host can test.
//
// An operand tile has rows of 128 bytes, of which the copy engine permutes the 16-byte chunks by the row's number
// modulo 8 (128-byte swizzle). Both operands are K-major: consecutive elements run along D. The layout of the
// bytes is the same for every element type; the type determines the number of elements in a row and in the 32 bytes
// that one wgmma multiplies. From the PTX manual, wgmma: "Register fragments", "Shared memory matrix layout", "Matrix
// descriptor".
#pragma once

#include "common/float_bits.h"

// Before a loop whose index must be known when a GPU's code is compiled; the host's compiler does not know the pragma.
#if defined(__CUDA_ARCH__)
#define SPLADE_FAST_UNROLL _Pragma("unroll")
#else
#define SPLADE_FAST_UNROLL
#endif

namespace splade_fast::cuda::hopper {

// The type of both operands of wgmma. It reads float32 as TF32 and ignores the low 13 bits.
enum class Operand { kBfloat16, kFloat16, kTfloat32, kInt8 };

SPLADE_FAST_INLINE constexpr int element_bytes(Operand operand) {
  return operand == Operand::kTfloat32 ? 4 : operand == Operand::kInt8 ? 1 : 2;
}

// The type of the sums.
template <Operand kOperand>
using OperandSum = std::conditional_t<kOperand == Operand::kInt8, int32_t, float>;

constexpr int kWarpgroupThreads = 128;
constexpr int kRowBytes = 128;                             // in an operand tile
constexpr int kChunkBytes = 16;                            // moved by the swizzle in one piece
constexpr int kSwizzledRows = 8;                           // after which the pattern repeats
constexpr int kSwizzledBytes = kSwizzledRows * kRowBytes;  // tiles are aligned to this
constexpr int kInstructionEntries = 64;                    // M of one wgmma
constexpr int kInstructionBytes = 32;                      // K of one wgmma
constexpr int kRowInstructions = kRowBytes / kInstructionBytes;

// Elements of a row of an operand tile.
SPLADE_FAST_INLINE constexpr int row_elements(Operand operand) { return kRowBytes / element_bytes(operand); }

// Bits 4-6 of an address, the chunk, exclusive-or bits 7-9, the row modulo 8.
SPLADE_FAST_INLINE constexpr uint32_t swizzle(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// Returns the byte at which the copy engine puts an element of a tile.
SPLADE_FAST_INLINE constexpr uint32_t tile_offset(Operand operand, int row, int dim) {
  return swizzle(static_cast<uint32_t>(row * kRowBytes + dim * element_bytes(operand)));
}

// Describes the operand of one wgmma whose first element is at this address of shared memory, before the swizzle.
//   bits  0-13  address / 16
//   bits 16-29  leading dimension offset / 16: not used by swizzled K-major operands, 1 by convention
//   bits 32-45  stride offset / 16: from one group of 8 rows to the next
//   bits 49-51  base offset: 0 for tiles that are aligned to the pattern
//   bits 62-63  1: 128-byte swizzle
SPLADE_FAST_INLINE constexpr uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kLeading = 1, kStride = kSwizzledBytes / 16, kSwizzle128 = 1;
  return (static_cast<uint64_t>(address & 0x3ffff) >> 4) | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// Describes the same operand some wgmma steps further along D: the address moves within the row.
SPLADE_FAST_INLINE constexpr uint64_t deeper(uint64_t descriptor, int steps) {
  return descriptor + static_cast<uint64_t>(steps * kInstructionBytes / 16);
}

// Row and column of the product in accumulator i of a thread of a warpgroup, for every m64nN. A thread has two rows, 8
// apart, and two neighbouring columns of every 8.
SPLADE_FAST_INLINE constexpr int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}

SPLADE_FAST_INLINE constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// A ring of stages in shared memory. The parity of a stage's barriers flips with every turn.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  SPLADE_FAST_INLINE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace splade_fast::cuda::hopper
