// Launchers of every op. Plain pointers, 64-bit sizes and strides (in elements), no framework header.
//
// A launcher returns 0, or a non-zero Status that bindings.cpp turns into a Python exception. Masked or ignored
// rows are never read. Output pointers that may be null say so.
#pragma once
#include <cstdint>

namespace regrpo {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Status codes: 0 is success, a positive number is a cudaError_t, these are ours.
enum Status : int { kOk = 0, kBadLabel = -1, kBadDtype = -2, kNoSuchIsa = -3, kTooLong = -4 };

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
  // For the backward of the same implementation, because lse is rounded: half a step of it is relative in p.
  float* reference;  // [rows] at or near the largest z
  float* sum;        // [rows] of exp((z - reference) / temperature)
  // backward only
  Rows dlogits;
  const float* dlog_probs;  // [rows]
  const float* dentropy;    // [rows] or null
  int64_t bad_row;          // out: the first row with a label out of range
};

// ---- grpo_loss -----------------------------------------------------------------------------------------
// Rows of the [kGrpoStats, T] statistics that every implementation writes, zero for masked rows. kStatDLogProb is the
// gradient of the whole loss with respect to the log-prob: the token's weight is in it.
enum GrpoStat : int {
  kStatLoss, kStatLogProb, kStatLse, kStatEntropy, kStatKl, kStatRatio, kStatClipLow, kStatClipHigh, kStatDLogProb,
  kGrpoStats
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

// ---- sequence-level ratios --------------------------------------------------------------------------------
// Between the two row passes: the mean log-ratio of each sequence, then every token's objective with it.
struct SequenceObjectiveArgs {
  int64_t tokens, sequences;
  const int64_t* cu_seqlens;   // [sequences + 1]
  const uint8_t* mask;         // [tokens]
  const float* weights;        // [tokens]
  const float* advantages;     // [tokens] or null (nll)
  const float* old_log_probs;  // [tokens] or null
  const float* ref_log_probs;  // [tokens] or null
  ObjectiveParams objective;
  float* stats;  // [kGrpoStats, tokens]; log_prob, lse and entropy are there already, the other rows are written
};

// ---- group_advantages, reflection_advantages -------------------------------------------------------------
// The numbers are the positions in BASELINES and SCALES of group_advantages.py, and Segment of reflection_advantages.py.
enum Baseline : int { kBaselineMean = 0, kBaselineLeaveOneOut = 1, kBaselineNone = 2 };
enum Scale : int { kScaleNone = 0, kScaleGroup = 1, kScaleBatch = 2 };
enum Segment : int { kSegmentContext = 0, kSegmentAction = 1, kSegmentObservation = 2, kSegmentReflection = 3 };

struct AdvantageRule {
  int baseline;
  int scale;
  int ddof;
  double eps, min_std;
  double clip;  // infinite: none
};

struct GroupAdvantagesArgs {
  int64_t sequences;
  const float* rewards;      // [sequences]
  const int64_t* group_ids;  // [sequences] in any order, or null: groups of group_size, one after the other
  int64_t group_size;
  AdvantageRule rule;
  float* advantages;  // [sequences]
};

struct ReflectionAdvantagesArgs {
  int64_t tokens;
  const float* success;          // [sequences]
  const float* verifier_scores;  // [sequences] or null
  const void* segment_ids;       // [tokens] integers of segment_id_bytes (1, 4 or 8)
  int segment_id_bytes;
  const int32_t* cu_seqlens;  // [sequences + 1]
  double lambda_exec, eta, tokens_per_cost, lambda_val;
  int64_t* reflection_tokens;  // [sequences]
  float* rewards;              // [sequences]; group.rewards is the same
  GroupAdvantagesArgs group;
  float* token_advantages;  // [tokens]
  bool* loss_mask;          // [tokens]
};

// ---- best_fit_decreasing ----------------------------------------------------------------------------------
struct BestFitArgs {
  int64_t sequences;
  const int64_t* lengths;  // [sequences], 0 or more
  int64_t budget;          // tokens of a pack, at most
  int64_t* order;          // [sequences], pack by pack
  int64_t* cu_packs;       // [sequences + 1], where packs start in order; the first packs + 1 are written
  int64_t packs;           // out
  int64_t bad_sequence;    // out: the longest sequence, where it is longer than the budget
};

// ---- launchers -------------------------------------------------------------------------------------------
namespace cpu {
int best_isa();
bool has_isa(int isa);  // compiled in, and this machine runs it
int token_log_probs(TokenLogProbsArgs& args, int num_threads, int isa);
int token_log_probs_backward(TokenLogProbsArgs& args, int num_threads, int isa);
int grpo_loss(GrpoLossArgs& args, int num_threads, int isa);
int sequence_objective(const SequenceObjectiveArgs& args);
int group_advantages(const GroupAdvantagesArgs& args);
int reflection_advantages(const ReflectionAdvantagesArgs& args);
int best_fit_decreasing(BestFitArgs& args);
}  // namespace cpu

#ifdef REGRPO_CUDA_ARCHITECTURES
namespace cuda {
int token_log_probs(const TokenLogProbsArgs& args, void* stream);
int token_log_probs_backward(const TokenLogProbsArgs& args, void* stream);
int grpo_loss(const GrpoLossArgs& args, void* stream);
int sequence_objective(const SequenceObjectiveArgs& args, void* stream);
int group_advantages(const GroupAdvantagesArgs& args, void* stream);
int reflection_advantages(const ReflectionAdvantagesArgs& args, void* stream);
}  // namespace cuda
#endif

}  // namespace regrpo
