// The tensors a model needs, and the process-wide store that keeps one packed copy of each.
//
// A tensor is found by (checkpoint, FQN, format, device). Prefill, decode, every engine of the same
// checkpoint and later a draft head share the copy; it is freed with its last user. A hit whose
// description differs is refused with both descriptions.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/tensor.h"
#include "model/config.h"
#include "model/file_bytes.h"
#include "model/quant.h"

namespace qwen_moe {

// How a tensor stays resident.
enum class TensorKind {
  matrix,     // tiles of model/quant.h
  vector,     // f32 as it is
  one_plus,   // f32, stored as 1 + w (zero-centred RMSNorm)
  minus_exp,  // f32, stored as -exp(w) (A_log)
  conv_taps,  // [channels, 1, kernel] stored as f32 [kernel, channels]
};

// Entries of a tensor on their way in: in memory already, or read where they are wanted, so that
// what lies in a file passes through no memory in between.
class WeightSource {
 public:
  // Writes bytes [at, at + bytes) of the entries to `to`. Several threads may ask at once, and for
  // the same bytes again.
  using Read = std::function<void(std::byte* to, size_t at, size_t bytes)>;

  WeightSource(const void* data, DType dtype, Shape shape)
      : data_(static_cast<const std::byte*>(data)), dtype_(dtype), shape_(std::move(shape)) {}
  WeightSource(const TensorView& view) : WeightSource(view.data, view.dtype, view.shape) {}
  WeightSource(Read read, DType dtype, Shape shape)
      : read_(std::move(read)), dtype_(dtype), shape_(std::move(shape)) {}

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }  // of the entries
  void copy(std::byte* to, size_t at, size_t bytes) const;
  // The same bytes, where they are or in `buffer`.
  const std::byte* get(std::vector<std::byte>& buffer, size_t at, size_t bytes) const;
  // What begins at byte `at`; this one must outlive it.
  WeightSource part(size_t at, Shape shape) const;

 private:
  const std::byte* data_ = nullptr;  // null: `read_` has them
  Read read_;
  DType dtype_;
  Shape shape_;
};

struct TensorSlot {
  std::string fqn;
  Shape shape;  // in the checkpoint
  TensorKind kind = TensorKind::matrix;
  WeightRole role = WeightRole::exact;
  WeightSpec spec{};  // of a matrix
  int layer = -1;     // -1: embeddings, -2: final norm and head

  size_t bytes() const;
  std::string describe() const;

  // What packed bytes divide into: an expert, a tile of a plain matrix, or all of a vector.
  struct Unit {
    int64_t entries;  // of the leading dimension
    size_t bytes;
  };
  Unit unit() const;
  // `bytes` of a checkpoint as whole entries of the leading dimension.
  TensorView entries(const void* data, size_t bytes, DType dtype) const;
  // The same of bytes in files, which must outlive it.
  WeightSource entries(const FileParts& files, DType dtype) const;
};

// What a checkpoint that is quantized already says of its matrices.
struct StoredFormats {
  // By FQN: int8 or int4. They stay what they are; the recipe is for the others.
  std::map<std::string, WeightFormat> formats{};
  // The most input features that share a scale, in every quantized matrix of the model: matrices
  // with the same input read activations that are quantized once, in groups of that size.
  int group = 128;
};

// Every tensor of a model in reading order. `dense` is the checkpoint's own element type.
std::vector<TensorSlot> plan_tensors(const ModelConfig& config, Recipe recipe, DType dense,
                                     const StoredFormats& stored = {});

// Writes the next `bytes` of a packed tensor to `to`.
using PackedSource = std::function<void(std::byte* to, size_t bytes)>;

// A device's memory and its packer. Implemented once per kind of device.
class WeightHome {
 public:
  virtual ~WeightHome() = default;
  virtual std::string name() const = 0;
  virtual std::shared_ptr<std::byte> allocate(size_t bytes) = 0;
  // Packs entries [first, first + source.shape()[0]) of the leading dimension. Several threads may
  // call it at once.
  virtual void pack(std::byte* to, const TensorSlot& slot, const WeightSource& source,
                    int64_t first) = 0;
  // Takes whole units of a tensor as a host's home packs them; `to` is where the first belongs.
  // Several threads may call it at once.
  virtual void copy_packed(std::byte* to, const TensorSlot& slot, const PackedSource& from,
                           size_t bytes) = 0;
  virtual void fill_random(std::byte* to, const TensorSlot& slot, uint64_t seed) = 0;
  // Loading is over: memory that only packing and copying need goes back.
  virtual void settle() {}
};

