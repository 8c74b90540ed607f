#include "model/model.h"

#include <utility>

namespace qwen_moe {

Model::Model(ModelConfig config, Recipe recipe, DType dtype, std::string checkpoint,
             std::vector<std::shared_ptr<WeightHome>> homes, const std::vector<int>& split,
             const StoredFormats& stored)
    : config_(std::move(config)), recipe_(recipe), homes_(std::move(homes)) {
  config_.validate();
  require(!homes_.empty(), "devices is empty; name at least one");
  require(split.size() + 1 == homes_.size(),
          "split needs one layer index for every device but the first: ", homes_.size(),
          " devices, ", split.size(), " indices");
  int begin = 0;
  for (size_t i = 0; i < homes_.size(); ++i) {
    int end = i < split.size() ? split[i] : config_.num_hidden_layers;
    require(end > begin && end <= config_.num_hidden_layers, "split gives device ", i,
            " the layers ", begin, " to ", end, "; it must rise within 1 to ",
            config_.num_hidden_layers - 1);
    spans_.push_back({begin, end});
    begin = end;
  }
  require(begin == config_.num_hidden_layers, "split covers ", begin, " of ",
          config_.num_hidden_layers, " layers");

  bool tied_head = true;
  auto add = [&](const TensorSlot& slot, int shard) {
    auto tensor =
        WeightStore::instance().acquire(checkpoint, slot, *homes_[static_cast<size_t>(shard)]);
    index_.emplace(slot.fqn, entries_.size());
    entries_.push_back({std::move(tensor), shard});
  };
  int last = shards() - 1;
  std::vector<TensorSlot> slots = plan_tensors(config_, recipe_, dtype, stored);
  for (const TensorSlot& slot : slots) {
    tied_head &= slot.fqn != "lm_head.weight";
    int shard = slot.layer == -1 ? 0 : last;
    if (slot.layer >= 0)
      for (shard = 0; slot.layer >= spans_[static_cast<size_t>(shard)].end;) ++shard;
    add(slot, shard);
  }
  // A tied dense head reads the embedding, which the last device then holds too.
  if (tied_head && last > 0) add(slots.front(), last);
}

const Model::Entry& Model::entry(const std::string& fqn) const {
  auto found = index_.find(fqn);
  require(found != index_.end(), "the model has no tensor named ", fqn);
  return entries_[found->second];
}

const StoredTensor* Model::find(const std::string& fqn, int shard) const {
  auto [begin, end] = index_.equal_range(fqn);
  for (auto it = begin; it != end; ++it)
    if (entries_[it->second].shard == shard) return entries_[it->second].tensor.get();
  return nullptr;
}

size_t Model::bytes() const {
  size_t total = 0;
  std::unordered_map<const StoredTensor*, bool> seen;  // two shards on one device share a copy
  for (const Entry& e : entries_)
    if (seen.emplace(e.tensor.get(), true).second) total += e.tensor->slot().bytes();
  return total;
}

void Model::put(const std::string& fqn, const void* data, size_t bytes, DType dtype,
                int64_t first) {
  put(fqn, WeightSource(entry(fqn).tensor->slot().entries(data, bytes, dtype)), first);
}

void Model::read(const std::string& fqn, const FileParts& files, DType dtype, int64_t first) {
  put(fqn, entry(fqn).tensor->slot().entries(files, dtype), first);
}

void Model::put(const std::string& fqn, const WeightSource& source, int64_t first) {
  auto [begin, end] = index_.equal_range(fqn);
  for (auto it = begin; it != end; ++it) {
    const Entry& e = entries_[it->second];
    e.tensor->put(*homes_[static_cast<size_t>(e.shard)], source, first);
  }
}

uint32_t Model::read_packed(const std::string& fqn, int file, int64_t offset, size_t bytes,
                            size_t at) {
  entry(fqn);
  uint32_t sum = 0;
  const StoredTensor* last = nullptr;  // shards of one device share a tensor
  auto [begin, end] = index_.equal_range(fqn);
  for (auto it = begin; it != end; ++it) {
    const Entry& e = entries_[it->second];
    if (e.tensor.get() == std::exchange(last, e.tensor.get())) continue;
    PackedFile source(file, offset);
    e.tensor->put_packed(
        *homes_[static_cast<size_t>(e.shard)],
        [&](std::byte* to, size_t count) { source.read(to, count); }, bytes, at);
    sum = source.crc32();
  }
  return sum;
}

void Model::accept(const std::string& fqn) {
  entry(fqn);
  auto [begin, end] = index_.equal_range(fqn);
  for (auto it = begin; it != end; ++it) entries_[it->second].tensor->accept();
}

void Model::fill_random(const std::string& fqn, uint64_t seed) {
  entry(fqn);
  auto [begin, end] = index_.equal_range(fqn);
  for (auto it = begin; it != end; ++it) {
    const Entry& e = entries_[it->second];
    e.tensor->fill_random(*homes_[static_cast<size_t>(e.shard)], seed);
  }
}

void Model::finish() const {
  for (const Entry& e : entries_)
    require<Format>(e.tensor->complete(), "tensor ", e.tensor->slot().describe(),
                    " was not loaded completely");
  for (const auto& home : homes_) home->settle();
}

ShardWeights Model::shard(int index) const {
  finish();
  auto stored = [&](const std::string& name) -> const StoredTensor& {
    const StoredTensor* tensor = find(name, index);
    require(tensor != nullptr, "shard ", index, " holds no tensor named ", name);
    return *tensor;
  };
  ShardWeights shard{.span = span(index), .first = index == 0, .last = index == shards() - 1};
  auto view = [&](const std::string& name) {
    const StoredTensor& t = stored(name);
    return WeightView{t.data(), t.slot().spec};
  };
  if (shard.first) shard.embed_tokens = view("embed_tokens.weight");
  for (int i = shard.span.begin; i < shard.span.end; ++i) {
    std::string prefix = concat("layers.", i, ".");
    auto matrix = [&](const char* name) { return view(prefix + name); };
    auto floats = [&](const char* name) { return stored(prefix + name).floats(); };
    LayerWeights w;
    w.type = config_.layer_types[static_cast<size_t>(i)];
    w.input_layernorm = floats("input_layernorm.weight");
    if (w.type == LayerType::linear_attention) {
      w.in_proj_qkv = matrix("linear_attn.in_proj_qkv.weight");
      w.in_proj_z = matrix("linear_attn.in_proj_z.weight");
      w.in_proj_b = matrix("linear_attn.in_proj_b.weight");
      w.in_proj_a = matrix("linear_attn.in_proj_a.weight");
      w.conv1d = floats("linear_attn.conv1d.weight");
      w.decay_rate = floats("linear_attn.A_log");
      w.dt_bias = floats("linear_attn.dt_bias");
      w.norm = floats("linear_attn.norm.weight");
      w.out_proj = matrix("linear_attn.out_proj.weight");
    } else {
      w.q_proj = matrix("self_attn.q_proj.weight");
      w.k_proj = matrix("self_attn.k_proj.weight");
      w.v_proj = matrix("self_attn.v_proj.weight");
      w.q_norm = floats("self_attn.q_norm.weight");
      w.k_norm = floats("self_attn.k_norm.weight");
      w.out_proj = matrix("self_attn.o_proj.weight");
    }
    w.post_attention_layernorm = floats("post_attention_layernorm.weight");
    w.gate = matrix("mlp.gate.weight");
    w.experts_gate_up = matrix("mlp.experts.gate_up_proj");
    w.experts_down = matrix("mlp.experts.down_proj");
    w.shared_gate = matrix("mlp.shared_expert.gate_proj.weight");
    w.shared_up = matrix("mlp.shared_expert.up_proj.weight");
    w.shared_down = matrix("mlp.shared_expert.down_proj.weight");
    w.shared_expert_gate = matrix("mlp.shared_expert_gate.weight");
    shard.layers.push_back(w);
  }
  if (shard.last) {
    shard.norm = stored("norm.weight").floats();
    bool own_head = find("lm_head.weight", index) != nullptr;
    shard.lm_head = view(own_head ? "lm_head.weight" : "embed_tokens.weight");
  }
  return shard;
}

}  // namespace qwen_moe
