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

#ifdef REGRPO_HAS_AVX2
#define REGRPO_DISPATCH(op, ...)                        \
  if (isa == kIsaAuto) isa = best_isa();                \
  if (!has_isa(isa)) return kNoSuchIsa;                 \
  switch (isa) {                                        \
    case kAvx512Bf16: return avx512_bf16::op(__VA_ARGS__); \
    case kAvx512: return avx512::op(__VA_ARGS__);       \
    case kAvx2: return avx2::op(__VA_ARGS__);           \
    default: return portable::op(__VA_ARGS__);          \
  }
#else
#define REGRPO_DISPATCH(op, ...)          \
  if (isa == kIsaAuto) isa = best_isa();  \
  if (!has_isa(isa)) return kNoSuchIsa;   \
  return portable::op(__VA_ARGS__);
#endif

int token_log_probs(TokenLogProbsArgs& args, int num_threads, int isa) {
  REGRPO_DISPATCH(token_log_probs, args, num_threads)
}
int token_log_probs_backward(TokenLogProbsArgs& args, int num_threads, int isa) {
  REGRPO_DISPATCH(token_log_probs_backward, args, num_threads)
}
int grpo_loss(GrpoLossArgs& args, int num_threads, int isa) { REGRPO_DISPATCH(grpo_loss, args, num_threads) }

}  // namespace regrpo::cpu
