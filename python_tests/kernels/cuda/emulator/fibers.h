// The threads of one block, or of blocks that run together (a cluster, a cooperative grid), as fibers that take
// turns: each runs until it has to wait. A round in which nothing moves is a deadlock, and ends the launch. With a
// seed, blocks, warps and lanes take their turns in another order each round, and warps now and then miss one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32, kWarpgroup = 128, kLaneWords = 6, kIdleRounds = 64;
constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 256 << 10;

inline bool eager = false;  // asynchronous copies and wgmmas happen when issued; else when waited for
inline int slow_warp = -1;  // of every warpgroup: runs only when nothing else moves
inline uint64_t seed = 0;   // of the order in which things happen; 0 for one that is always the same
inline uint64_t launch = 0; // of this launch, by the seed: what the lanes of a warp draw alike follows from it
inline bool failed;         // a thread did what ends a launch

// What kernels are made to leave out, so that tests can see that it is missed; bits of `fault`.
enum Fault : unsigned {
  kProductsInLoop = 1,  // wgmma_wait that leaves some in flight waits for none
  kFullStages = 2,      // warps that multiply do not wait for mbarriers
  kEmptyStages = 4,     // those that load do not
  kCopies = 8,          // cp_async_wait
  kBlockBarrier = 16,   // __syncthreads
  kGridBarrier = 32,    // grid_sync
  kDependencyWait = 64, // griddepcontrol_wait
};
inline unsigned fault = 0;
inline ucontext_t scheduler;
inline bool moved;  // something happened in this round

// A number below `count`, the next of those that follow from the seed.
inline unsigned drawn(unsigned count) {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return static_cast<unsigned>((seed >> 20) % count);
}
template <typename T>
void shuffle(std::vector<T>& values) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[drawn(static_cast<unsigned>(i))]);
}

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  dim3 index;
  Barrier all;
  std::vector<Barrier> warps, warpgroups;
  std::vector<uint32_t> lanes;  // kLaneWords of each thread
};

// Asynchronous work of a thread, in groups as it commits them; the last one is still open.
using Groups = std::vector<std::vector<std::function<void()>>>;

inline void finish_all(Groups& groups) {
  for (auto& group : groups) {
    for (auto& work : group) work();
    group.clear();
  }
}

inline void finish_groups(Groups& groups, size_t left) {
  while (groups.size() > left + 1) {
    for (auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

// A copy by the tensor memory accelerator, and the mbarrier that counts its bytes.
struct Copy {
  uint32_t barrier;
  std::function<void()> work;
};
inline std::vector<Copy> in_flight;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  unsigned thread, rank, drawn;
  bool done, waited, triggered;
  Groups copies, wgmmas;
};

// Memory that the kernel before still works with, and what it holds once that has ended.
struct Watched {
  char* data;
  std::vector<char> after;
};
inline std::vector<Watched> watched;
inline bool is_early_launch;  // the kernel before has not ended
inline int triggered = 0;     // launches of which every block let the next one begin

inline void begin_early() {
  for (Watched& memory : watched) {
    memory.after.assign(memory.data, memory.data + memory.after.size());
    std::fill_n(memory.data, memory.after.size(), 0x5a);
  }
  is_early_launch = true;
}
inline void end_kernel_before() {  // backwards, since memory may be watched twice
  for (auto memory = watched.rbegin(); memory != watched.rend(); ++memory) {
    std::copy(memory->after.begin(), memory->after.end(), memory->data);
  }
  is_early_launch = false;
}

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Block> blocks;  // those that run together
inline Barrier together;           // of all their threads
inline std::vector<char> arena;    // their shared memory, one after the other
inline Fiber* current;
inline size_t ran;  // fibers of the blocks that ran last
inline std::function<void()> body;

inline Block& block() { return blocks[current->rank]; }
inline char* shared_base() {
  const auto address = reinterpret_cast<uintptr_t>(arena.data());
  return arena.data() + (1024 - address % 1024) % 1024;
}

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void fail() {
  for (failed = true;;) yield();
}

// Whether asynchronous work that all lanes of a warp have issued is done at this point already: with a seed at every
// fourth one, before it must be.
inline bool is_early() {
  if (seed == 0) return false;
  const uint64_t place = current->rank << 8 | current->thread / kWarp;
  uint64_t mixed = launch + (place << 32) + ++current->drawn;
  for (const uint64_t factor : {0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu}) mixed = (mixed ^ mixed >> 30) * factor;
  return (mixed >> 40) % 4 == 0;
}

inline void entry() {
  body();
  current->done = moved = true;
}

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned mine = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    moved = true;
  }
  while (barrier.generation == mine) yield();
}
inline void sync_warp() { wait(block().warps[threadIdx.x / kWarp], kWarp); }
inline void sync_warpgroup() { wait(block().warpgroups[threadIdx.x / kWarpgroup], kWarpgroup); }

