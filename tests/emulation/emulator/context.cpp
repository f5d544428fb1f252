#include "context.h"

#if defined(EMULATION_MEMORY)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

#if defined(EMULATION_RACES) || defined(EMULATION_MEMORY)
constexpr bool kIsSanitized = true;
constexpr size_t kStackBytes = 128 << 10;
#else
constexpr bool kIsSanitized = false;
constexpr size_t kStackBytes = 64 << 10;
#endif

}  // namespace

Context::Place Context::outside_;
Context* Context::running_ = nullptr;

Context::Context(void (*body)()) : stack_(kStackBytes), body_(body) {
  getcontext(&place_.context);
  place_.context.uc_stack.ss_sp = stack_.data();
  place_.context.uc_stack.ss_size = kStackBytes;
  place_.stack = stack_.data();
  place_.stack_bytes = kStackBytes;
  place_.has_begun = false;
  makecontext(&place_.context, &begin, 0);
}

void Context::begin() {
#if defined(EMULATION_MEMORY)
  __sanitizer_finish_switch_fiber(nullptr, &outside_.stack, &outside_.stack_bytes);
#endif
  running_->body_();
}

void Context::enter() {
  running_ = this;
  go(outside_, place_);
}

void Context::leave() { go(place_, outside_); }

// swapcontext would make a system call each time, for the signal mask, and the sanitizers intercept it and the jumps.
void Context::go(Place& from, Place& to) {
#if defined(EMULATION_MEMORY)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  if constexpr (kIsSanitized) {
    volatile bool is_back = false;
    getcontext(&from.context);
    if (!is_back) {
      is_back = true;
      setcontext(&to.context);
    }
  } else if (_setjmp(from.registers) == 0) {
    if (to.has_begun) _longjmp(to.registers, 1);
    to.has_begun = true;
    setcontext(&to.context);
  }
#if defined(EMULATION_MEMORY)
  __sanitizer_finish_switch_fiber(from.fake_stack, &to.stack, &to.stack_bytes);  // of whichever thread entered
#endif
}

}  // namespace emulation
