// The mutable buffers of one session, by FQN: what the model declares it will write.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "model/config.h"
#include "model/weights.h"

namespace qwen_moe {

enum class BufferKind { fixed, per_token };

struct StateBuffer {
  std::string fqn;  // e.g. layers.0.linear_attn.recurrent_state
  DType dtype = DType::f32;
  Shape shape;  // of a session, or of one token
  BufferKind kind = BufferKind::fixed;

  size_t bytes() const { return static_cast<size_t>(num_elements(shape)) * dtype_size(dtype); }
  std::string describe() const;
  bool operator==(const StateBuffer&) const = default;
};

struct StateLayout {
  std::vector<StateBuffer> buffers;

  size_t fixed_bytes() const;  // of one session
  size_t bytes_per_token() const;
  const StateBuffer* find(const std::string& fqn) const;
};

// The declaration for a span of layers. The last shard also owns lm_head.logits, the row from which
// the next token is drawn.
StateLayout declare_state(const ModelConfig& config, LayerSpan span, bool last, DType kv_dtype);

}  // namespace qwen_moe
