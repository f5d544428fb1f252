#include "synchronization.h"

#include <vector>

#include "race.h"

namespace emulation {
namespace {

constexpr int kLanes = 32;

struct Barrier {
  int arrived = 0, count = 0, result = 0;
  unsigned generation = 0;
  Site site{};
  race::Order order[2];  // of this generation and the next
};

struct Exchange {
  int arrived = 0;
  unsigned generation = 0;
  Site site{};
  WarpWords given{}, result{};
  race::Order order[2];
};

std::vector<Barrier> barriers;    // of each block
std::vector<Exchange> exchanges;  // of each warp
std::vector<bool> acted_alone;    // each thread, since its warp has met

Exchange& exchange_of_warp() { return exchanges[static_cast<size_t>(current_thread() / kLanes)]; }

// What a thread did before a barrier is done for those that have passed it.
template <typename Meeting, typename Meet>
auto in_order(Meeting& meeting, Meet meet) {
  const race::Order order = meeting.order[meeting.generation % 2];
  order.release();
  const auto result = meet();
  order.acquire();
  return result;
}

// The first to come says where all have to come.
template <typename Meeting>
void come_to(Meeting& meeting, Site site) {
  if (meeting.arrived == 0) meeting.site = site;
  if (!(meeting.site == site)) fail("threads have diverged: " + meeting.site.text() + " and " + site.text());
  ++meeting.arrived;
}

}  // namespace

void reset_synchronization(int blocks, int warps) {
  barriers.clear();
  exchanges.clear();
  barriers.resize(static_cast<size_t>(blocks));
  exchanges.resize(static_cast<size_t>(warps));
  acted_alone.assign(static_cast<size_t>(warps * kLanes), false);
}

int block_barrier(bool value, Site site) {
  Barrier& barrier = barriers[static_cast<size_t>(current_block())];
  acted_alone[static_cast<size_t>(current_thread())] = false;
  return in_order(barrier, [&] {
    come_to(barrier, site);
    barrier.count += value;
    const unsigned generation = barrier.generation;
    if (barrier.arrived == threads_per_block()) {
      barrier.result = barrier.count;
      barrier.arrived = barrier.count = 0;
      ++barrier.generation;
    }
    wait_until([&barrier, generation] { return barrier.generation != generation; });
    return barrier.result;
  });
}

WarpWords exchange(unsigned mask, uint64_t word, Site site) {
  if (mask != 0xffffffffu) fail("not all lanes of a warp: the emulation has no such exchange");
  acted_alone[static_cast<size_t>(current_thread())] = false;
  Exchange& meeting = exchange_of_warp();
  come_to(meeting, site);
  meeting.given[static_cast<size_t>(lane())] = word;
  const unsigned generation = meeting.generation;
  if (meeting.arrived == kLanes) {
    // Stays until all have come again, and so have read it.
    meeting.result = meeting.given;
    meeting.arrived = 0;
    ++meeting.generation;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; });
  return meeting.result;
}

void warp_barrier(unsigned mask, Site site) {
  in_order(exchange_of_warp(), [&] { return exchange(mask, 0, site); });
}

void act_alone() { acted_alone[static_cast<size_t>(current_thread())] = true; }

void expect_whole_warp() {
  if (acted_alone[static_cast<size_t>(current_thread())]) fail("a warp has diverged, and did not meet before wgmma");
}

int lane() { return current_thread() % kLanes; }

unsigned lanes_with(uint64_t word, const WarpWords& words) {
  unsigned lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<unsigned>(words[static_cast<size_t>(i)] == word) << i;
  return lanes;
}

}  // namespace emulation
