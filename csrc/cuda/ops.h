// The ops over one shard on one GPU. Each launches one kernel (or a fixed few) into the stream of
// the step and returns; nothing synchronizes. Pointers in Args are device memory.
//
// Numbers: the residual stream and everything between phases is fp32; what meets a weight is
// rounded to fp16 once (input.h). A row whose slot is 0 is padding: nothing of it is kept, and
// beside other rows it takes no expert.
#pragma once

#include <deque>
#include <span>
#include <utility>
#include <vector>

#include "cuda/input.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "model/ops.h"

namespace qwen_moe::cuda {

struct ProjectArgs;
struct Weighed;

// What a block of attention takes: splits first, first + stride, ... of a row at `position`.
struct alignas(16) Share {
  int row, first, stride, position;  // row -1: nothing
};

class CudaOps {
 public:
  using Act = float;
  using In = Input;

  CudaOps(const ModelConfig& config, const DeviceProperties& device, int max_rows, int max_context);
  void begin(const Launcher& launcher) {
    launch_ = launcher;
    weighed_for_ = {};
    pages_shared_out_ = false;
  }

  void embed(const EmbedArgs<float>& args);                         // dense.cu
  void norm_in_proj(const NormInProjArgs<float>& args);             // dense.cu; advances conv_state
  void gated_delta_step(const GatedDeltaArgs<float, Input>& args);  // gated_delta.cu
  void attention_step(const AttentionArgs<float, Input>& args);     // attention.cu
  void out_proj_residual(const OutProjArgs<float, Input>& args);    // dense.cu
  void norm_router_shared(const NormRouterSharedArgs<float, Input>& args);      // dense.cu
  void routed_gate_up(const RoutedGateUpArgs<float, Input>& args);              // gate_up.cu
  void down_combine_residual(const DownCombineArgs<float, Input>& args);        // down.cu
  void lm_head(const LmHeadArgs<float>& args);                                  // dense.cu
  const float* inverse_frequency() const { return inverse_frequency_.data(); }  // [rotary_dim / 2]
  // A prompt goes through the decode step, token by token.
  void gated_delta_prefill(const GatedDeltaArgs<float, Input>&) { no_prefill(); }
  void attention_prefill(const AttentionArgs<float, Input>&) { no_prefill(); }

 private:
  [[noreturn]] static void no_prefill() { throw Error("this backend has no prefill ops"); }

  // Scratch and launch limits of the kernels in the file of that name; called once.
  void reserve_dense();
  void reserve_gate_up();
  void reserve_down();
  void reserve_gated_delta();
  void reserve_attention();

  ModelConfig c_;
  DeviceProperties device_;
  int max_rows_, max_context_;
  Launcher launch_;

  // schedule.cu: the tiles of every block of a projection, by the matrices it reads.
  struct Schedule {
    std::vector<WeightSpec> specs;
    int most_blocks = 0;
    DeviceBuffer<int32_t> items;  // [blocks, items_stride] how many, then each
    int blocks = 0, items_stride = 0;
  };
  const Schedule& schedule(std::span<const WeightView* const> views, bool pairs, int blocks);
  // dense.cu: of one matrix without `views`. How many blocks share the tiles:
  int share_tiles(ProjectArgs& args, std::span<const WeightView* const> views, bool pairs,
                  int blocks);
  template <int kTiles>
  bool project_wide_rows(ProjectArgs& args, std::span<const WeightView* const> views, bool pairs);
  void project_rows(ProjectArgs& args, std::span<const WeightView* const> views, bool pairs);
  std::deque<Schedule> schedules_;

  // dense.cu: what an op leaves for the norm that reads hidden next, and of which hidden and norm
  // it is since `begin`; it is made first where that is not the norm that comes.
  Weighed weigh(const float* hidden, const float* norm);
  void take_normed(ProjectArgs& args, const float* hidden, const float* norm);
  std::pair<const float*, const float*> weighed_for_;
  DeviceBuffer<Input> weighed_;    // [max_rows, hidden]
  DeviceBuffer<float> squares_;    // [max_rows, hidden / 16]
  DeviceBuffer<float> row_scale_;  // [max_rows] of the norm in front of the experts

  // gate_up.cu: which expert takes which rows, for many rows.
  DeviceBuffer<std::byte> route_;

  // attention.cu: which block takes which splits of which row, found once a step, two launches
  // before the first attention; partial results of every split, and the rotary frequencies.
  unsigned attention_blocks(int rows) const;
  bool share_pages_out(const StepRows& rows);  // whether it was still to be done
  bool pages_shared_out_ = false;
  DeviceBuffer<Share> attention_shares_;
  DeviceBuffer<float> attention_partial_;
  DeviceBuffer<float> inverse_frequency_;  // [rotary_dim / 2]
};

}  // namespace qwen_moe::cuda
