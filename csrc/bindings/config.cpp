// The config of a model.
#include "model/config.h"

#include <string>
#include <vector>

#include "bindings/bindings.h"

namespace qwen_moe::bindings {
namespace {

LayerType parse_layer_type(const std::string& name) {
  if (name == "linear_attention") return LayerType::linear_attention;
  require(name == "full_attention", "layer_types holds '", name,
          "'; this core runs linear_attention and full_attention");
  return LayerType::full_attention;
}

std::vector<std::string> layer_type_names(const ModelConfig& c) {
  std::vector<std::string> names;
  for (LayerType t : c.layer_types)
    names.emplace_back(t == LayerType::linear_attention ? "linear_attention" : "full_attention");
  return names;
}

}  // namespace

void register_config(py::module_& m) {
  py::class_<ModelConfig>(m, "ModelConfig")
      .def(py::init([](int vocab_size, int hidden_size, int num_hidden_layers,
                       const std::vector<std::string>& layer_types, int num_attention_heads,
                       int num_key_value_heads, int head_dim, double rope_theta,
                       double partial_rotary_factor, int linear_num_key_heads,
                       int linear_num_value_heads, int linear_key_head_dim,
                       int linear_value_head_dim, int linear_conv_kernel_dim, int num_experts,
                       int num_experts_per_tok, int moe_intermediate_size,
                       int shared_expert_intermediate_size, double rms_norm_eps,
                       bool tie_word_embeddings, int max_position_embeddings) {
             ModelConfig c{.vocab_size = vocab_size,
                           .hidden_size = hidden_size,
                           .num_hidden_layers = num_hidden_layers,
                           .layer_types = {},
                           .num_attention_heads = num_attention_heads,
                           .num_key_value_heads = num_key_value_heads,
                           .head_dim = head_dim,
                           .rope_theta = rope_theta,
                           .partial_rotary_factor = partial_rotary_factor,
                           .linear_num_key_heads = linear_num_key_heads,
                           .linear_num_value_heads = linear_num_value_heads,
                           .linear_key_head_dim = linear_key_head_dim,
                           .linear_value_head_dim = linear_value_head_dim,
                           .linear_conv_kernel_dim = linear_conv_kernel_dim,
                           .num_experts = num_experts,
                           .num_experts_per_tok = num_experts_per_tok,
                           .moe_intermediate_size = moe_intermediate_size,
                           .shared_expert_intermediate_size = shared_expert_intermediate_size,
                           .rms_norm_eps = rms_norm_eps,
                           .tie_word_embeddings = tie_word_embeddings,
                           .max_position_embeddings = max_position_embeddings};
             for (const std::string& name : layer_types)
               c.layer_types.push_back(parse_layer_type(name));
             c.validate();
             return c;
           }),
           py::kw_only(), "vocab_size"_a, "hidden_size"_a, "num_hidden_layers"_a, "layer_types"_a,
           "num_attention_heads"_a, "num_key_value_heads"_a, "head_dim"_a, "rope_theta"_a,
           "partial_rotary_factor"_a, "linear_num_key_heads"_a, "linear_num_value_heads"_a,
           "linear_key_head_dim"_a, "linear_value_head_dim"_a, "linear_conv_kernel_dim"_a,
           "num_experts"_a, "num_experts_per_tok"_a, "moe_intermediate_size"_a,
           "shared_expert_intermediate_size"_a, "rms_norm_eps"_a, "tie_word_embeddings"_a,
           "max_position_embeddings"_a)
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("hidden_size", &ModelConfig::hidden_size)
      .def_readonly("num_hidden_layers", &ModelConfig::num_hidden_layers)
      .def_property_readonly("layer_types", &layer_type_names)
      .def_readonly("num_attention_heads", &ModelConfig::num_attention_heads)
      .def_readonly("num_key_value_heads", &ModelConfig::num_key_value_heads)
      .def_readonly("head_dim", &ModelConfig::head_dim)
      .def_readonly("rope_theta", &ModelConfig::rope_theta)
      .def_readonly("partial_rotary_factor", &ModelConfig::partial_rotary_factor)
      .def_readonly("linear_num_key_heads", &ModelConfig::linear_num_key_heads)
      .def_readonly("linear_num_value_heads", &ModelConfig::linear_num_value_heads)
      .def_readonly("linear_key_head_dim", &ModelConfig::linear_key_head_dim)
      .def_readonly("linear_value_head_dim", &ModelConfig::linear_value_head_dim)
      .def_readonly("linear_conv_kernel_dim", &ModelConfig::linear_conv_kernel_dim)
      .def_readonly("num_experts", &ModelConfig::num_experts)
      .def_readonly("num_experts_per_tok", &ModelConfig::num_experts_per_tok)
      .def_readonly("moe_intermediate_size", &ModelConfig::moe_intermediate_size)
      .def_readonly("shared_expert_intermediate_size",
                    &ModelConfig::shared_expert_intermediate_size)
      .def_readonly("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_readonly("tie_word_embeddings", &ModelConfig::tie_word_embeddings)
      .def_readonly("max_position_embeddings", &ModelConfig::max_position_embeddings)
      .def_property_readonly("hash", &ModelConfig::hash);
}

}  // namespace qwen_moe::bindings
