#include "model/weights.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace qwen_moe {

size_t TensorSlot::bytes() const {
  if (kind == TensorKind::matrix) return spec.bytes();
  return static_cast<size_t>(num_elements(shape)) * sizeof(float);
}

std::string TensorSlot::describe() const {
  if (kind != TensorKind::matrix) return concat(fqn, " ", to_string(shape), " float32");
  return concat(fqn, " ", to_string(shape), " ", format_name(spec.format),
                spec.group ? concat(" group ", spec.group) : "", spec.has_zero ? " with zero" : "");
}

TensorSlot::Unit TensorSlot::unit() const {
  if (kind != TensorKind::matrix) return {shape[0], bytes()};
  if (shape.size() == 3) return {1, spec.matrix_bytes()};
  return {kTile, spec.tile_bytes()};
}

TensorView TensorSlot::entries(const void* data, size_t bytes, DType dtype) const {
  Shape piece = shape;
  piece[0] = 1;
  const size_t each = static_cast<size_t>(num_elements(piece)) * dtype_size(dtype);
  require<Format>(bytes % each == 0 && bytes > 0, fqn, ": ", bytes, " bytes of ", dtype_name(dtype),
                  " are not whole entries of ", each, " bytes, shape ", to_string(shape));
  piece[0] = static_cast<int64_t>(bytes / each);
  return {data, dtype, piece};
}

WeightSource TensorSlot::entries(const FileParts& files, DType dtype) const {
  return {[&files](std::byte* to, size_t at, size_t bytes) { files.read(to, at, bytes); }, dtype,
          entries(nullptr, files.bytes(), dtype).shape};
}

void WeightSource::copy(std::byte* to, size_t at, size_t bytes) const {
  if (data_ != nullptr)
    std::memcpy(to, data_ + at, bytes);
  else
    read_(to, at, bytes);
}

const std::byte* WeightSource::get(std::vector<std::byte>& buffer, size_t at, size_t bytes) const {
  if (data_ != nullptr) return data_ + at;
  if (buffer.size() < bytes) buffer.resize(bytes);
  read_(buffer.data(), at, bytes);
  return buffer.data();
}

WeightSource WeightSource::part(size_t at, Shape shape) const {
  if (data_ != nullptr) return {data_ + at, dtype_, std::move(shape)};
  return {[this, at](std::byte* to, size_t from, size_t bytes) { read_(to, at + from, bytes); },
          dtype_, std::move(shape)};
}

namespace {

class Planner {
 public:
  Planner(const ModelConfig& config, Recipe recipe, DType dense, const StoredFormats& stored)
      : c_(config), recipe_(recipe), dense_(dense_format(dense)), stored_(stored) {}

  std::vector<TensorSlot> run() {
    layer_ = -1;
    matrix("embed_tokens.weight", WeightRole::embedding, c_.vocab_size, c_.hidden_size);
    for (layer_ = 0; layer_ < c_.num_hidden_layers; ++layer_) layer();
    layer_ = -2;
    vector("norm.weight", TensorKind::one_plus, {c_.hidden_size});
    // A tied head that stays dense is the embedding itself; a quantized one is a second, small
    // copy.
    WeightFormat head = format_of("lm_head.weight", WeightRole::lm_head);
    if (!c_.tie_word_embeddings || is_quantized(head))
      matrix("lm_head.weight", WeightRole::lm_head, c_.vocab_size, c_.hidden_size);
    return std::move(slots_);
  }

