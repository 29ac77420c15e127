// Best-fit decreasing: sequences, the longest first, each into the fullest pack that still has room for it.
#include <algorithm>
#include <utility>
#include <vector>

#include "ops.h"

namespace regrpo::cpu {
namespace {

struct OpenPack {
  int64_t room, pack;
  bool operator<(const OpenPack& other) const {
    return room != other.room ? room < other.room : pack < other.pack;
  }
};

// Open packs in order, in blocks of a few cache lines: a balanced tree misses the cache at every level, and took
// twice as long for a million packs.
class OpenPacks {
 public:
  // Takes out the fullest pack with this much room, the oldest of equals; false: there is none.
  bool take(int64_t room, OpenPack& found) {
    const OpenPack least = {room, -1};
    const auto last = std::lower_bound(last_.begin(), last_.end(), least);
    if (last == last_.end()) return false;
    const auto block = blocks_.begin() + (last - last_.begin());
    const auto slot = std::lower_bound(block->begin(), block->end(), least);
    found = *slot;
    block->erase(slot);
    if (block->empty()) {
      blocks_.erase(block);
      last_.erase(last);
    } else {
      *last = block->back();
    }
    return true;
  }

  void put(const OpenPack& pack) {
    if (blocks_.empty()) {
      blocks_.push_back({pack});
      last_.push_back(pack);
      return;
    }
    auto last = std::lower_bound(last_.begin(), last_.end(), pack);
    if (last == last_.end()) --last;
    const auto block = blocks_.begin() + (last - last_.begin());
    block->insert(std::lower_bound(block->begin(), block->end(), pack), pack);
    *last = block->back();
    if (block->size() < kBlock) return;
    const auto middle = block->begin() + kBlock / 2;
    std::vector<OpenPack> lower(block->begin(), middle);
    block->erase(block->begin(), middle);
    last_.insert(last, lower.back());
    blocks_.insert(block, std::move(lower));
  }

 private:
  static constexpr size_t kBlock = 256;
  std::vector<std::vector<OpenPack>> blocks_;  // none is empty
  std::vector<OpenPack> last_;                 // of each block
};

}  // namespace

int best_fit_decreasing(BestFitArgs& args) {
  const int64_t count = args.sequences;
  std::vector<std::pair<int64_t, int64_t>> decreasing(count);  // (-length, sequence): equal lengths keep their order
  for (int64_t i = 0; i < count; ++i) decreasing[i] = {-args.lengths[i], i};
  std::sort(decreasing.begin(), decreasing.end());
  if (count && -decreasing.front().first > args.budget) {
    args.bad_sequence = decreasing.front().second;
    return kTooLong;
  }
  std::vector<int64_t> pack_of(count);  // in decreasing order
  std::vector<int64_t> next;            // of each pack: sequences so far, then where its next one goes
  OpenPacks open;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t length = -decreasing[k].first;
    OpenPack pack = {args.budget, static_cast<int64_t>(next.size())};
    if (!open.take(length, pack)) next.push_back(0);
    pack_of[k] = pack.pack;
    ++next[pack.pack];
    pack.room -= length;
    if (pack.room >= -decreasing.back().first) open.put(pack);  // otherwise nothing will ever fit
  }
  args.packs = static_cast<int64_t>(next.size());
  args.cu_packs[0] = 0;
  for (int64_t p = 0; p < args.packs; ++p) args.cu_packs[p + 1] = args.cu_packs[p] + next[p];
  std::copy(args.cu_packs, args.cu_packs + args.packs, next.begin());
  for (int64_t k = 0; k < count; ++k) args.order[next[pack_of[k]]++] = decreasing[k].second;
  return kOk;
}

}  // namespace regrpo::cpu