// Fibers in the order of their turns in a round.
inline std::vector<unsigned> round(unsigned count, bool all) {
  std::vector<unsigned> turns;
  if (seed == 0) {
    turns.resize(count);
    std::iota(turns.begin(), turns.end(), 0u);
    return turns;
  }
  std::vector<unsigned> warps((count + kWarp - 1) / kWarp), lanes(kWarp);
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  shuffle(warps);
  for (const unsigned warp : warps) {
    if (!all && drawn(4) == 0) continue;
    shuffle(lanes);
    for (const unsigned lane : lanes) {
      if (warp * kWarp + lane < count) turns.push_back(warp * kWarp + lane);
    }
  }
  return turns;
}

// Runs blocks together, early where the kernel before has not ended; false where they wait for each other forever, or
// one fails.
inline bool run(const std::vector<dim3>& indices, unsigned threads, bool early) {
  blocks.clear();
  for (const dim3& index : indices) {
    Block made;
    made.index = index;
    made.warps.resize((threads + kWarp - 1) / kWarp);
    made.warpgroups.resize((threads + kWarpgroup - 1) / kWarpgroup);
    made.lanes.resize(threads * kLaneWords);
    blocks.push_back(std::move(made));
  }
  together = Barrier();
  in_flight.clear();  // those of a launch that failed
  failed = is_early_launch = false;
  if (seed != 0) drawn(2), launch = seed;
  arena.assign(indices.size() * kSharedBytes + 1024, 0x5a);  // shared memory starts as rubbish
  const unsigned count = threads * static_cast<unsigned>(indices.size());
  ran = count;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.thread = i % threads;
    fiber.rank = i / threads;
    fiber.done = fiber.waited = fiber.triggered = false;
    fiber.drawn = 0;
    fiber.copies.assign(1, {});
    fiber.wgmmas.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  if (early) begin_early();
  unsigned idle = 0;
  for (unsigned left = count; left > 0;) {
    moved = false;
    for (const unsigned i : round(count, idle > 0)) {
      if (fibers[i]->done) continue;
      if (idle == 0 && static_cast<int>(fibers[i]->thread % kWarpgroup / kWarp) == slow_warp) continue;
      current = fibers[i].get();
      threadIdx = dim3(current->thread, 0, 0);
      blockIdx = blocks[current->rank].index;
      swapcontext(&scheduler, &current->context);
      if (failed) return false;
      if (current->done) --left;
    }
    if (!moved && idle > 0 && is_early_launch) end_kernel_before(), moved = true;
    idle = moved ? 0 : idle + 1;
    if (idle > kIdleRounds) return false;
  }
  if (is_early_launch) end_kernel_before();
  return true;
}

// Of the blocks that ran last: whether each thread waited for the kernel before, and some thread of each let the next
// one begin.
inline bool all_waited() {
  const auto end = fibers.begin() + static_cast<std::ptrdiff_t>(ran);
  return std::all_of(fibers.begin(), end, [](const auto& fiber) { return fiber->waited; });
}
inline bool all_triggered() {
  std::vector<char> found(blocks.size());
  for (size_t i = 0; i < ran; ++i) found[fibers[i]->rank] |= static_cast<char>(fibers[i]->triggered);
  return std::all_of(found.begin(), found.end(), [](char one) { return one != 0; });
}

}  // namespace emulator
