// Runs CUDA kernels on the CPU, for tests: every thread of a thread-block cluster is a fiber, and they take turns on
// one core. Clusters run one after the other; their dynamic shared memory starts as NaN bytes and ends in guard bytes.
//
// What real hardware leaves undefined is made to fail here: bulk copies land as late as possible (or at once: both are
// legal), fibers run in rising or falling order, a barrier that not all threads reach is reported, and so is a write
// past the shared memory. `static` stands for __shared__, so only kernels without clusters may use that keyword.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };

// The built-in variables: set whenever a fiber is resumed.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

struct Device { int capability, shared_per_block, shared_per_multiprocessor; };
inline std::vector<Device> devices = {{90, 232448, 233472}};
inline int current_device = 0;

struct Launch { unsigned grid, threads, cluster; size_t shared_bytes; };
inline std::vector<Launch> launches;  // all so far
inline std::string error;             // of the last launch
inline bool copies_land_late = true, falling_order = false;

constexpr size_t kStack = 64 << 10, kGuard = 16 << 10;
constexpr unsigned kWarpSize = 32;

struct Barrier { unsigned generation = 0, arrived = 0; };
struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarpSize];
};
struct Block {
  unsigned rank, returned = 0;  // threads that have
  uint3 index;
  Barrier barrier;
  int any[2] = {0, 0};
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared;
};
struct Fiber {
  ucontext_t entry;
  jmp_buf state;
  bool started, done;
  unsigned thread, seen, cluster_generation;
  const unsigned* watched;  // runs again when this differs from `seen`
  const char* waits_at;
  Block* block;
};
struct Copy { void* to; const void* from; unsigned bytes; struct Transactions* barrier; };

// The 64 bits of an mbarrier.
struct Transactions {
  unsigned phase;
  int bytes : 24;
  unsigned pending : 4, count : 4;
  void settle() {
    if (pending || bytes) return;
    ++phase;
    pending = count;
  }
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  std::deque<Copy> copies;
};
inline Cluster* cluster;
inline std::vector<Fiber> fibers;  // of the running cluster
inline std::vector<std::unique_ptr<char[]>> stacks;
inline Fiber* fiber;
inline jmp_buf scheduler;
inline std::function<void()> body;

[[noreturn]] inline void leave() { _longjmp(scheduler, 1); }
[[noreturn]] inline void fail(const std::string& what) {
  if (error.empty())
    error = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
  leave();
}

__attribute__((noinline)) inline void wait_while_equal(const unsigned* watched, unsigned seen, const char* where) {
  if (*watched != seen) return;
  fiber->watched = watched;
  fiber->seen = seen;
  fiber->waits_at = where;
  if (_setjmp(fiber->state) == 0) leave();
}

inline void run_fiber() {
  body();
  fiber->done = true;
  ++fiber->block->returned;
  leave();
}

__attribute__((noinline)) inline void resume(Fiber& f, size_t index) {
  fiber = &f;
  f.watched = nullptr;
  threadIdx = {f.thread, 0, 0};
  blockIdx = f.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.state, 1);
  f.started = true;
  if (index >= stacks.size()) stacks.resize(index + 1);
  if (!stacks[index]) stacks[index].reset(new char[kStack]);
  getcontext(&f.entry);
  f.entry.uc_stack.ss_sp = stacks[index].get();
  f.entry.uc_stack.ss_size = kStack;
  f.entry.uc_link = nullptr;
  makecontext(&f.entry, run_fiber, 0);
  setcontext(&f.entry);
}

// Returns whether this was the last arrival.
inline bool arrive(Barrier& barrier, unsigned count) {
  if (++barrier.arrived < count) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}
inline void arrive_and_wait(Barrier& barrier, unsigned count, const char* where) {
  const unsigned generation = barrier.generation;
  if (!arrive(barrier, count)) wait_while_equal(&barrier.generation, generation, where);
}

inline int syncthreads_or(int predicate) {
  Block& block = *fiber->block;
  const unsigned now = block.barrier.generation & 1;
  block.any[now] |= predicate != 0;
  // all have read the other slot: they are here
  if (block.barrier.arrived + 1 == blockDim.x) block.any[1 - now] = 0;
  arrive_and_wait(block.barrier, blockDim.x, "__syncthreads");
  return block.any[now];
}

