// What the two kernels of the routed experts share: their arguments, and how warps see the routing.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/ops.h"
#include "cuda/route.cuh"

namespace qwen_moe::cuda {

struct MoeArgs {
  Matrix gate_up, down, shared_down;
  Way gate_up_way, down_way, shared_down_way;
  int64_t gate_up_bytes, down_bytes;  // of one expert
  const float* router;                // [rows, experts]
  const int32_t* slot;                // [rows]
  int rows, experts, top_k;
  const Input* weighed;       // [rows, hidden], see norm.cuh
  const float* row_scale;     // [rows] 64 / rms of them
  Input* routed;              // [place, moe_intermediate]
  const Input* shared;        // [rows, shared_intermediate]
  const float* shared_scale;  // [rows]
  float* hidden;              // [rows, hidden]
  Weighed next;               // of hidden
  std::byte* plan;            // in device memory, of more rows than one
};

// How a kernel's warps see the routing: in their own registers for one row, else as a plan in
// shared memory.
struct Routing {
  Pick pick{0, 0.0f};  // of one row, lane < top_k
  RoutePlan plan;
  int entries = 0;
  bool one_row;

  // All lanes of a warp.
  __device__ __forceinline__ RouteEntry entry(int i) const {
    if (one_row) return {__shfl_sync(0xffffffffu, pick.expert, i), i, 1};
    return plan.entry[i];
  }
  __device__ __forceinline__ int pick_of(int place) const {
    return one_row ? place : plan.pick_of[place];
  }
};

__host__ __device__ constexpr size_t round_up_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

// One row's routing, by the first warp, which has loaded the keys, for the first `warps` of its
// block: all of them at it would take each other's issue slots, and those of the kernel before. All
// threads of those warps.
template <int kPerLane>
__device__ __forceinline__ void find_picks(Routing& routing, const MoeArgs& args,
                                           RouterKeys<kPerLane>& keys, int ranks, bool weigh,
                                           int warp, int lane, int warps) {
  __shared__ Pick picks[32];
  if (warp == 0) {
    keys.order();
    picks[lane] = pick_experts(keys, ranks, weigh, lane);
  }
  group_barrier(1, 32 * warps);
  routing.pick = picks[lane];
  routing.entries = args.top_k;  // a row of padding as well: nobody keeps what comes of it
}

__host__ __device__ inline size_t plan_bytes(int picks) {
  return round_up_16(RoutePlan::bytes(picks));
}

// Starts to copy the routing of more rows, whole, since a look at device memory for every entry
// would be waited for. All threads of a block.
__device__ __forceinline__ void copy_plan(const MoeArgs& args, std::byte* to) {
  size_t bytes = plan_bytes(args.rows * args.top_k);
  for (size_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16)
    copy_async_16(to + at, args.plan + at);
  copy_async_commit();
}

// Worked out by every block, and left in device memory by the first. `to`: the plan, then scratch.
// `meanwhile` is called once the logits have been asked for: what it asks for comes behind them.
template <int kPerLane, class Meanwhile>
__device__ __forceinline__ void make_plan(Routing& routing, const MoeArgs& args, std::byte* to,
                                          const Meanwhile& meanwhile) {
  size_t bytes = plan_bytes(args.rows * args.top_k);
  build_plan<kPerLane>(routing.plan, RouteScratch(to + bytes, args.experts), args.router, args.slot,
                       args.rows, args.experts, args.top_k, meanwhile);
  if (blockIdx.x == 0)
    for (size_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16)
      *reinterpret_cast<uint4*>(args.plan + at) = *reinterpret_cast<const uint4*>(to + at);
}

inline MoeArgs moe_args(const ModelConfig& c, const LayerWeights& w, const float* router,
                        int rows) {
  MoeArgs args{};
  args.gate_up = Matrix(w.experts_gate_up);
  args.down = Matrix(w.experts_down);
  args.shared_down = Matrix(w.shared_down);
  args.gate_up_bytes = static_cast<int64_t>(w.experts_gate_up.spec.matrix_bytes());
  args.down_bytes = static_cast<int64_t>(w.experts_down.spec.matrix_bytes());
  args.router = router;
  args.rows = rows;
  args.experts = c.num_experts;
  args.top_k = c.num_experts_per_tok;
  return args;
}

// Bytes of dynamic shared memory that these kernels may ask for, beside their own.
inline size_t moe_shared_limit(const DeviceProperties& device) {
  return static_cast<size_t>(device.shared_bytes) - 1024;
}

}  // namespace qwen_moe::cuda
