#define SPLADE_FAST_AMX
#include "screen_impl.h"

namespace splade_fast::cpu {
const Screen& screen_amx() {
  static constexpr Screen screen = make_screen("amx", 8.0);  // not measured
  return screen;
}
}  // namespace splade_fast::cpu
