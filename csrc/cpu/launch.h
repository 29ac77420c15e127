// Shared by the CPU launchers: addresses of rows, dtype dispatch, the label check and the parallel loop.
#pragma once
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/row.h"
#include "cpu/variants.h"

namespace {

using namespace regrpo;

template <typename T>
T* row_at(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + (r / rows.inner) * rows.stride_outer + (r % rows.inner) * rows.stride_inner;
}

template <typename T>
bool is_aligned(const Rows& rows) {
  const uintptr_t bytes = 64;
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && uintptr_t(rows.stride_outer) * sizeof(T) % bytes == 0 &&
         uintptr_t(rows.stride_inner) * sizeof(T) % bytes == 0;
}

// Asks for huge pages under a large output that is about to be touched for the first time: page faults on 4 KiB
// pages cost more than computing the gradient. No effect on pages that are already there.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Calls work(row, next_row) for every row; next_row is what this thread takes afterwards, or -1. Rows are handed
// out one by one because masked rows cost nothing; a row's result does not depend on who computes it.
template <typename Work>
void for_each_row(int64_t rows, int64_t vocab, int num_threads, const Work& work) {
  int64_t next = 0;
  const bool parallel = num_threads > 1 && rows > 1 && rows * vocab > (1 << 15);
#pragma omp parallel num_threads(num_threads) if (parallel)
  {
    const auto take = [&next]() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); };
    int64_t row = take();
    while (row < rows) {
      const int64_t following = take();
      work(row, following < rows ? following : -1);
      row = following;
    }
  }
}

}  // namespace

// Calls FUNCTION<T>(...) for the element type of a dtype code.
#define REGRPO_FOR_DTYPE(dtype, FUNCTION, ...)       \
  switch (dtype) {                                   \
    case kFloat32: return FUNCTION<float>(__VA_ARGS__); \
    case kBFloat16: return FUNCTION<bf16>(__VA_ARGS__); \
    case kFloat16: return FUNCTION<fp16>(__VA_ARGS__);  \
    default: return kBadDtype;                       \
  }
