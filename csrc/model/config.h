// Dimensions and layer kinds of one model, under the names of config.json (text_config), and the
// sizes derived from them. Immutable after validate().
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace qwen_moe {

enum class LayerType { linear_attention, full_attention };

struct ModelConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int num_hidden_layers = 0;
  std::vector<LayerType> layer_types;  // [num_hidden_layers]

  // Full attention.
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  double rope_theta = 0;
  double partial_rotary_factor = 0;

  // Gated DeltaNet.
  int linear_num_key_heads = 0;
  int linear_num_value_heads = 0;
  int linear_key_head_dim = 0;
  int linear_value_head_dim = 0;
  int linear_conv_kernel_dim = 0;

  // Mixture of experts.
  int num_experts = 0;
  int num_experts_per_tok = 0;
  int moe_intermediate_size = 0;
  int shared_expert_intermediate_size = 0;

  double rms_norm_eps = 0;
  bool tie_word_embeddings = false;
  int max_position_embeddings = 0;

  int key_dim() const { return linear_num_key_heads * linear_key_head_dim; }
  int value_dim() const { return linear_num_value_heads * linear_value_head_dim; }
  int conv_dim() const { return 2 * key_dim() + value_dim(); }  // channels of q | k | v
  int rotary_dim() const { return static_cast<int>(head_dim * partial_rotary_factor); }
  // theta^(-2i / rotary_dim) in fp32, as the model class computes it; i < rotary_dim / 2.
  float inverse_frequency(int i) const;
  int attention_dim() const { return num_attention_heads * head_dim; }
  int kv_dim() const { return num_key_value_heads * head_dim; }

  // Throws InvalidArgument naming the first field that this core cannot run.
  void validate() const;

  // 64-bit hash of every field, as 16 hex digits: what a snapshot or a shared weight must agree on.
  std::string hash() const;
};

}  // namespace qwen_moe
