#include "model/config.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "base/error.h"

namespace qwen_moe {
namespace {

void positive(const char* field, int value) {
  require(value > 0, field, " must be positive, got ", value);
}

void multiple(const char* field, int value, int of) {
  positive(field, value);
  require(value % of == 0, field, " must be a multiple of ", of, " for this core, got ", value);
}

}  // namespace

void ModelConfig::validate() const {
  positive("vocab_size", vocab_size);
  positive("num_hidden_layers", num_hidden_layers);
  positive("max_position_embeddings", max_position_embeddings);
  require(static_cast<int>(layer_types.size()) == num_hidden_layers, "layer_types names ",
          layer_types.size(), " layers, num_hidden_layers says ", num_hidden_layers);
  multiple("hidden_size", hidden_size, 32);

  multiple("head_dim", head_dim, 32);
  require(head_dim <= 512, "head_dim must be at most 512 for this core, got ", head_dim);
  positive("num_attention_heads", num_attention_heads);
  positive("num_key_value_heads", num_key_value_heads);
  require(num_attention_heads % num_key_value_heads == 0,
          "num_attention_heads must be a multiple of num_key_value_heads, got ",
          num_attention_heads, " and ", num_key_value_heads);
  require(rope_theta > 0, "rope_theta must be positive, got ", rope_theta);
  require(partial_rotary_factor > 0 && partial_rotary_factor <= 1,
          "partial_rotary_factor must be in (0, 1], got ", partial_rotary_factor);
  require(rotary_dim() % 2 == 0, "head_dim * partial_rotary_factor must be even, got ",
          rotary_dim());

  positive("linear_num_key_heads", linear_num_key_heads);
  positive("linear_num_value_heads", linear_num_value_heads);
  require(linear_num_value_heads % linear_num_key_heads == 0,
          "linear_num_value_heads must be a multiple of linear_num_key_heads, got ",
          linear_num_value_heads, " and ", linear_num_key_heads);
  multiple("linear_key_head_dim", linear_key_head_dim, 32);
  multiple("linear_value_head_dim", linear_value_head_dim, 32);
  require(linear_conv_kernel_dim >= 2 && linear_conv_kernel_dim <= 8,
          "linear_conv_kernel_dim must be in [2, 8], got ", linear_conv_kernel_dim);

  positive("num_experts", num_experts);
  require(num_experts_per_tok > 0 && num_experts_per_tok <= num_experts,
          "num_experts_per_tok must be in [1, num_experts = ", num_experts, "], got ",
          num_experts_per_tok);
  multiple("moe_intermediate_size", moe_intermediate_size, 32);
  multiple("shared_expert_intermediate_size", shared_expert_intermediate_size, 32);
  require(rms_norm_eps > 0 && rms_norm_eps < 1, "rms_norm_eps must be in (0, 1), got ",
          rms_norm_eps);
}

std::string ModelConfig::hash() const {
  uint64_t h = 0xcbf29ce484222325ull;  // FNV-1a over the fields as 64-bit words
  auto mix = [&h](uint64_t word) {
    for (int byte = 0; byte < 8; ++byte, word >>= 8) h = (h ^ (word & 0xff)) * 0x100000001b3ull;
  };
  for (int field : {vocab_size, hidden_size, num_hidden_layers, num_attention_heads,
                    num_key_value_heads, head_dim, linear_num_key_heads, linear_num_value_heads,
                    linear_key_head_dim, linear_value_head_dim, linear_conv_kernel_dim, num_experts,
                    num_experts_per_tok, moe_intermediate_size, shared_expert_intermediate_size,
                    tie_word_embeddings ? 1 : 0, max_position_embeddings})
    mix(static_cast<uint64_t>(field));
  for (LayerType type : layer_types) mix(static_cast<uint64_t>(type));
  for (double field : {rope_theta, partial_rotary_factor, rms_norm_eps})
    mix(std::bit_cast<uint64_t>(field));
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(h));
  return text;
}

float ModelConfig::inverse_frequency(int i) const {
  float exponent = static_cast<float>(2 * i) / static_cast<float>(rotary_dim());
  return 1.0f / std::pow(static_cast<float>(rope_theta), exponent);
}

}  // namespace qwen_moe
