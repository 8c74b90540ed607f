#include "state/layout.h"

namespace qwen_moe {

std::string StateBuffer::describe() const {
  return concat(fqn, " ", to_string(shape), " ", dtype_name(dtype),
                kind == BufferKind::per_token ? " per token" : "");
}

size_t StateLayout::fixed_bytes() const {
  size_t bytes = 0;
  for (const StateBuffer& b : buffers) bytes += b.kind == BufferKind::fixed ? b.bytes() : 0;
  return bytes;
}

size_t StateLayout::bytes_per_token() const {
  size_t bytes = 0;
  for (const StateBuffer& b : buffers) bytes += b.kind == BufferKind::per_token ? b.bytes() : 0;
  return bytes;
}

const StateBuffer* StateLayout::find(const std::string& fqn) const {
  for (const StateBuffer& b : buffers)
    if (b.fqn == fqn) return &b;
  return nullptr;
}

StateLayout declare_state(const ModelConfig& config, LayerSpan span, bool last, DType kv_dtype) {
  StateLayout layout;
  for (int i = span.begin; i < span.end; ++i) {
    std::string layer = concat("layers.", i, ".");
    if (config.layer_types[static_cast<size_t>(i)] == LayerType::linear_attention) {
      layout.buffers.push_back({layer + "linear_attn.conv_state",
                                DType::f32,
                                {config.linear_conv_kernel_dim - 1, config.conv_dim()}});
      layout.buffers.push_back({layer + "linear_attn.recurrent_state",
                                DType::f32,
                                {config.linear_num_value_heads, config.linear_key_head_dim,
                                 config.linear_value_head_dim}});
    } else {
      Shape token{config.num_key_value_heads, config.head_dim};
      layout.buffers.push_back(
          {layer + "self_attn.k_cache", kv_dtype, token, BufferKind::per_token});
      layout.buffers.push_back(
          {layer + "self_attn.v_cache", kv_dtype, token, BufferKind::per_token});
    }
  }
  if (last) layout.buffers.push_back({"lm_head.logits", DType::f32, {config.vocab_size}});
  return layout;
}

}  // namespace qwen_moe
