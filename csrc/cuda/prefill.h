// The ops over many consecutive tokens of one session, through kernels compiled ahead of time
// (python/qwen_moe/kernels). An OpSet, so that `forward_layers` runs it; of its buffers only the
// residual stream is used, what passes between phases lies in scratch of its own: bf16 in the order
// in which weight tiles take their inputs ("fragment order", kernels/tiles.py).
#pragma once

#include <cuda_bf16.h>

#include <array>
#include <cstddef>
#include <string>

#include "cuda/images.h"
#include "cuda/ops.h"

namespace qwen_moe::cuda {

using bf16 = __nv_bfloat16;

// The rows of a prefill step, as the host knows them.
struct PrefillRows {
  int rows = 0;
  int position = 0;  // of the first one
  int slot = 0;
};

class PrefillOps {
 public:
  using Act = float;
  using In = bf16;

  // `decode` embeds tokens, projects to logits and has the rotary frequencies. All outlive this.
  PrefillOps(const ModelConfig& config, const DeviceProperties& device, Images& images,
             CudaOps& decode, int max_rows);
  size_t scratch_bytes() const { return scratch_.bytes(); }

  // StepRows of the ops that follow are on the device; its rows are these.
  void begin(cudaStream_t stream, const PrefillRows& rows);

  void embed(const EmbedArgs<float>& args) {
    decode_.embed({.hidden = args.hidden, .embed_tokens = args.embed_tokens, .rows = args.rows});
  }
  void norm_in_proj(const NormInProjArgs<float>& args);
  void gated_delta_prefill(const GatedDeltaArgs<float, bf16>& args);
  void attention_prefill(const AttentionArgs<float, bf16>& args);
  void out_proj_residual(const OutProjArgs<float, bf16>& args);
  void norm_router_shared(const NormRouterSharedArgs<float, bf16>& args);
  void routed_gate_up(const RoutedGateUpArgs<float, bf16>& args);
  void down_combine_residual(const DownCombineArgs<float, bf16>& args);
  void lm_head(const LmHeadArgs<float>& args) { decode_.lm_head(args); }
  void gated_delta_step(const GatedDeltaArgs<float, bf16>&) { no_step(); }
  void attention_step(const AttentionArgs<float, bf16>&) { no_step(); }

 private:
  [[noreturn]] static void no_step() { throw Error("prefill ops take one session's rows"); }

  // Hands out scratch for `max_rows`; with a null base only counts.
  size_t lay_out(std::byte* base);
  void launch(const std::string& name, dim3 grid, std::initializer_list<KernelArg> args) {
    images_.launch(stream_, name, grid, args);
  }
  void rms_norm(const float* hidden, const float* weight);
  // One of up to three matrices over the same input, and where its outputs go.
  struct Part {
    const WeightView* weight = nullptr;
    int stride = 0;
    int offset = 0;
  };
  using Parts = std::array<Part, 3>;
  // `kind` of projection: "project" and what the name in the table goes on with. One launch where
  // the matrices are of one format.
  void project(const char* kind, void* out, const bf16* input, const Parts& parts,
               const float* row_gate = nullptr);
  void project_narrow(float* out, const Parts& parts);
  void launch_project(const std::string& name, unsigned blocks, void* out, const bf16* input,
                      const Parts& parts, const float* row_gate);
  // The name of the table for a product of so many outputs, and its grid.
  std::string tile_of(const std::string& name, std::initializer_list<int> outputs,
                      unsigned& blocks) const;
  void check_whole(int outputs, const std::string& name) const;
  bool fits(const std::string& name) const {
    return images_.has(name) && images_.shared(name) <= device_.shared_bytes;
  }
  static std::string expert_tile(const char* kind, const WeightView& weight, int rows);
  int expert_rows(const LayerWeights& w) const;  // of a block of work of the experts
  dim3 expert_grid(const std::string& name, int outputs, int rows) const;
  int constant(const std::string& name, const char* of) const { return images_.constant(name, of); }

  ModelConfig c_;
  DeviceProperties device_;
  Images& images_;
  CudaOps& decode_;
  int max_rows_;
  cudaStream_t stream_ = nullptr;
  PrefillRows rows_;

  DeviceBuffer<std::byte> scratch_;
  int proj_stride_ = 0;
  bf16* normed_ = nullptr;  // [rows, hidden]
  bf16* proj_ = nullptr;    // [rows, proj_stride]: q | k | v | z, or (q | gate) per head | k | v
  bf16* core_ = nullptr;    // [rows, value_dim or attention_dim]
  bf16* shared_ = nullptr;  // [rows, shared_intermediate]
  float* shared_scale_ = nullptr;  // [rows]
  // Gated delta rule.
  float* gates_ = nullptr;                        // [rows, b | a]
  bf16* qkv_ = nullptr;                           // [rows, conv_dim]
  bf16 *delta_w_ = nullptr, *delta_u_ = nullptr;  // [chunks, heads, 64, dim]
  float* delta_sums_ = nullptr;                   // [chunks, heads, 64]
  bf16* delta_states_ = nullptr;                  // [chunks, heads, dim, dim]
  bf16* query_ = nullptr;                         // [rows, attention_dim]
  // Experts; see kernels/route.py.
  float *router_ = nullptr, *pick_weight_ = nullptr;
  int32_t *ids_ = nullptr, *ranks_ = nullptr, *order_ = nullptr;
  int32_t *counts_ = nullptr, *places_ = nullptr, *work_ = nullptr;
  bf16* expert_act_ = nullptr;   // [picks, moe_intermediate], by expert
  bf16* expert_part_ = nullptr;  // [picks, hidden], by token and rank
};

static_assert(OpSet<PrefillOps>);

}  // namespace qwen_moe::cuda
