#include "mistake.h"

#include <string>

namespace emulation {

std::string_view mistake;

// For the tests, by ctypes: switches one on, and any other off.
extern "C" __attribute__((visibility("default"))) void emulation_make_mistake(const char* name) {
  static std::string kept;
  kept = name;
  mistake = kept;
}

}  // namespace emulation
