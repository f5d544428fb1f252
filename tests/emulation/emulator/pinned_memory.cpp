#include "pinned_memory.h"

namespace emulation {
namespace {

const void* pinned = nullptr;
bool running = false;

}  // namespace

bool is_pinned(const void* data) { return data != nullptr && data == pinned; }

bool is_work_running() { return running; }

// For the tests, by ctypes: the data of the one pinned tensor, and whether the work launched so far is still running.
extern "C" __attribute__((visibility("default"))) void emulation_pin(const void* data, bool is_running) {
  pinned = data;
  running = is_running;
}

}  // namespace emulation
