// Declares every op once for each instruction set it is compiled for.
#pragma once
#include "ops.h"

#define REGRPO_DECLARE_VARIANT(isa)                                        \
  namespace regrpo::cpu::isa {                                             \
  int token_log_probs(TokenLogProbsArgs& args, int num_threads);           \
  int token_log_probs_backward(TokenLogProbsArgs& args, int num_threads);  \
  int grpo_loss(GrpoLossArgs& args, int num_threads);                      \
  }

REGRPO_DECLARE_VARIANT(portable)
REGRPO_DECLARE_VARIANT(avx2)
REGRPO_DECLARE_VARIANT(avx512)
REGRPO_DECLARE_VARIANT(avx512_bf16)
#undef REGRPO_DECLARE_VARIANT
