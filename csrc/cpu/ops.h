// The ops of model/ops.h on the host. Activations are fp32. Every op splits its work into tasks for
// the thread pool so that no result depends on which thread took which task.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"
#include "model/ops.h"
#include "model/sampling.h"

namespace qwen_moe::cpu {

// Rows of block fixed point (cpu/kernels.h), allocated once for the largest use.
struct QuantizedRows {
  HostBuffer<int16_t> q;
  HostBuffer<float> scale;
  HostBuffer<int32_t> sum;
  QuantizedRows() = default;
  explicit QuantizedRows(size_t values) : q(values), scale(values / 32), sum(values / 32) {}
  size_t bytes() const { return q.bytes() + scale.bytes() + sum.bytes(); }
};

// The group in which the input of these weights is quantized: their own, which the plan keeps equal
// among weights that share an input (StoredFormats). 0 when all of them are dense.
int input_group(std::initializer_list<const WeightView*> weights);

struct Projection {
  const WeightView* weight;
  float* out;
  int64_t out_stride;
};

class CpuOps {
 public:
  using Act = float;
  using In = float;

  // Scratch for `rows` rows of a step; nothing allocates later.
  CpuOps(const ModelConfig& config, ThreadPool& pool, int rows, int max_context);

  void begin(const StepRows& rows);  // before the ops of a step: rotary angles of its positions

  void embed(const EmbedArgs<float>& args);
  void norm_in_proj(const NormInProjArgs<float>& args);
  void gated_delta_step(const GatedDeltaArgs<float>& args);
  void gated_delta_prefill(const GatedDeltaArgs<float>& args);
  void attention_step(const AttentionArgs<float>& args);
  void attention_prefill(const AttentionArgs<float>& args);
  void out_proj_residual(const OutProjArgs<float>& args);
  void norm_router_shared(const NormRouterSharedArgs<float>& args);
  void routed_gate_up(const RoutedGateUpArgs<float>& args);
  void down_combine_residual(const DownCombineArgs<float>& args);
  void lm_head(const LmHeadArgs<float>& args);

  void sample(std::span<const SampleRow> rows, const SlotArray& logits,
              std::span<SampleResult> results);

  size_t scratch_bytes() const;

 private:
  // Calls work(row, worker) for every row, on the pool when there are enough to share.
  template <class Work>
  void each_row(int rows, const Work& work) {
    if (rows < 4 || pool_.size() == 1) {
      for (int row = 0; row < rows; ++row) work(row, 0);
    } else {
      pool_.run(rows, work);
    }
  }

  // dense.cpp
  Activations activations(const QuantizedRows& rows, const float* x) const;
  void quantize(QuantizedRows& to, const float* x, int row, int k, int group);
  // out = weight * in for several weights that share an input.
  void project(std::span<const Projection> projections, const Activations& in, int rows);
  template <class Sink>
  void project_into(const WeightView& weight, const Activations& in, int rows, const Sink& sink);
  int tile_chunk(int tiles, int rows) const;  // tiles in a task

  // gated_delta.cpp
  void conv_and_norm(const GatedDeltaArgs<float>& args, int row, const float* const* taps);
  void delta_chunk(const GatedDeltaArgs<float>& args, int head, int begin, int tokens, float* work);
  void gate_output(const GatedDeltaArgs<float>& args, int row, int head, float* out);

  // attention.cpp
  struct Attending;
  struct PageHead {
    int page, kv_head;
  };
  void append_kv(const AttentionArgs<float>& args, int row);
  void attend_page(const AttentionArgs<float>& args, PageHead at, PageHead next, int tokens,
                   int causal_from, Attending& state, float* work);

  // moe.cpp
  void route(int row, const float* logits);
  void group_by_expert(int rows);

  // sample.cpp
  void sample_row(const SampleRow& row, const float* logits, SampleResult& result, int worker);

  const ModelConfig& c_;
  ThreadPool& pool_;
  const Kernels& k_;
  int max_rows_;

  HostBuffer<float> normed_;  // [rows, hidden]
  QuantizedRows in_q_;        // of the normed rows; kept from the router to the experts
  QuantizedRows mid_q_;       // of core, shared and routed activations
  HostBuffer<float>
      tile_;  // [workers, rows, 16 * kTileChunk] output before it is added or scattered
  HostBuffer<float> cos_, sin_;  // [rows, rotary_dim / 2]

  HostBuffer<float> qkv_;               // [rows, conv_dim] after conv, SiLU and L2 norm
  HostBuffer<float> log_decay_, beta_;  // [rows, value_heads]
  HostBuffer<float> delta_work_;        // [workers, delta_work_size_]
  size_t delta_work_size_ = 0;

  HostBuffer<float> query_;           // [rows, attention_dim] normed, rotated, scaled
  HostBuffer<float> partial_;         // decode: [rows, kv_heads, splits, group, head_dim + 2]
  HostBuffer<float> attention_work_;  // [workers, attention_work_size_]
  size_t attention_work_size_ = 0;
  int max_splits_ = 0;

  HostBuffer<int32_t> expert_of_;     // [rows, top_k]
  HostBuffer<float> weight_of_;       // [rows, top_k]
  HostBuffer<int32_t> pair_of_;       // [rows, top_k] place of a pick in expert order
  HostBuffer<int32_t> row_of_;        // [rows * top_k] row of a pick, in expert order
  std::vector<int> expert_begin_;     // [num_experts + 1] into expert order
  std::vector<int> active_;           // experts with at least one row
  HostBuffer<float> gate_up_;         // [rows * top_k, 2 * moe_intermediate]
  HostBuffer<float> shared_gate_up_;  // [rows, 2 * shared_intermediate]
  HostBuffer<float> down_;            // [rows * top_k, hidden]
  HostBuffer<float> shared_down_;     // [rows, hidden]

  struct Candidate {
    float logit;
    int32_t token;
  };
  HostBuffer<Candidate> candidates_;  // [workers, vocab]
  HostBuffer<float> adjusted_;        // [workers, vocab]
  HostBuffer<int32_t> counts_;        // [workers, vocab] all zero between calls
};

}  // namespace qwen_moe::cpu
