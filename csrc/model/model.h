// A model: its tensors in the WeightStore, placed on one or several devices by contiguous spans of
// layers. Immutable once finished; any number of engines may hold it.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/weights.h"

namespace qwen_moe {

class Model {
 public:
  // homes[i] holds the layers from split[i - 1] (0 for the first) to split[i] (the end for the
  // last).
  Model(ModelConfig config, Recipe recipe, DType dtype, std::string checkpoint,
        std::vector<std::shared_ptr<WeightHome>> homes, const std::vector<int>& split,
        const StoredFormats& stored = {});

  const ModelConfig& config() const { return config_; }
  Recipe recipe() const { return recipe_; }
  int shards() const { return static_cast<int>(homes_.size()); }
  LayerSpan span(int shard) const { return spans_[static_cast<size_t>(shard)]; }

  struct Entry {
    std::shared_ptr<StoredTensor> tensor;
    int shard;
  };
  const std::vector<Entry>& entries() const { return entries_; }
  const WeightHome& home(int shard) const { return *homes_[static_cast<size_t>(shard)]; }
  size_t bytes() const;

  void put(const std::string& fqn, const void* data, size_t bytes, DType dtype, int64_t first);
  // The same of entries that lie in open files.
  void read(const std::string& fqn, const FileParts& files, DType dtype, int64_t first);
  // Bytes [at, at + bytes) of the tensor as a host packs it, which lie in a file at `offset`; gives
  // their CRC-32. Several threads may read at once. A tensor is complete once `accept` was called.
  uint32_t read_packed(const std::string& fqn, int file, int64_t offset, size_t bytes, size_t at);
  void accept(const std::string& fqn);
  void fill_random(const std::string& fqn, uint64_t seed);
  void finish() const;  // Format naming the first incomplete tensor

  ShardWeights shard(int index) const;

 private:
  const Entry& entry(const std::string& fqn) const;
  void put(const std::string& fqn, const WeightSource& source, int64_t first);
  // Tensors a shard holds may repeat (a tied embedding on first and last): found by name and shard.
  const StoredTensor* find(const std::string& fqn, int shard) const;

  ModelConfig config_;
  Recipe recipe_;
  std::vector<std::shared_ptr<WeightHome>> homes_;
  std::vector<LayerSpan> spans_;
  std::vector<Entry> entries_;
  std::unordered_multimap<std::string, size_t> index_;
};

}  // namespace qwen_moe
