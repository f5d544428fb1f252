// Facts about the build, for a Python that the module _C was not built for.
#include "build_facts.h"

#define FACT_AS_LINE(name, value) name "=" value "\n"

// Python calls this through ctypes.
extern "C" __attribute__((visibility("default"))) const char* splade_fast_build_facts() {
  return SPLADE_FAST_BUILD_FACTS(FACT_AS_LINE);
}
