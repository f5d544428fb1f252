#include "screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_avx512vnni() {
  static constexpr Screen screen = make_screen("avx512vnni", 4.3);
  return screen;
}
}  // namespace splade_fast::cpu
