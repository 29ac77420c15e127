// What the tests call: the launchers of csrc/cuda, by pointers to their argument structs, and the emulated device.
#include "cuda_runtime.h"
#include "ops.h"

using namespace regrpo;

extern "C" {

int token_log_probs(const TokenLogProbsArgs* args) { return cuda::token_log_probs(*args, nullptr); }
int token_log_probs_backward(const TokenLogProbsArgs* args) { return cuda::token_log_probs_backward(*args, nullptr); }
int grpo_loss(const GrpoLossArgs* args) { return cuda::grpo_loss(*args, nullptr); }
int sequence_objective(const SequenceObjectiveArgs* args) { return cuda::sequence_objective(*args, nullptr); }
int group_advantages(const GroupAdvantagesArgs* args) { return cuda::group_advantages(*args, nullptr); }
int reflection_advantages(const ReflectionAdvantagesArgs* args) { return cuda::reflection_advantages(*args, nullptr); }

// The size of an argument struct, which the tests declare a second time.
int64_t size_of(const char* name) {
  const std::map<std::string, size_t> sizes = {{"TokenLogProbsArgs", sizeof(TokenLogProbsArgs)},
                                               {"GrpoLossArgs", sizeof(GrpoLossArgs)},
                                               {"SequenceObjectiveArgs", sizeof(SequenceObjectiveArgs)},
                                               {"GroupAdvantagesArgs", sizeof(GroupAdvantagesArgs)},
                                               {"ReflectionAdvantagesArgs", sizeof(ReflectionAdvantagesArgs)}};
  return int64_t(sizes.at(name));
}

// A new device becomes the current one; kernels know devices by their number.
int add_device(int capability, int shared_per_block, int shared_per_multiprocessor) {
  emulator::devices.push_back({capability, shared_per_block, shared_per_multiprocessor});
  return int(emulator::devices.size()) - 1;
}
void set_device(int index) { emulator::current_device = index; }
void set_order(bool copies_land_late, bool falling_order) {
  emulator::copies_land_late = copies_land_late;
  emulator::falling_order = falling_order;
}
const char* last_error() { return emulator::error.c_str(); }
// The CTAs a cluster of the last launch, and its grid.
int last_cluster() { return int(emulator::launches.back().cluster); }
int64_t last_grid() { return emulator::launches.back().grid; }
int64_t launch_count() { return int64_t(emulator::launches.size()); }
}
