// The AMX kernel of screening, with its tile instructions emulated in plain C++.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Tile {
  int8_t bytes[16][64];
};

Tile tiles[8];

void load(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(tiles[tile].bytes[row], static_cast<const char*>(base) + row * stride, 64);
  }
}

void store(int tile, void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(base) + row * stride, tiles[tile].bytes[row], 64);
}

// sum[m][n] += products of the bytes 4 k to 4 k + 3 of row m of a and of bytes 4 n to 4 n + 3 of row k of b, for all k.
void multiply_signed(int sum, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t total;
      std::memcpy(&total, &tiles[sum].bytes[m][4 * n], 4);
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 4; ++i) total += tiles[a].bytes[m][4 * k + i] * tiles[b].bytes[k][4 * n + i];
      }
      std::memcpy(&tiles[sum].bytes[m][4 * n], &total, 4);
    }
  }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release()
#define _tile_zero(tile) \
  tiles[tile] = Tile {}
#define _tile_loadd(tile, base, stride) load(tile, base, stride)
#define _tile_stored(tile, base, stride) store(tile, base, stride)
#define _tile_dpbssd(sum, a, b) multiply_signed(sum, a, b)

#define SPLADE_FAST_AMX
#include "cpu/simd/screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_amx_emulated() {
  static constexpr Screen screen = make_screen("amx, emulated", 1.0);
  return screen;
}
}  // namespace splade_fast::cpu
