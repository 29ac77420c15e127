// The only file that knows Python. Tensors arrive as integers: data pointers, sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using namespace regrpo;

namespace {

template <typename T>
T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// (data pointer, inner length, outer stride, inner stride)
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
Rows rows_of(const RowsTuple& r) { return {ptr<void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r), std::get<3>(r)}; }

void check(int status, const char* op, const int64_t* labels = nullptr, int64_t bad_row = 0, int64_t vocab = 0) {
  if (status == kOk) return;
  if (status == kBadLabel) {
    throw py::value_error("labels[" + std::to_string(bad_row) + "] = " + std::to_string(labels[bad_row]) +
                          " is out of range: expected 0 <= label < " + std::to_string(vocab) +
                          " (or -100 to skip the row); rows are counted over the flattened labels");
  }
  if (status == kNoSuchIsa) throw py::value_error(std::string(op) + ": this machine or build lacks the requested isa");
  throw std::runtime_error(std::string(op) + " failed with status " + std::to_string(status));
}

int isa_code(const std::string& isa) {
  static const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  for (int i = 0; i < kIsaCount; ++i)
    if (isa == names[i]) return i;
  return kIsaAuto;
}

void run_token_log_probs(int dtype, RowsTuple logits, int64_t rows, int64_t vocab, uintptr_t labels, double temperature,
                         double softcap, uintptr_t log_probs, uintptr_t lse, uintptr_t entropy, uintptr_t reference,
                         uintptr_t sum, std::optional<uintptr_t> stream, int num_threads, const std::string& isa) {
  TokenLogProbsArgs args{};
  args.dtype = dtype;
  args.logits = rows_of(logits);
  args.rows = rows;
  args.vocab = vocab;
  args.labels = ptr<int64_t>(labels);
  args.temperature = temperature;
  args.softcap = softcap;
  args.log_probs = ptr<float>(log_probs);
  args.lse = ptr<float>(lse);
  args.entropy = ptr<float>(entropy);
  args.reference = ptr<float>(reference);
  args.sum = ptr<float>(sum);
#ifdef REGRPO_CUDA_ARCHITECTURES
  if (stream) return check(cuda::token_log_probs(args, ptr<void>(*stream)), "token_log_probs");
#endif
  if (stream) throw std::runtime_error("token_log_probs: the CUDA kernels are not compiled");
  const int status = cpu::token_log_probs(args, num_threads, isa_code(isa));  // sets bad_row, so on its own
  check(status, "token_log_probs", args.labels, args.bad_row, vocab);
}

void run_token_log_probs_backward(int dtype, RowsTuple logits, int64_t rows, int64_t vocab, uintptr_t labels,
                                  double temperature, double softcap, uintptr_t reference, uintptr_t sum,
                                  uintptr_t entropy, uintptr_t dlog_probs, uintptr_t dentropy, RowsTuple dlogits,
                                  std::optional<uintptr_t> stream, int num_threads, const std::string& isa) {
  TokenLogProbsArgs args{};
  args.dtype = dtype;
  args.logits = rows_of(logits);
  args.rows = rows;
  args.vocab = vocab;
  args.labels = ptr<int64_t>(labels);
  args.temperature = temperature;
  args.softcap = softcap;
  args.reference = ptr<float>(reference);
  args.sum = ptr<float>(sum);
  args.entropy = ptr<float>(entropy);
  args.dlog_probs = ptr<float>(dlog_probs);
  args.dentropy = ptr<float>(dentropy);
  args.dlogits = rows_of(dlogits);
#ifdef REGRPO_CUDA_ARCHITECTURES
  if (stream) return check(cuda::token_log_probs_backward(args, ptr<void>(*stream)), "token_log_probs_backward");
#endif
  if (stream) throw std::runtime_error("token_log_probs_backward: the CUDA kernels are not compiled");
  check(cpu::token_log_probs_backward(args, num_threads, isa_code(isa)), "token_log_probs_backward");
}

// mask, weights, advantages, old_log_probs, ref_log_probs
using TokensTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// ObjectiveParams, in its order
using ObjectiveTuple = std::tuple<int, int, float, float, float, float, float, float, float>;

template <typename Args>
void set_objective(Args& args, const TokensTuple& tokens, const ObjectiveTuple& objective) {
  args.mask = ptr<uint8_t>(std::get<0>(tokens));
  args.weights = ptr<float>(std::get<1>(tokens));
  args.advantages = ptr<float>(std::get<2>(tokens));
  args.old_log_probs = ptr<float>(std::get<3>(tokens));
  args.ref_log_probs = ptr<float>(std::get<4>(tokens));
  args.objective = std::apply([](auto... values) { return ObjectiveParams{values...}; }, objective);
}

