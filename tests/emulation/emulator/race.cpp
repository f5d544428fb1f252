#include "race.h"

#if defined(EMULATION_RACES)

#include <sanitizer/tsan_interface.h>

#include <cstdlib>

// Exported by the runtime, but in none of its headers.
extern "C" {
void __tsan_read_range(void* data, unsigned long bytes);
void __tsan_write_range(void* data, unsigned long bytes);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}

namespace emulation::race {

// The runtime keeps an order by its address, until the memory there is freed.
Order::Order() {
  const Unseen unseen;
  address_ = std::shared_ptr<void>(std::malloc(1), [](void* address) {
    const Unseen still_unseen;
    std::free(address);
  });
}

void Order::release() const { __tsan_release(address_.get()); }

void Order::acquire() const { __tsan_acquire(address_.get()); }

Agent::Agent(const char* name) : fiber_(__tsan_create_fiber(0), __tsan_destroy_fiber) {
  __tsan_set_fiber_name(fiber_.get(), name);
}

void Agent::take_over() const { __tsan_switch_to_fiber(fiber_.get(), __tsan_switch_to_fiber_no_sync); }

Turn::Turn(const Agent& agent) : before_(__tsan_get_current_fiber()) { agent.take_over(); }

Turn::~Turn() { __tsan_switch_to_fiber(before_, __tsan_switch_to_fiber_no_sync); }

Unseen::Unseen() { __tsan_ignore_thread_begin(); }

Unseen::~Unseen() { __tsan_ignore_thread_end(); }

void read(const void* data, size_t bytes) { __tsan_read_range(const_cast<void*>(data), bytes); }

void written(const void* data, size_t bytes) { __tsan_write_range(const_cast<void*>(data), bytes); }

}  // namespace emulation::race

#endif
