// A stack of its own, with a body that runs on it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include "fresh_memory.h"

namespace emulation {

class Context {
 public:
  // The body never returns: it leaves.
  explicit Context(void (*body)());
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The body begins, or goes on where it left, until it leaves.
  void enter();
  // To be called from the body: back to where it was entered.
  void leave();

 private:
  // Where somebody stands in the code, and on which stack.
  struct Place {
    ucontext_t context{};
    jmp_buf registers{};
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
    bool has_begun = true;
  };

  static void go(Place& from, Place& to);
  static void begin();

  static Place outside_;
  static Context* running_;

  FreshMemory stack_;
  void (*body_)();
  Place place_;
};

}  // namespace emulation