void run_grpo_loss(int dtype, RowsTuple logits, int64_t rows, int64_t vocab, uintptr_t labels, TokensTuple tokens,
                   ObjectiveTuple objective, double temperature, double softcap, uintptr_t stats,
                   std::optional<RowsTuple> dlogits, std::optional<uintptr_t> stream, int num_threads,
                   const std::string& isa) {
  GrpoLossArgs args{};
  args.dtype = dtype;
  args.logits = rows_of(logits);
  args.rows = rows;
  args.vocab = vocab;
  args.labels = ptr<int64_t>(labels);
  set_objective(args, tokens, objective);
  args.temperature = temperature;
  args.softcap = softcap;
  args.stats = ptr<float>(stats);
  if (dlogits) args.dlogits = rows_of(*dlogits);
#ifdef REGRPO_CUDA_ARCHITECTURES
  if (stream) return check(cuda::grpo_loss(args, ptr<void>(*stream)), "grpo_loss");
#endif
  if (stream) throw std::runtime_error("grpo_loss: the CUDA kernels are not compiled");
  const int status = cpu::grpo_loss(args, num_threads, isa_code(isa));
  check(status, "grpo_loss", args.labels, args.bad_row, vocab);
}

void run_sequence_objective(int64_t rows, int64_t sequences, uintptr_t cu_seqlens, TokensTuple tokens,
                            ObjectiveTuple objective, uintptr_t stats, std::optional<uintptr_t> stream) {
  SequenceObjectiveArgs args{};
  args.tokens = rows;
  args.sequences = sequences;
  args.cu_seqlens = ptr<int64_t>(cu_seqlens);
  set_objective(args, tokens, objective);
  args.stats = ptr<float>(stats);
#ifdef REGRPO_CUDA_ARCHITECTURES
  if (stream) return check(cuda::sequence_objective(args, ptr<void>(*stream)), "sequence_objective");
#endif
  if (stream) throw std::runtime_error("sequence_objective: the CUDA kernels are not compiled");
  check(cpu::sequence_objective(args), "sequence_objective");
}

void run_group_advantages(int64_t sequences, uintptr_t rewards, uintptr_t group_ids, int64_t group_size, int baseline,
                          int scale, int ddof, double eps, double min_std, double clip, uintptr_t advantages,
                          std::optional<uintptr_t> stream) {
  GroupAdvantagesArgs args;
  args.sequences = sequences;
  args.rewards = ptr<const float>(rewards);
  args.group_ids = ptr<const int64_t>(group_ids);
  args.group_size = group_size;
  args.rule = {baseline, scale, ddof, eps, min_std, clip};
  args.advantages = ptr<float>(advantages);
#ifdef REGRPO_CUDA_ARCHITECTURES
  if (stream) return check(cuda::group_advantages(args, ptr<void>(*stream)), "group_advantages");
#endif
  if (stream) throw std::runtime_error("group_advantages: the CUDA kernels are not compiled");
  check(cpu::group_advantages(args), "group_advantages");
}

void run_reflection_advantages(int64_t sequences, int64_t tokens, uintptr_t success, uintptr_t verifier_scores,
                               uintptr_t segment_ids, int segment_id_bytes, uintptr_t cu_seqlens, double lambda_exec,
                               double eta, double tokens_per_cost, double lambda_val, uintptr_t group_ids,
                               int64_t group_size, int baseline, int scale, int ddof, double eps, double min_std,
                               double clip, uintptr_t reflection_tokens, uintptr_t rewards, uintptr_t advantages,
                               uintptr_t token_advantages, uintptr_t loss_mask, std::optional<uintptr_t> stream) {
  ReflectionAdvantagesArgs args;
  args.tokens = tokens;
  args.success = ptr<const float>(success);
  args.verifier_scores = ptr<const float>(verifier_scores);
  args.segment_ids = ptr<const void>(segment_ids);
  args.segment_id_bytes = segment_id_bytes;
  args.cu_seqlens = ptr<const int32_t>(cu_seqlens);
  args.lambda_exec = lambda_exec;
  args.eta = eta;
  args.tokens_per_cost = tokens_per_cost;
  args.lambda_val = lambda_val;
  args.reflection_tokens = ptr<int64_t>(reflection_tokens);
  args.rewards = ptr<float>(rewards);
  args.group.sequences = sequences;
  args.group.rewards = args.rewards;
  args.group.group_ids = ptr<const int64_t>(group_ids);
  args.group.group_size = group_size;
  args.group.rule = {baseline, scale, ddof, eps, min_std, clip};
  args.group.advantages = ptr<float>(advantages);
  args.token_advantages = ptr<float>(token_advantages);
  args.loss_mask = ptr<bool>(loss_mask);
#ifdef REGRPO_CUDA_ARCHITECTURES
  if (stream) return check(cuda::reflection_advantages(args, ptr<void>(*stream)), "reflection_advantages");
#endif
  if (stream) throw std::runtime_error("reflection_advantages: the CUDA kernels are not compiled");
  check(cpu::reflection_advantages(args), "reflection_advantages");
}

