// The ops a backend must have, one Args struct each: the shape contract.
//
// An op is one dependent phase: it may use every core or SM inside, and the next op needs all of
// its result. A layer is six of them. `Act` is the element type that sums have on the backend, `In`
// that of values which meet a weight next (both float on the CPU). Ops never see sessions: a row
// names the slot and the pages it may touch.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "base/tensor.h"
#include "model/config.h"
#include "model/weights.h"

namespace qwen_moe {

inline constexpr int kPageTokens =
    64;  // tokens in a KV page, and the chunk of the gated delta rule

// Rows of a step. Decode: one row for each of several sessions. Prefill: consecutive tokens of one.
struct StepRows {
  int rows = 0;
  const int32_t* token = nullptr;     // [rows]
  const int32_t* position = nullptr;  // [rows]
  const int32_t* slot = nullptr;      // [rows]
  const int32_t* pages = nullptr;  // row r: page numbers at pages + r * pages_stride (0 in prefill)
  int64_t pages_stride = 0;
};

// A fixed-size state buffer of every slot: slot s at data + s * stride.
struct SlotArray {
  float* data = nullptr;
  int64_t stride = 0;  // in floats
  constexpr float* at(int slot) const { return data + slot * stride; }
};

// One attention layer's KV: page p at data + p * page_stride, K [kv_heads, 64, head_dim] then V
// alike.
struct PagedKv {
  std::byte* data = nullptr;
  int64_t page_stride = 0;  // in bytes
  DType dtype = DType::bf16;
};

// Activations that pass between ops; allocated once for the largest step.
template <class Act, class In = Act>
struct Buffers {
  Act* hidden = nullptr;  // [rows, hidden] the residual stream
  Act* proj = nullptr;    // [rows, proj_stride] in_proj output: q|k|v|z|b|a, or q+gate|k|v
  int64_t proj_stride = 0;
  In* core = nullptr;  // [rows, value_dim or attention_dim] gated output of the token mixer
  // [rows, hidden] input of router, shared and routed experts, where a backend does not keep it.
  In* normed = nullptr;
  float* router = nullptr;        // [rows, num_experts] logits
  float* shared_scale = nullptr;  // [rows] shared_expert_gate before the sigmoid
  In* shared = nullptr;           // [rows, shared_intermediate] silu(gate) * up
  In* routed = nullptr;  // [rows * num_experts_per_tok, moe_intermediate], in the backend's order
};

// `next_norm`, where an op has it, is the weight of the RMSNorm that reads hidden next, [hidden]: a
// backend may do there what of the norm needs a single value only. Null: it is not known.
template <class Act>
struct EmbedArgs {
  Act* hidden;  // [rows, hidden]
  const WeightView& embed_tokens;
  const StepRows& rows;
  const float* next_norm = nullptr;
};

template <class Act>
struct NormInProjArgs {  // RMSNorm, then every projection of the token mixer
  Act* proj;             // [rows, proj_stride]
  int64_t proj_stride;
  const Act* hidden;  // [rows, hidden]
  const LayerWeights& layer;
  // A backend may run the causal conv here, where each channel has one owner, and advance the
  // window.
  SlotArray conv_state;
  const StepRows& rows;
};

template <class Act, class In = Act>
struct GatedDeltaArgs {  // conv + SiLU, L2 norm, gated delta rule, gated RMSNorm
  In* core;              // [rows, value_dim]
  int64_t core_stride;
  const Act* proj;  // [rows, q|k|v|z|b|a]
  int64_t proj_stride;
  SlotArray conv_state;       // [kernel - 1, conv_dim], oldest first
  SlotArray recurrent_state;  // [value_heads, key_head_dim, value_head_dim]
  const LayerWeights& layer;
  const StepRows& rows;
};

template <class Act, class In = Act>
struct AttentionArgs {  // q/k norm, RoPE, KV append, attention, sigmoid output gate
  In* core;             // [rows, attention_dim]
  int64_t core_stride;
  const Act* proj;  // [rows, (q|gate) per head | k | v]
  int64_t proj_stride;
  PagedKv kv;
  const LayerWeights& layer;
  const StepRows& rows;
};

template <class Act, class In = Act>
struct OutProjArgs {  // hidden += out_proj(core)
  Act* hidden;
  const In* core;  // [rows, weight.k]
  int64_t core_stride;
  const WeightView& weight;
  int rows;
  const float* next_norm = nullptr;
};

template <class Act, class In = Act>
struct NormRouterSharedArgs {  // RMSNorm, router logits, shared expert gate and gate/up
  In* normed;
  float* router;
  float* shared_scale;
  In* shared;
  const Act* hidden;
  const LayerWeights& layer;
  int rows;
};

template <class Act, class In = Act>
struct RoutedGateUpArgs {  // top-k of the softmax, renormalised; silu(gate) * up of each pick
  In* routed;
  const float* router;
  const In* normed;
  const LayerWeights& layer;
  const StepRows& rows;
};

template <class Act, class In = Act>
struct DownCombineArgs {  // hidden += sum over ranks of weight * down + sigmoid(scale) * shared
  Act* hidden;
  const In* routed;
  const float* router;  // the picks again, where the op works them out itself
  const float* shared_scale;
  const In* shared;
  const LayerWeights& layer;
  const StepRows& rows;
  const float* next_norm = nullptr;
};

template <class Act>
struct LmHeadArgs {   // final RMSNorm and vocabulary projection of some rows
  SlotArray logits;   // [vocab] of the row's slot
  const Act* hidden;  // [rows, hidden]
  const float* norm;
  const WeightView& lm_head;
  const int32_t* slot;  // [rows]
  int rows;
};

template <class Ops, class Act = typename Ops::Act, class In = typename Ops::In>
concept OpSet =
    requires(Ops& ops, const EmbedArgs<Act>& embed, const NormInProjArgs<Act>& in,
             const GatedDeltaArgs<Act, In>& delta, const AttentionArgs<Act, In>& attention,
             const OutProjArgs<Act, In>& out, const NormRouterSharedArgs<Act, In>& router,
             const RoutedGateUpArgs<Act, In>& up, const DownCombineArgs<Act, In>& down,
             const LmHeadArgs<Act>& head) {
      ops.embed(embed);
      ops.norm_in_proj(in);
      ops.gated_delta_step(delta);     // one token per row, rows of different slots
      ops.gated_delta_prefill(delta);  // consecutive tokens of one slot, chunks of 64
      ops.attention_step(attention);
      ops.attention_prefill(attention);
      ops.out_proj_residual(out);
      ops.norm_router_shared(router);
      ops.routed_gate_up(up);
      ops.down_combine_residual(down);
      ops.lm_head(head);
    };

}  // namespace qwen_moe