// One resident tensor. Immutable once complete.
class StoredTensor {
 public:
  StoredTensor(TensorSlot slot, std::shared_ptr<std::byte> data);

  const TensorSlot& slot() const { return slot_; }
  const std::byte* data() const { return data_.get(); }
  const float* floats() const { return reinterpret_cast<const float*>(data_.get()); }
  bool complete() const;

  // Pieces whose entries are all there are skipped. Several threads may put several parts at once.
  void put(WeightHome& home, const WeightSource& source, int64_t first);
  // Bytes [at, at + bytes) of the packed tensor in host order, whole units. Several threads may put
  // several parts of one tensor at once. It is complete only after `accept`, so that bytes with a
  // wrong checksum are shared with nobody.
  void put_packed(WeightHome& home, const PackedSource& from, size_t bytes, size_t at);
  void accept();
  void fill_random(WeightHome& home, uint64_t seed);

 private:
  bool any_absent(int64_t first, int64_t end) const;
  void mark(int64_t first, int64_t end);

  TensorSlot slot_;
  std::shared_ptr<std::byte> data_;
  mutable std::mutex mutex_;
  std::vector<bool> filled_;  // [shape[0]]
  int64_t missing_ = 0;
  bool unchecked_ = false;  // packed bytes came that nobody has accepted yet
};

class WeightStore {
 public:
  static WeightStore& instance();

  // The tensor of that name, allocated when absent.
  std::shared_ptr<StoredTensor> acquire(const std::string& checkpoint, const TensorSlot& slot,
                                        WeightHome& home);
  size_t resident_bytes() const;

 private:
  using Key = std::tuple<std::string, std::string, WeightFormat, std::string>;
  mutable std::mutex mutex_;
  std::map<Key, std::weak_ptr<StoredTensor>> tensors_;
};

// What an op reads of a matrix.
struct WeightView {
  const std::byte* data = nullptr;
  WeightSpec spec;
  const std::byte* matrix(int index) const {
    return data + spec.matrix_bytes() * static_cast<size_t>(index);
  }
};

// Weights of one layer; unused members of the other layer kind stay null.
struct LayerWeights {
  LayerType type = LayerType::linear_attention;
  const float* input_layernorm = nullptr;  // [hidden] 1 + w
  WeightView in_proj_qkv, in_proj_z;       // [conv_dim, hidden], [value_dim, hidden]
  WeightView in_proj_b, in_proj_a;         // [linear_num_value_heads, hidden]
  const float* conv1d = nullptr;           // [kernel, conv_dim]
  const float* decay_rate = nullptr;       // [linear_num_value_heads] -exp(A_log)
  const float* dt_bias = nullptr;          // [linear_num_value_heads]
  const float* norm = nullptr;             // [linear_value_head_dim]
  WeightView out_proj;                     // [hidden, value_dim], or o_proj [hidden, attention_dim]
  WeightView q_proj, k_proj, v_proj;       // [2 * attention_dim, hidden], [kv_dim, hidden] twice
  const float* q_norm = nullptr;           // [head_dim] 1 + w
  const float* k_norm = nullptr;           // [head_dim] 1 + w
  const float* post_attention_layernorm = nullptr;  // [hidden] 1 + w
  WeightView gate;                                  // [num_experts, hidden]
  WeightView experts_gate_up;                       // num_experts x [2 * moe_intermediate, hidden]
  WeightView experts_down;                          // num_experts x [hidden, moe_intermediate]
  WeightView shared_gate, shared_up,
      shared_down;  // [shared_intermediate, hidden] twice, [hidden, shared_intermediate]
  WeightView shared_expert_gate;  // [1, hidden]
};

struct LayerSpan {
  int begin = 0, end = 0;
  int size() const { return end - begin; }
};

// What one shard of the pipeline reads.
struct ShardWeights {
  LayerSpan span;
  bool first = false, last = false;
  WeightView embed_tokens{};           // [vocab, hidden], first shard
  std::vector<LayerWeights> layers{};  // [span.size()]
  const float* norm = nullptr;         // [hidden] 1 + w, last shard
  WeightView lm_head{};                // [vocab, hidden], last shard
};

}  // namespace qwen_moe
