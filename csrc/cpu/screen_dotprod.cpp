#include "screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_dotprod() {
  static constexpr Screen screen = make_screen("dotprod", 4.0);
  return screen;
}
}  // namespace splade_fast::cpu
