// Contiguous spans of layers on several backends, run in layer order. Activations are handed over
// at the boundaries only.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace qwen_moe {

class Pipeline {
 public:
  explicit Pipeline(std::vector<std::unique_ptr<Backend>> shards) : shards_(std::move(shards)) {}

  void reserve(const ReserveOptions& options) {
    for (auto& shard : shards_) shard->reserve(options);
  }

  std::vector<StateStore*> stores() const {
    std::vector<StateStore*> stores;
    for (const auto& shard : shards_) stores.push_back(shard.get());
    return stores;
  }

  std::map<std::string, size_t> memory() const {
    std::map<std::string, size_t> total;
    for (const auto& shard : shards_)
      for (const auto& [name, bytes] : shard->memory()) total[name] += bytes;
    return total;
  }

  std::map<std::string, int64_t> counters() const {
    std::map<std::string, int64_t> total;
    for (const auto& shard : shards_)
      for (const auto& [name, count] : shard->counters()) total[name] += count;
    return total;
  }

  // Several shards hand the residual stream over on the host, which waits for it.
  bool ahead() const { return shards_.size() == 1 && shards_.back()->ahead(); }

  // The least of all shards.
  PrefillChunk prefill_chunk() const {
    PrefillChunk least = shards_.front()->prefill_chunk();
    for (const auto& shard : shards_) {
      least.alone = std::min(least.alone, shard->prefill_chunk().alone);
      least.shared = std::min(least.shared, shard->prefill_chunk().shared);
    }
    return least;
  }

  void prefill(const PrefillStep& step) {
    for_each([&](Backend& shard, const Handoff* input) { shard.prefill(step, input); });
  }
  void decode(std::span<const DecodeRow> rows) {
    for_each([&](Backend& shard, const Handoff* input) { shard.decode(rows, input); });
  }
  Backend& last() { return *shards_.back(); }

 private:
  template <class Run>
  void for_each(const Run& run) {
    Handoff handed;
    for (size_t i = 0; i < shards_.size(); ++i) {
      run(*shards_[i], i ? &handed : nullptr);
      if (i + 1 < shards_.size()) handed = shards_[i]->hidden();
    }
  }

  std::vector<std::unique_ptr<Backend>> shards_;
};

}  // namespace qwen_moe
