// The Python module _C, which holds facts about the build. The ops are in separate libraries, because those do not
// depend on the version of Python.
#include <pybind11/pybind11.h>

#include "build_facts.h"

#define SET_FACT(name, value) facts[name] = value;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build of splade_fast";
  m.def("build_facts", [] {
    pybind11::dict facts;
    SPLADE_FAST_BUILD_FACTS(SET_FACT)
    return facts;
  });
}
