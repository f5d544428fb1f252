// Runs the threads of blocks as fibers of one CPU thread. A fiber runs until it has to wait for others; which one runs
// next is drawn at random, so that what the code does not order happens in many orders.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace emulation {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Where a call is in the source.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// What a GPU would do no good with: the launch ends, its caller gets the message as an exception.
[[noreturn]] void fail(const std::string& message);

// What the tests choose: emulation_configure() in scheduler.cpp.
struct Settings {
  int multiprocessors = 2;
  int clusters = 3;  // that run at a time
};
const Settings& settings();

uint32_t random_below(uint32_t bound);

// Of the running thread: its number among all threads that run at a time, and its block's number among their blocks.
int current_thread();
int current_block();
int threads_per_block();

// The running thread goes on when ready() holds. To be called from a fiber.
void wait_until(std::function<bool()> ready);

// What works beside the threads, as a copy engine does.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual void begin() = 0;  // before the blocks that run at a time begin
  virtual bool step() = 0;   // at any time; false: there is nothing to do
  virtual void end() = 0;    // when their last thread has ended
};
void set_engine(Engine* engine);  // null: none

// Blocks that run at a time, numbered along x from the first one on: one, or those of a cluster.
void run_blocks(Dim3 first, int blocks, int threads, const std::function<void()>& body);

// All blocks of a grid, a few at a time, in random order.
void run_grid(Dim3 grid, Dim3 block, int blocks_at_a_time, const std::function<void()>& body);

}  // namespace emulation

using dim3 = emulation::Dim3;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