int64_t run_best_fit_decreasing(int64_t sequences, uintptr_t lengths, int64_t budget, uintptr_t order,
                                uintptr_t cu_packs) {
  BestFitArgs args{};
  args.sequences = sequences;
  args.lengths = ptr<const int64_t>(lengths);
  args.budget = budget;
  args.order = ptr<int64_t>(order);
  args.cu_packs = ptr<int64_t>(cu_packs);
  if (cpu::best_fit_decreasing(args) == kTooLong) {
    throw py::value_error("sequence " + std::to_string(args.bad_sequence) + " has " +
                          std::to_string(args.lengths[args.bad_sequence]) +
                          " tokens; expected at most the budget of " + std::to_string(budget));
  }
  return args.packs;
}

py::dict build_info() {
  static const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  std::vector<std::string> compiled = {"portable"}, usable;
#ifdef REGRPO_HAS_AVX2
  compiled.insert(compiled.end(), {"avx2", "avx512", "avx512_bf16"});
#endif
  for (int isa = 0; isa < kIsaCount; ++isa)
    if (cpu::has_isa(isa)) usable.emplace_back(names[isa]);
  py::dict info;
  info["cpu_isas_compiled"] = compiled;
  info["cpu_isas_usable"] = usable;
  info["cpu_isa"] = names[cpu::best_isa()];
#ifdef REGRPO_CUDA_ARCHITECTURES
  info["cuda_architectures"] = REGRPO_CUDA_ARCHITECTURES;
  info["cuda_row_kernels"] = "thread-block clusters on compute capability 9.x and 10.x, one CTA a row elsewhere";
#else
  info["cuda_architectures"] = "";
  info["cuda_row_kernels"] = "";
#endif
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", &build_info);
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("token_log_probs", &run_token_log_probs, nogil(), py::kw_only(), py::arg("dtype"), py::arg("logits"),
        py::arg("rows"), py::arg("vocab"), py::arg("labels"), py::arg("temperature"), py::arg("softcap"),
        py::arg("log_probs"), py::arg("lse"), py::arg("entropy"), py::arg("reference"), py::arg("sum"),
        py::arg("stream"), py::arg("num_threads") = 1, py::arg("isa") = "auto");
  m.def("token_log_probs_backward", &run_token_log_probs_backward, nogil(), py::kw_only(), py::arg("dtype"),
        py::arg("logits"), py::arg("rows"), py::arg("vocab"), py::arg("labels"), py::arg("temperature"),
        py::arg("softcap"), py::arg("reference"), py::arg("sum"), py::arg("entropy"), py::arg("dlog_probs"),
        py::arg("dentropy"), py::arg("dlogits"), py::arg("stream"), py::arg("num_threads") = 1,
        py::arg("isa") = "auto");
  m.def("grpo_loss", &run_grpo_loss, nogil(), py::kw_only(), py::arg("dtype"), py::arg("logits"), py::arg("rows"),
        py::arg("vocab"), py::arg("labels"), py::arg("tokens"), py::arg("objective"), py::arg("temperature"),
        py::arg("softcap"), py::arg("stats"), py::arg("dlogits"), py::arg("stream"), py::arg("num_threads") = 1,
        py::arg("isa") = "auto");
  m.def("sequence_objective", &run_sequence_objective, nogil(), py::kw_only(), py::arg("rows"), py::arg("sequences"),
        py::arg("cu_seqlens"), py::arg("tokens"), py::arg("objective"), py::arg("stats"), py::arg("stream"));
  m.def("group_advantages", &run_group_advantages, nogil(), py::kw_only(),
        py::arg("sequences"), py::arg("rewards"), py::arg("group_ids"), py::arg("group_size"), py::arg("baseline"),
        py::arg("scale"), py::arg("ddof"), py::arg("eps"), py::arg("min_std"), py::arg("clip"),
        py::arg("advantages"), py::arg("stream"));
  m.def("reflection_advantages", &run_reflection_advantages, nogil(), py::kw_only(),
        py::arg("sequences"), py::arg("tokens"), py::arg("success"), py::arg("verifier_scores"),
        py::arg("segment_ids"), py::arg("segment_id_bytes"), py::arg("cu_seqlens"), py::arg("lambda_exec"),
        py::arg("eta"), py::arg("tokens_per_cost"), py::arg("lambda_val"), py::arg("group_ids"),
        py::arg("group_size"), py::arg("baseline"), py::arg("scale"), py::arg("ddof"), py::arg("eps"),
        py::arg("min_std"), py::arg("clip"), py::arg("reflection_tokens"), py::arg("rewards"),
        py::arg("advantages"), py::arg("token_advantages"), py::arg("loss_mask"), py::arg("stream"));
  m.def("best_fit_decreasing", &run_best_fit_decreasing, nogil(), py::kw_only(), py::arg("sequences"),
        py::arg("lengths"), py::arg("budget"), py::arg("order"), py::arg("cu_packs"));
}
