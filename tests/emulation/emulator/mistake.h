// The deliberate mistake that is on. prepare.py asks for it wherever mistakes.py has one.
#pragma once

#include <string_view>

namespace emulation {

extern std::string_view mistake;  // empty: none

inline bool has_mistake(std::string_view name) { return mistake == name; }

}  // namespace emulation