template <typename T>
T shuffle_xor(unsigned mask, T value, unsigned lane_mask) {
  if (mask != ~0u) fail("__shfl_xor_sync: the mask leaves lanes out");
  Warp& warp = fiber->block->warps[fiber->thread / kWarpSize];
  uint64_t* slots = warp.slots[warp.barrier.generation & 1];
  const unsigned lane = fiber->thread % kWarpSize;
  std::memcpy(&slots[lane], &value, sizeof(T));
  arrive_and_wait(warp.barrier, kWarpSize, "__shfl_xor_sync");
  std::memcpy(&value, &slots[lane ^ lane_mask], sizeof(T));
  return value;
}

inline void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.barrier->bytes -= int(copy.bytes);
  copy.barrier->settle();
}

inline void describe_deadlock() {
  std::map<std::string, int> waiting;
  int done = 0;
  for (const Fiber& f : fibers) f.done ? void(++done) : void(++waiting[f.waits_at]);
  error = "deadlock in the cluster of block " + std::to_string(cluster->blocks[0].index.x) + ": " +
          std::to_string(done) + " threads have returned";
  for (const auto& [where, count] : waiting) error += ", " + std::to_string(count) + " wait at " + where;
}

inline void run_cluster(unsigned first_block, const Launch& launch) {
  Cluster current;
  cluster = &current;
  current.blocks.resize(launch.cluster);
  fibers.assign(size_t(launch.cluster) * launch.threads, Fiber{});
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Block& block = current.blocks[rank];
    block.rank = rank;
    block.index = {first_block + rank, 0, 0};
    block.warps.resize((launch.threads + kWarpSize - 1) / kWarpSize);
    const size_t bytes = launch.shared_bytes + kGuard + 128;
    block.storage.reset(new unsigned char[bytes]);
    std::memset(block.storage.get(), 0xff, bytes);
    block.shared = block.storage.get() + (128 - reinterpret_cast<uintptr_t>(block.storage.get()) % 128);
    for (unsigned t = 0; t < launch.threads; ++t) {
      fibers[rank * launch.threads + t].thread = t;
      fibers[rank * launch.threads + t].block = &block;
    }
  }
  const size_t count = fibers.size(), threads = launch.threads;
  for (;;) {
    bool moved = false, all_done = true;
    for (size_t block = 0; block < count; block += threads) {
      // as far as this block gets, before the next one moves: others may not have started
      for (bool again = true; again;) {
        again = false;
        for (size_t k = block; k < block + threads; ++k) {
          const size_t i = falling_order ? count - 1 - k : k;
          Fiber& f = fibers[i];
          if (f.done || (f.watched && *f.watched == f.seen)) continue;
          resume(f, i);
          if (!error.empty()) return;
          again = moved = true;
        }
      }
    }
    for (const Fiber& f : fibers) all_done &= f.done;
    if (all_done) break;
    if (moved) continue;
    if (current.copies.empty()) return describe_deadlock();
    land(current.copies.front());
    current.copies.pop_front();
  }
  if (!current.copies.empty()) error = "a bulk copy was still on its way when the block returned";
  for (const Block& block : current.blocks)
    for (size_t i = 0; i < kGuard; ++i)
      if (block.shared[launch.shared_bytes + i] != 0xff) error = "a write past the dynamic shared memory";
}

inline int run(const Launch& launch, std::function<void()> kernel) {
  if (launch.grid == 0 || launch.threads == 0 || launch.threads > 1024 || launch.grid % launch.cluster) {
    error = "invalid launch configuration";
    return 9;  // cudaErrorInvalidConfiguration
  }
  launches.push_back(launch);
  error.clear();
  body = std::move(kernel);
  gridDim = dim3(launch.grid);
  blockDim = dim3(launch.threads);
  for (unsigned block = 0; block < launch.grid && error.empty(); block += launch.cluster) run_cluster(block, launch);
  return error.empty() ? 0 : 719;  // cudaErrorLaunchFailure
}

}  // namespace emulator