 private:
  void layer() {
    int h = c_.hidden_size;
    vector("input_layernorm.weight", TensorKind::one_plus, {h});
    if (c_.layer_types[static_cast<size_t>(layer_)] == LayerType::linear_attention) {
      matrix("linear_attn.in_proj_qkv.weight", WeightRole::in_proj, c_.conv_dim(), h);
      matrix("linear_attn.in_proj_z.weight", WeightRole::in_proj, c_.value_dim(), h);
      matrix("linear_attn.in_proj_b.weight", WeightRole::exact, c_.linear_num_value_heads, h);
      matrix("linear_attn.in_proj_a.weight", WeightRole::exact, c_.linear_num_value_heads, h);
      vector("linear_attn.conv1d.weight", TensorKind::conv_taps,
             {c_.conv_dim(), 1, c_.linear_conv_kernel_dim});
      vector("linear_attn.A_log", TensorKind::minus_exp, {c_.linear_num_value_heads});
      vector("linear_attn.dt_bias", TensorKind::vector, {c_.linear_num_value_heads});
      vector("linear_attn.norm.weight", TensorKind::vector, {c_.linear_value_head_dim});
      matrix("linear_attn.out_proj.weight", WeightRole::out_proj, h, c_.value_dim());
    } else {
      matrix("self_attn.q_proj.weight", WeightRole::attention_in, 2 * c_.attention_dim(), h);
      matrix("self_attn.k_proj.weight", WeightRole::attention_in, c_.kv_dim(), h);
      matrix("self_attn.v_proj.weight", WeightRole::attention_in, c_.kv_dim(), h);
      vector("self_attn.q_norm.weight", TensorKind::one_plus, {c_.head_dim});
      vector("self_attn.k_norm.weight", TensorKind::one_plus, {c_.head_dim});
      matrix("self_attn.o_proj.weight", WeightRole::out_proj, h, c_.attention_dim());
    }
    vector("post_attention_layernorm.weight", TensorKind::one_plus, {h});
    matrix("mlp.gate.weight", WeightRole::exact, c_.num_experts, h);
    matrix("mlp.experts.gate_up_proj", WeightRole::experts, 2 * c_.moe_intermediate_size, h,
           c_.num_experts);
    matrix("mlp.experts.down_proj", WeightRole::experts, h, c_.moe_intermediate_size,
           c_.num_experts);
    int shared = c_.shared_expert_intermediate_size;
    matrix("mlp.shared_expert.gate_proj.weight", WeightRole::shared_expert, shared, h);
    matrix("mlp.shared_expert.up_proj.weight", WeightRole::shared_expert, shared, h);
    matrix("mlp.shared_expert.down_proj.weight", WeightRole::shared_expert, h, shared);
    matrix("mlp.shared_expert_gate.weight", WeightRole::exact, 1, h);
  }

  std::string full_name(const char* name) const {
    return layer_ >= 0 ? concat("layers.", layer_, ".", name) : std::string(name);
  }

  WeightFormat format_of(const std::string& fqn, WeightRole role) const {
    auto found = stored_.formats.find(fqn);
    const bool fixed = role == WeightRole::embedding || role == WeightRole::exact;
    return found == stored_.formats.end() || fixed ? choose_format(recipe_, role, dense_)
                                                   : found->second;
  }

  void matrix(const char* name, WeightRole role, int n, int k, int count = 0) {
    TensorSlot slot{.fqn = full_name(name), .shape = {n, k}, .role = role, .layer = layer_};
    if (count) slot.shape.insert(slot.shape.begin(), count);
    slot.spec = {.format = format_of(slot.fqn, role), .n = n, .k = k, .count = count ? count : 1};
    if (is_quantized(slot.spec.format)) {
      slot.spec.group = group_for(k, stored_.group);
      require(slot.spec.group > 0, slot.fqn, " has ", k, " input features; ",
              format_name(slot.spec.format),
              " needs a multiple of 32, so open the checkpoint without quantizing");
    }
    slots_.push_back(std::move(slot));
  }

  void vector(const char* name, TensorKind kind, Shape shape) {
    slots_.push_back(
        {.fqn = full_name(name), .shape = std::move(shape), .kind = kind, .layer = layer_});
  }

  const ModelConfig& c_;
  Recipe recipe_;
  WeightFormat dense_;
  const StoredFormats& stored_;
  int layer_ = 0;
  std::vector<TensorSlot> slots_;
};

}  // namespace

std::vector<TensorSlot> plan_tensors(const ModelConfig& config, Recipe recipe, DType dense,
                                     const StoredFormats& stored) {
  return Planner(config, recipe, dense, stored).run();
}

