#include "screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_portable() {
  static constexpr Screen screen = make_screen("portable", 0.4);
  return screen;
}
}  // namespace splade_fast::cpu
