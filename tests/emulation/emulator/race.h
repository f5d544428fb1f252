// What ThreadSanitizer has to know of the emulated GPU: who works, and what orders the work. Each CUDA thread, the copy
// engine and the tensor cores of each warpgroup are agents. The CPU switches between them without ordering anything, so
// accesses of two agents are a race unless an Order stands between them. Without ThreadSanitizer all of this is
// nothing.
#pragma once

#include <cstddef>
#include <memory>

namespace emulation::race {

#if defined(EMULATION_RACES)

constexpr bool kIsWatched = true;

// What happened before a release() happens before what follows a later acquire(). Copies are the same order.
class Order {
 public:
  Order();
  void release() const;
  void acquire() const;

 private:
  std::shared_ptr<void> address_;
};

// Copies are the same agent.
class Agent {
 public:
  explicit Agent(const char* name);
  void take_over() const;  // works from now on

 private:
  friend class Turn;
  std::shared_ptr<void> fiber_;
};

// An agent works for as long as this lives, then whoever did before.
class Turn {
 public:
  explicit Turn(const Agent& agent);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  void* before_;
};

// The emulator's own work, such as getting memory, is no one's.
class Unseen {
 public:
  Unseen();
  ~Unseen();
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// Accesses of the running agent that the emulator makes for it.
void read(const void* data, size_t bytes);
void written(const void* data, size_t bytes);

#else

constexpr bool kIsWatched = false;

struct Order {
  void release() const {}
  void acquire() const {}
};

struct Agent {
  explicit Agent(const char* /*name*/) {}
  void take_over() const {}
};

struct Turn {
  explicit Turn(const Agent&) {}
  ~Turn() {}
};

struct Unseen {
  Unseen() {}
  ~Unseen() {}
};

inline void read(const void*, size_t) {}
inline void written(const void*, size_t) {}

#endif

}  // namespace emulation::race
