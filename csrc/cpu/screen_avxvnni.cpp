#include "screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_avxvnni() {
  static constexpr Screen screen = make_screen("avxvnni", 4.0);
  return screen;
}
}  // namespace splade_fast::cpu