StoredTensor::StoredTensor(TensorSlot slot, std::shared_ptr<std::byte> data)
    : slot_(std::move(slot)),
      data_(std::move(data)),
      filled_(static_cast<size_t>(slot_.shape[0]), false),
      missing_(slot_.shape[0]) {}

bool StoredTensor::complete() const {
  std::lock_guard lock(mutex_);
  return missing_ == 0 && !unchecked_;
}

void StoredTensor::put(WeightHome& home, const WeightSource& source, int64_t first) {
  int64_t entries = source.shape().at(0);
  require(first >= 0 && first + entries <= slot_.shape[0], slot_.fqn, ": entries ", first, " to ",
          first + entries, " of a leading dimension of ", slot_.shape[0]);
  {
    std::lock_guard lock(mutex_);
    if (!any_absent(first, first + entries)) return;
  }
  home.pack(data_.get(), slot_, source, first);
  std::lock_guard lock(mutex_);
  mark(first, first + entries);
}

void StoredTensor::put_packed(WeightHome& home, const PackedSource& from, size_t bytes, size_t at) {
  const TensorSlot::Unit unit = slot_.unit();
  require<Format>(at % unit.bytes == 0 && bytes % unit.bytes == 0 && bytes > 0 &&
                      at <= slot_.bytes() && bytes <= slot_.bytes() - at,
                  slot_.describe(), ": packed bytes ", at, " to ", at + bytes,
                  " are not whole units of ", unit.bytes, " of the tensor's ", slot_.bytes());
  const int64_t first = static_cast<int64_t>(at / unit.bytes) * unit.entries;
  const int64_t end =
      std::min(first + static_cast<int64_t>(bytes / unit.bytes) * unit.entries, slot_.shape[0]);
  {
    std::lock_guard lock(mutex_);
    require(missing_ > 0 || unchecked_, slot_.describe(), " is complete and in use");
    unchecked_ = true;
  }
  home.copy_packed(data_.get() + at, slot_, from, bytes);
  std::lock_guard lock(mutex_);
  mark(first, end);
}

void StoredTensor::accept() {
  std::lock_guard lock(mutex_);
  unchecked_ = false;
}

bool StoredTensor::any_absent(int64_t first, int64_t end) const {
  bool absent = false;
  for (int64_t i = first; i < end; ++i) absent |= !filled_[static_cast<size_t>(i)];
  return absent;
}

void StoredTensor::mark(int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) {
    missing_ -= !filled_[static_cast<size_t>(i)];
    filled_[static_cast<size_t>(i)] = true;
  }
}

void StoredTensor::fill_random(WeightHome& home, uint64_t seed) {
  std::lock_guard lock(mutex_);
  if (missing_ == 0) return;
  home.fill_random(data_.get(), slot_, seed);
  filled_.assign(filled_.size(), true);
  missing_ = 0;
}

WeightStore& WeightStore::instance() {
  static WeightStore store;
  return store;
}

std::shared_ptr<StoredTensor> WeightStore::acquire(const std::string& checkpoint,
                                                   const TensorSlot& slot, WeightHome& home) {
  std::lock_guard lock(mutex_);
  std::erase_if(tensors_, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<StoredTensor>& entry =
      tensors_[Key(checkpoint, slot.fqn, slot.spec.format, home.name())];
  if (std::shared_ptr<StoredTensor> found = entry.lock()) {
    const TensorSlot& there = found->slot();
    require<Format>(there.shape == slot.shape && there.kind == slot.kind && there.spec == slot.spec,
                    "the resident tensor ", there.describe(), " is not the one asked for, ",
                    slot.describe(), "; the checkpoint changed while in use");
    return found;
  }
  auto made = std::make_shared<StoredTensor>(slot, home.allocate(slot.bytes()));
  entry = made;
  return made;
}

size_t WeightStore::resident_bytes() const {
  std::lock_guard lock(mutex_);
  size_t bytes = 0;
  for (const auto& [key, entry] : tensors_)
    if (auto tensor = entry.lock()) bytes += tensor->slot().bytes();
  return bytes;
}

}  // namespace qwen_moe
