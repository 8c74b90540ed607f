// The model, written once for every backend, in reading order.
#pragma once

#include <vector>

#include "model/ops.h"

namespace qwen_moe {

// Where the state of one layer lies. Only the members of the layer's kind are set.
struct LayerState {
  SlotArray conv_state, recurrent_state;
  PagedKv kv;
};

enum class Phase { prefill, decode };

template <OpSet Ops, class Act = typename Ops::Act, class In = typename Ops::In>
void forward_layers(Ops& ops, const ShardWeights& weights, const std::vector<LayerState>& state,
                    const Buffers<Act, In>& b, const StepRows& rows, Phase phase) {
  // The norm in front of layer i; the last shard's is followed by that of lm_head.
  auto norm_before = [&](size_t i) {
    if (i < weights.layers.size()) return weights.layers[i].input_layernorm;
    return weights.last ? weights.norm : nullptr;
  };
  if (weights.first)
    ops.embed({.hidden = b.hidden,
               .embed_tokens = weights.embed_tokens,
               .rows = rows,
               .next_norm = norm_before(0)});
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    ops.norm_in_proj({.proj = b.proj,
                      .proj_stride = b.proj_stride,
                      .hidden = b.hidden,
                      .layer = layer,
                      .conv_state = state[i].conv_state,
                      .rows = rows});
    if (layer.type == LayerType::linear_attention) {
      GatedDeltaArgs<Act, In> args{.core = b.core,
                                   .core_stride = layer.out_proj.spec.k,
                                   .proj = b.proj,
                                   .proj_stride = b.proj_stride,
                                   .conv_state = state[i].conv_state,
                                   .recurrent_state = state[i].recurrent_state,
                                   .layer = layer,
                                   .rows = rows};
      phase == Phase::prefill ? ops.gated_delta_prefill(args) : ops.gated_delta_step(args);
    } else {
      AttentionArgs<Act, In> args{.core = b.core,
                                  .core_stride = layer.out_proj.spec.k,
                                  .proj = b.proj,
                                  .proj_stride = b.proj_stride,
                                  .kv = state[i].kv,
                                  .layer = layer,
                                  .rows = rows};
      phase == Phase::prefill ? ops.attention_prefill(args) : ops.attention_step(args);
    }
    ops.out_proj_residual({.hidden = b.hidden,
                           .core = b.core,
                           .core_stride = layer.out_proj.spec.k,
                           .weight = layer.out_proj,
                           .rows = rows.rows,
                           .next_norm = layer.post_attention_layernorm});
    ops.norm_router_shared({.normed = b.normed,
                            .router = b.router,
                            .shared_scale = b.shared_scale,
                            .shared = b.shared,
                            .hidden = b.hidden,
                            .layer = layer,
                            .rows = rows.rows});
    ops.routed_gate_up(
        {.routed = b.routed, .router = b.router, .normed = b.normed, .layer = layer, .rows = rows});
    ops.down_combine_residual({.hidden = b.hidden,
                               .routed = b.routed,
                               .router = b.router,
                               .shared_scale = b.shared_scale,
                               .shared = b.shared,
                               .layer = layer,
                               .rows = rows,
                               .next_norm = norm_before(i + 1)});
  }
}

}  // namespace qwen_moe
