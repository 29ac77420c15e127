// Chooses the widest compiled variant that this machine runs, or the one asked for.
#include "cpu/variants.h"

namespace regrpo::cpu {

bool has_isa(int isa) {
  switch (isa) {
    case kPortable:
      return true;
#ifdef REGRPO_HAS_AVX2
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_isa(kAvx2);
    case kAvx512Bf16:
      return __builtin_cpu_supports("avx512bf16") && has_isa(kAvx512);
#endif
    default:
      return false;
  }
}

int best_isa() {
  int isa = kIsaCount - 1;
  while (!has_isa(isa)) --isa;
  return isa;
}

}  // namespace regrpo::cpu
