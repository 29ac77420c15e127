// Launchers of every op. Plain pointers, 64-bit sizes and strides (in elements), no framework header.
//
// A launcher returns 0, or a non-zero Status that bindings.cpp turns into a Python exception. Masked or ignored
// rows are never read. Output pointers that may be null say so.
#pragma once
#include <cstdint>

namespace regrpo {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Status codes: 0 is success, a positive number is a cudaError_t, these are ours.
enum Status : int { kOk = 0, kBadLabel = -1, kBadDtype = -2, kNoSuchIsa = -3 };

// Instruction sets of the CPU kernels, in order of preference. kIsaAuto takes the last one this machine runs.
enum Isa : int { kIsaAuto = -1, kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kIsaCount = 4 };

// Rows of a [T, V] matrix or of a [B, L, V] view: row r starts at
// (r / inner) * stride_outer + (r % inner) * stride_inner. Elements of a row are contiguous.
struct Rows {
  void* data;
  int64_t inner;
  int64_t stride_outer;
  int64_t stride_inner;
};

// ---- token_log_probs -----------------------------------------------------------------------------------
struct TokenLogProbsArgs {
  int dtype;
  Rows logits;
  int64_t rows, vocab;
  const int64_t* labels;  // [rows], -100 skips the row
  double temperature;
  double softcap;    // 0: none
  float* log_probs;  // [rows]
  float* lse;        // [rows]
  float* entropy;    // [rows] or null
  // backward only
  Rows dlogits;
  const float* dlog_probs;  // [rows]
  const float* dentropy;    // [rows] or null
  int64_t bad_row;          // out: the first row with a label out of range
};

// ---- grpo_loss -----------------------------------------------------------------------------------------
// Rows of the [kGrpoStats, T] statistics that every implementation writes, zero for masked rows.
enum GrpoStat : int {
  kStatLoss, kStatLogProb, kStatLse, kStatEntropy, kStatKl, kStatRatio, kStatClipLow, kStatClipHigh, kGrpoStats
};

struct ObjectiveParams {
  int policy;        // Policy in objective.h
  int kl_estimator;  // KlEstimator in objective.h
  float epsilon_low, epsilon_high;
  float delta;  // <= 0: no cap
  float beta;
  float entropy_coef;
  float sapo_tau_pos, sapo_tau_neg;
};

struct GrpoLossArgs {
  int dtype;
  Rows logits;
  int64_t rows, vocab;
  const int64_t* labels;       // [rows]
  const uint8_t* mask;         // [rows], 0: the row is skipped
  const float* weights;        // [rows], weight of the token in the loss
  const float* advantages;     // [rows] or null (nll)
  const float* old_log_probs;  // [rows] or null
  const float* ref_log_probs;  // [rows] or null
  double temperature;
  double softcap;  // 0: none
  ObjectiveParams objective;
  float* stats;   // [kGrpoStats, rows]
  Rows dlogits;   // data null: no gradient; may be the logits themselves
  int64_t bad_row;
};

// ---- group_advantages, reflection_advantages -------------------------------------------------------------

// ---- launchers -------------------------------------------------------------------------------------------
namespace cpu {
int best_isa();
bool has_isa(int isa);  // compiled in, and this machine runs it
int token_log_probs(TokenLogProbsArgs& args, int num_threads, int isa);
int token_log_probs_backward(TokenLogProbsArgs& args, int num_threads, int isa);
int grpo_loss(GrpoLossArgs& args, int num_threads, int isa);
}  // namespace cpu

#ifdef REGRPO_CUDA_ARCHITECTURES
namespace cuda {
int token_log_probs(const TokenLogProbsArgs& args, void* stream);
int token_log_probs_backward(const TokenLogProbsArgs& args, void* stream);
int grpo_loss(const GrpoLossArgs& args, void* stream);
}  // namespace cuda
#endif

}  // namespace regrpo
