#include "screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_avx512() {
  static constexpr Screen screen = make_screen("avx512", 2.2);
  return screen;
}
}  // namespace splade_fast::cpu
