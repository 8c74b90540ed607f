// The shapes that kernels are tested on, and what every test of them needs.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/runtime.h"
#include "model/config.h"

namespace qwen_moe {

struct Shapes {
  const char* name;
  int hidden, heads, kv_heads, key_heads, value_heads, experts, top_k, inter, vocab;
};
inline ModelConfig config_of(const Shapes& s) {
  return {.vocab_size = s.vocab,
          .hidden_size = s.hidden,
          .num_hidden_layers = 2,
          .layer_types = {LayerType::linear_attention, LayerType::full_attention},
          .num_attention_heads = s.heads,
          .num_key_value_heads = s.kv_heads,
          .head_dim = 256,
          .rope_theta = 1e7,
          .partial_rotary_factor = 0.25,
          .linear_num_key_heads = s.key_heads,
          .linear_num_value_heads = s.value_heads,
          .linear_key_head_dim = 128,
          .linear_value_head_dim = 128,
          .linear_conv_kernel_dim = 4,
          .num_experts = s.experts,
          .num_experts_per_tok = s.top_k,
          .moe_intermediate_size = s.inter,
          .shared_expert_intermediate_size = s.inter,
          .rms_norm_eps = 1e-6,
          .max_position_embeddings = 4096};
}

template <class T>
cuda::DeviceBuffer<T> to_device(const std::vector<T>& host) {
  cuda::DeviceBuffer<T> buffer(host.size());
  QWEN_MOE_CUDA(cudaMemcpy(buffer.data(), host.data(), buffer.bytes(), cudaMemcpyDefault));
  return buffer;
}
template <class T>
std::vector<T> to_host(const cuda::DeviceBuffer<T>& buffer) {
  std::vector<T> host(buffer.size());
  QWEN_MOE_CUDA(cudaMemcpy(host.data(), buffer.data(), buffer.bytes(), cudaMemcpyDefault));
  return host;
}
inline double relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double difference = 0, size = 0;
  EXPECT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - want[i], 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(difference / size);
}

}  // namespace qwen_moe
