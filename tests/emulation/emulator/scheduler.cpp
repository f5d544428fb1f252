#include "scheduler.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "context.h"
#include "race.h"
#include "shared_variables.h"
#include "synchronization.h"

namespace emulation {
namespace {

constexpr int kWarpThreads = 32, kMaxThreads = 1024;

struct Fiber {
  Dim3 thread, block;
  int block_number = 0;
  bool ended = false;
  std::function<bool()> ready;  // empty: it may run
};

// Sets of agents, of which the threads of the blocks that run at a time have one. ThreadSanitizer finds races between
// two blocks with different sets; a set that comes again does what it does in order.
constexpr size_t kAgentSets = race::kIsWatched ? 3 : 1;

struct Scheduler {
  Settings settings;
  std::mt19937 random{0};
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Context>> contexts;  // of the fibers
  std::vector<race::Agent> agents[kAgentSets];     // of the fibers
  size_t agent_set = 0;
  race::Order grid_begins, grid_ends;
  std::function<void()> body;
  Engine* engine = nullptr;
  std::exception_ptr error;
  int current = 0, threads = 0;

  Fiber& fiber() { return fibers[static_cast<size_t>(current)]; }
  Context& context() { return *contexts[static_cast<size_t>(current)]; }
};
Scheduler scheduler;

// A thread from its first to its last line. An exception cannot leave its stack.
void run_thread() {
  scheduler.grid_begins.acquire();
  try {
    scheduler.body();
  } catch (...) {
    scheduler.error = std::current_exception();
  }
  scheduler.grid_ends.release();
  scheduler.fiber().ended = true;
}

// Of one context, for the threads of one block after the other.
void run_threads() {
  for (;;) {
    run_thread();
    scheduler.context().leave();
  }
}

void make_contexts(size_t count) {
  if (race::kIsWatched) scheduler.contexts.clear();  // what was on the stacks of other blocks is not shared
  while (scheduler.contexts.size() < count) scheduler.contexts.push_back(std::make_unique<Context>(&run_threads));
  scheduler.agent_set = (scheduler.agent_set + 1) % kAgentSets;
  auto& agents = scheduler.agents[scheduler.agent_set];
  while (agents.size() < count) agents.emplace_back("CUDA thread");
}

void make_fibers(Dim3 first, int blocks, int threads) {
  const size_t count = static_cast<size_t>(blocks) * static_cast<size_t>(threads);
  scheduler.threads = threads;
  scheduler.fibers.clear();
  scheduler.fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = scheduler.fibers[i];
    const unsigned number = static_cast<unsigned>(i), width = static_cast<unsigned>(threads);
    fiber.block_number = static_cast<int>(number / width);
    fiber.thread = Dim3(number % width, 0, 0);
    fiber.block = Dim3(first.x + number / width, first.y, 0);
  }
  make_contexts(count);
}

// Lets a fiber run until it waits or ends; false where it is waiting still.
bool resume(int number) {
  scheduler.current = number;
  Fiber& fiber = scheduler.fiber();
  if (fiber.ended || (fiber.ready && !fiber.ready())) return false;
  fiber.ready = nullptr;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  {
    const race::Turn turn(scheduler.agents[scheduler.agent_set][static_cast<size_t>(number)]);
    scheduler.context().enter();
  }
  if (scheduler.error) std::rethrow_exception(std::exchange(scheduler.error, nullptr));
  return true;
}

bool step_engine() { return scheduler.engine != nullptr && scheduler.engine->step(); }

// After a failure, when some stand amid a body.
void abandon_threads() {
  scheduler.contexts.clear();
  for (const race::Agent& agent : scheduler.agents[scheduler.agent_set]) {
    const race::Turn turn(agent);
    scheduler.grid_ends.release();
  }
}

int64_t count_ended() {
  return std::count_if(scheduler.fibers.begin(), scheduler.fibers.end(), [](const Fiber& f) { return f.ended; });
}

void run_fibers() {
  std::vector<int> order(scheduler.fibers.size());
  std::iota(order.begin(), order.end(), 0);
  // Half of the time the engine works now and then, else only when no thread can do anything.
  const bool engine_is_late = random_below(2) == 0;
  for (size_t left = order.size(); left > 0;) {
    bool moved = false;
    if (random_below(2) == 0) std::shuffle(order.begin(), order.end(), scheduler.random);
    for (const int number : order) {
      if (!engine_is_late && random_below(64) == 0) moved |= step_engine();
      if (!resume(number)) continue;
      moved = true;
      if (scheduler.fiber().ended) --left;
    }
    if (!moved && !step_engine()) {
      fail("deadlock: of " + std::to_string(order.size()) + " threads " + std::to_string(count_ended()) +
           " have ended, the others wait");
    }
  }
}

}  // namespace

void fail(const std::string& message) { throw std::runtime_error("emulated GPU: " + message); }

const Settings& settings() { return scheduler.settings; }

uint32_t random_below(uint32_t bound) { return static_cast<uint32_t>(scheduler.random()) % bound; }

int current_thread() { return scheduler.current; }

int current_block() { return scheduler.fiber().block_number; }

int threads_per_block() { return scheduler.threads; }

void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  Fiber& fiber = scheduler.fiber();
  fiber.ready = std::move(ready);
  scheduler.context().leave();
}

void set_engine(Engine* engine) { scheduler.engine = engine; }

void run_blocks(Dim3 first, int blocks, int threads, const std::function<void()>& body) {
  scheduler.body = body;
  make_fibers(first, blocks, threads);
  reset_synchronization(blocks, blocks * threads / kWarpThreads);
  reset_shared_variables(blocks);
  if (scheduler.engine != nullptr) scheduler.engine->begin();
  try {
    run_fibers();
  } catch (...) {
    abandon_threads();
    throw;
  }
  if (scheduler.engine != nullptr) scheduler.engine->end();
}

void run_grid(Dim3 grid, Dim3 block, int blocks_at_a_time, const std::function<void()>& body) {
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 || grid.y > UINT16_MAX || grid.z != 1) fail("size of the grid");
  if (block.x == 0 || block.x > kMaxThreads || block.y != 1 || block.z != 1) fail("size of a block");
  if (block.x % kWarpThreads != 0) fail("a warp that is not whole: the emulation has none");
  const unsigned step = static_cast<unsigned>(blocks_at_a_time);
  if (grid.x % step != 0) fail("the grid is not a multiple of the cluster");
  gridDim = grid;
  blockDim = block;
  const race::Unseen unseen;  // but for the turns of the agents
  scheduler.grid_begins.release();
  struct End {
    ~End() { scheduler.grid_ends.acquire(); }
  } const end;
  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x / step) * grid.y);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), scheduler.random);
  for (const uint64_t i : order) {
    const unsigned x = static_cast<unsigned>(i % (grid.x / step)), y = static_cast<unsigned>(i / (grid.x / step));
    run_blocks(Dim3(x * step, y, 0), blocks_at_a_time, static_cast<int>(block.x), body);
  }
}

// For the tests, by ctypes: the order of threads and copies, and the size of the GPU.
extern "C" __attribute__((visibility("default"))) void emulation_configure(uint32_t seed, int multiprocessors,
                                                                           int clusters) {
  scheduler.random.seed(seed);
  scheduler.settings = {multiprocessors, clusters};
}

}  // namespace emulation
