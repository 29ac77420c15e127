// Stands in for csrc/cuda/ptx.cuh: the same functions, on fibers.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace regrpo::cuda {

constexpr bool kHasClusters = true;

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float max_nan(float x, float y) { return x != x || y != y ? NAN : fmaxf(x, y); }
inline unsigned pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | unsigned(__float2bfloat16_rn(high).bits) << 16;
}
inline unsigned pack_half(float low, float high) {
  return __float2half_rn(low).bits | unsigned(__float2half_rn(high).bits) << 16;
}
inline void unpack_half(unsigned word, float& low, float& high) {
  low = __half2float({uint16_t(word)});
  high = __half2float({uint16_t(word >> 16)});
}

inline unsigned char* dynamic_shared_memory() { return emulator::fiber->block->shared; }

// ---- clusters --------------------------------------------------------------------------------------------
inline unsigned cluster_rank() { return emulator::fiber->block->rank; }
inline unsigned cluster_size() { return unsigned(emulator::cluster->blocks.size()); }
inline void cluster_arrive() {
  emulator::fiber->cluster_generation = emulator::cluster->barrier.generation;
  emulator::arrive(emulator::cluster->barrier, unsigned(emulator::fibers.size()));
}
inline void cluster_wait() {
  emulator::wait_while_equal(&emulator::cluster->barrier.generation, emulator::fiber->cluster_generation,
                             "barrier.cluster");
}
inline void store_to_rank(float* at, unsigned rank, float value) {
  const auto& blocks = emulator::cluster->blocks;
  if (rank >= blocks.size()) emulator::fail("mapa: no such rank");
  if (emulator::cluster->barrier.generation == 0) emulator::fail("a store to a CTA that may not run yet");
  if (blocks[rank].returned == blockDim.x) emulator::fail("a store to a CTA that has returned");
  const size_t offset = reinterpret_cast<unsigned char*>(at) - emulator::fiber->block->shared;
  std::memcpy(blocks[rank].shared + offset, &value, sizeof(value));
}

// ---- bulk copies -----------------------------------------------------------------------------------------
using TransactionBarrier = emulator::Transactions;
inline void init_barrier(TransactionBarrier* barrier) {
  *barrier = {};
  barrier->count = barrier->pending = 1;
}
inline void publish_barriers() {}
inline void expect_bytes(TransactionBarrier* barrier, unsigned bytes) {
  if (bytes >= 1u << 20) emulator::fail("mbarrier: too many bytes");
  if (!barrier->pending) emulator::fail("mbarrier: an arrival too many");
  barrier->bytes += int(bytes);
  --barrier->pending;
  barrier->settle();
}
inline void bulk_load(void* to, const void* from, unsigned bytes, TransactionBarrier* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    emulator::fail("cp.async.bulk: not a multiple of 16 bytes");
  const emulator::Copy copy{to, from, bytes, barrier};
  if (emulator::copies_land_late) emulator::cluster->copies.push_back(copy);
  else emulator::land(copy);
}
inline void wait_barrier(TransactionBarrier* barrier, unsigned parity) {
  if ((barrier->phase & 1) == parity) emulator::wait_while_equal(&barrier->phase, barrier->phase, "mbarrier");
}

}  // namespace regrpo::cuda
