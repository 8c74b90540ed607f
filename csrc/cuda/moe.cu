// Routed experts and the shared expert of a step.
//
// gate/up: every block takes an even share of (expert, pair of tiles) work; half of its warps share
// the gate tile's inputs, half the up tile's. down: a block owns 16 outputs of all rows and a warp
// a whole expert, so that the weighted sum in rank order, the shared expert and the residual end in
// the same block.
#include <algorithm>

#include "cuda/dense.h"
#include "cuda/ops.h"
#include "cuda/route.cuh"
#include "engine/backend.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kGateUpSlices = kWarps / 2;  // of each of the two tiles of a pair
constexpr int kDownWarps = 12;             // top_k + 1 in one go, for every known model
constexpr int kRouteThreads = 1024;

struct MoeArgs {
  Matrix gate_up, down, shared_down;
  int64_t gate_up_bytes, down_bytes;  // of one expert
  const float* router;                // [rows, experts]
  const int32_t* slot;                // [rows]
  int rows, experts, top_k;
  const bf16* normed;         // [rows, hidden]
  bf16* routed;               // [place, moe_intermediate]
  const bf16* shared;         // [rows, shared_intermediate]
  const float* shared_scale;  // [rows]
  float* hidden;              // [rows, hidden]
  std::byte* plan;            // in device memory, for more than 8 rows
};

template <int kPerLane>
__global__ __launch_bounds__(kRouteThreads) void route(const __grid_constant__ MoeArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  wait_for_predecessor();
  launch_dependents();
  RoutePlan plan(args.plan, args.rows * args.top_k);
  build_plan<kPerLane>(plan, RouteScratch(shared, args.experts), args.router, args.slot, args.rows,
                       args.experts, args.top_k);
}

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

// One row's routing, by one warp for its block: all of them at it would take each other's issue
// slots, and those of the kernel before. All threads of a block.
template <int kPerLane>
__device__ __forceinline__ void find_picks(Routing& routing, const MoeArgs& args, int ranks,
                                           bool weigh, int warp, int lane) {
  __shared__ Pick picks[32];
  int slot = load_cg(args.slot);
  if (warp == 0) {
    RouterKeys<kPerLane> keys;
    keys.load(args.router, args.experts, lane);
    picks[lane] = pick_experts(keys, ranks, weigh, lane);
  }
  __syncthreads();
  routing.pick = picks[lane];
  routing.entries = slot == 0 ? 0 : args.top_k;
}

// The routing of more rows: worked out, or copied whole, since a look at device memory for every
// entry would be waited for; all threads of a block. `to`: where the plan is, then scratch.
template <int kPerLane>
__device__ __forceinline__ void find_plan(Routing& routing, const MoeArgs& args, std::byte* to) {
  size_t bytes = round_up_16(RoutePlan::bytes(args.rows * args.top_k));
  if (args.rows <= kEntryRows) {
    build_plan<kPerLane>(routing.plan, RouteScratch(to + bytes, args.experts), args.router,
                         args.slot, args.rows, args.experts, args.top_k);
  } else {
    for (size_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16)
      copy_async_16(to + at, args.plan + at);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }
  routing.entries = *routing.plan.entries;
}

// Grid (blocks): every block takes an even share of (entry, pair of a gate and an up tile); half of
// its warps do the gates, half the ups. Shared memory: [activations][partial sums of two pairs]
// [rings][plan and scratch]. Activations are of all rows where there are up to 8, else of one
// entry's rows.
template <int kPerLane, int kStages>
__global__ __launch_bounds__(kThreads, 2) void gate_up(const __grid_constant__ MoeArgs args,
                                                       int act_rows) {
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Matrix& m = args.gate_up;
  int pitch = activation_pitch(m.k), picks = args.rows * args.top_k, pairs = m.tiles / 2;
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(activations + act_rows * pitch);
  int pair_floats = kWarps * act_rows * kPartialPitch;
  std::byte* rings = reinterpret_cast<std::byte*>(partial + 2 * pair_floats);
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kWarps * kStages * kStageBytes;
  bool one_row = args.rows == 1;
  Routing routing{.plan = RoutePlan(tail, picks), .one_row = one_row};
  bool all_rows = args.rows <= kEntryRows;  // in shared memory
  UnitRange slice = slice_units(m.k, warp % kGateUpSlices, kGateUpSlices);
  int half = warp / kGateUpSlices;

  auto load_row = [&](int to, int row, int from_thread, int threads) {
    const bf16* from = args.normed + static_cast<int64_t>(row) * m.k;
    for (int v = from_thread; v < m.k / 8; v += threads)
      copy_async_16(activations + to * pitch + v * 16, from + v * 8);
  };
  // This block's share. That of one row is known before the row is; its block looks for no expert
  // beyond its own, so that the first weights are asked for early.
  struct Share {
    int begin, end;
  };
  auto share_of = [&](int entries) {
    auto all = static_cast<unsigned>(entries * pairs);
    return Share{static_cast<int>(all * blockIdx.x / gridDim.x),
                 static_cast<int>(all * (blockIdx.x + 1) / gridDim.x)};
  };
  Share share = share_of(args.top_k);
  int last_rank = (share.end - 1) / pairs;
  zero_ends(activations, m.k, act_rows);
  wait_for_predecessor();
  launch_dependents();
  if (all_rows)
    for (int row = 0; row < args.rows; ++row) load_row(row, row, thread, kThreads);
  copy_async_commit();
  if (one_row)
    find_picks<kPerLane>(routing, args, last_rank + 1, false, warp, lane);
  else
    find_plan<kPerLane>(routing, args, tail);

  if (!one_row) share = share_of(routing.entries);
  int begin = share.begin, end = routing.entries == 0 ? begin : share.end;
  int index = begin / pairs, pair = begin - index * pairs;

  TileCopy copy;
  uint32_t ring_address = shared_address(ring) + lane * 16;
  int next = slice.begin == slice.end ? end : begin, next_entry = index, next_pair = pair;
  const std::byte* next_expert = nullptr;
  if (next < end) next_expert = m.data + routing.entry(index).expert * args.gate_up_bytes;
  auto feed = [&](int stage) {
    if (next < end) {
      if (copy.left == 0)
        copy.open(Tile(m, next_expert + (next_pair + half * pairs) * m.tile_bytes), slice, lane);
      copy.next_chunk(ring_address + stage * kStageBytes, lane);
      if (copy.left == 0 && ++next < end && ++next_pair == pairs) {
        next_pair = 0;
        next_expert = m.data + routing.entry(++next_entry).expert * args.gate_up_bytes;
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) feed(i);
  copy_async_wait<kStages>();  // the rows
  __syncthreads();

  int current = -1, stage = 0;
  RouteEntry entry{0, 0, 0};
  uint32_t mine = 0, held = held_address(activations);
#pragma unroll 1
  for (int item = begin; item < end; ++item) {
    if (index != current) {
      current = index;
      entry = routing.entry(index);
      // A column of the products is a pick of the entry; beyond the last, the last again.
      int column = min(lane / 4, entry.count - 1);
      if (all_rows) {
        column = one_row ? 0 : routing.pick_of(entry.first + column) / args.top_k;
      } else {
        __syncthreads();  // the rows before have been read
        for (int i = warp; i < entry.count; i += kWarps)
          load_row(i, routing.pick_of(entry.first + i) / args.top_k, lane, 32);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
      }
      mine = held + static_cast<uint32_t>(column * pitch + lane % 4 * 16);
    }
    TileSum<1> sum;
    sum.clear();
    add_tile<1, kStages>(
        sum, unit_shift_of(m.format), m.group_shift, slice, ring, stage, lane, feed,
        [&](int, int unit, int j) { return load_shared_16(mine + unit * 128 + j * 64); });
    // Two sets of partial sums in turn: what is written here was read before the last barrier.
    float* sums = partial + (item & 1) * pair_floats;
    sum.store(sums + warp * entry.count * kPartialPitch, entry.count, lane);
    __syncthreads();
    if (int row = thread / 16; row < entry.count) {
      int output = thread % 16;
      float gate = sum_slices<kGateUpSlices>(sums, entry.count, row, output);
      float up = sum_slices<kGateUpSlices>(sums + kGateUpSlices * entry.count * kPartialPitch,
                                           entry.count, row, output);
      args.routed[static_cast<int64_t>(entry.first + row) * (pairs * 16) + pair * 16 + output] =
          __float2bfloat16(silu(gate) * up);
    }
    if (++pair == pairs) {
      pair = 0;
      ++index;
    }
  }
}

// Grid (hidden / 16). A block owns 16 outputs of all rows, a warp whole entries, so that the
// weighted sum in rank order, the shared expert and the residual end in the same block. Shared
// memory: [weighted sums (picks + rows) x 16][rings][one row's activations of every warp, or plan
// and scratch]. For one row it keeps to half of the registers, so that it starts beside the kernel
// before.
template <int kPerLane, int kStages, int kMostRows>
__global__ __launch_bounds__(32 * kDownWarps, kMostRows == 1 ? 2 : 1) void down_combine(
    const __grid_constant__ MoeArgs args) {
  constexpr bool kOneRow = kMostRows == 1;
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int tile = static_cast<int>(blockIdx.x), picks = args.rows * args.top_k;
  auto* sums = reinterpret_cast<float*>(shared);  // [picks, then rows][16]
  std::byte* rings = shared + (picks + args.rows) * 64;
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kDownWarps * kStages * kStageBytes;
  Routing routing{.plan = RoutePlan(tail, picks), .one_row = kOneRow};

  // The router's logits come from the phase before the last, so the plan is made, and the weights
  // are on their way, before the experts' activations are there. So is what the end needs.
  constexpr int kRounds = (kMostRows + 2 * kDownWarps - 1) / (2 * kDownWarps);
  int first_row = thread / 16, output = tile * 16 + thread % 16;
  float residual[kRounds], scale[kRounds];
  int slot[kRounds] = {};
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    int row = first_row + r * 2 * kDownWarps;
    if (row >= args.rows) break;
    residual[r] = load_cg(args.hidden + static_cast<int64_t>(row) * args.down.n + output);
    scale[r] = load_cg(args.shared_scale + row);
    slot[r] = load_cg(args.slot + row);
  }
  if constexpr (kOneRow)
    find_picks<kPerLane>(routing, args, args.top_k, true, warp, lane);
  else
    find_plan<kPerLane>(routing, args, tail);

  // This warp's share: shared-expert rows from the last warp backwards, then routed entries.
  int shared_entries = (args.rows + kEntryRows - 1) / kEntryRows;
  int from_last = kDownWarps - 1 - warp;
  int own_shared = max((shared_entries - from_last + kDownWarps - 1) / kDownWarps, 0);
  int own_routed = max((routing.entries - warp + kDownWarps - 1) / kDownWarps, 0);
  int count = own_shared + own_routed;
  auto entry_at = [&](int index) -> RouteEntry {
    if (index < own_shared) {
      int first = (from_last + index * kDownWarps) * kEntryRows;
      return {-1, first, min(kEntryRows, args.rows - first)};
    }
    return routing.entry(warp + (index - own_shared) * kDownWarps);
  };

  TileCopy copy;
  uint32_t ring_address = shared_address(ring) + lane * 16;
  int next = 0;
  auto feed = [&](int stage) {
    if (next < count) {
      if (copy.left == 0) {
        int expert = entry_at(next).expert;
        const Matrix& m = expert < 0 ? args.shared_down : args.down;
        copy.open(Tile(m, m.data + max(expert, 0) * args.down_bytes + tile * m.tile_bytes),
                  {0, m.k / kUnit}, lane);
      }
      copy.next_chunk(ring_address + stage * kStageBytes, lane);
      if (copy.left == 0) ++next;
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) feed(i);

  int stage = 0, q = lane / 4, t = lane % 4;
  bool waited = false;
  // The shared expert's activations are as old as the router's logits, the others' are new.
  auto wait_for_routed = [&](int index) {
    if (waited || index < own_shared) return;
    wait_for_predecessor();
    launch_dependents();
    waited = true;
  };
  // For more rows than one: the lane's activations of the next chunk, of this entry or the next,
  // are on their way while a chunk is summed.
  uint4 ahead[8];
  const uint4* ahead_from = nullptr;
  int ahead_index = 0, ahead_unit = 0, ahead_units = 0, ahead_step = 0;
  auto load_ahead = [&] {
    if (ahead_index >= count) return;
    if (ahead_unit == 0) {
      wait_for_routed(ahead_index);
      RouteEntry entry = entry_at(ahead_index);
      const Matrix& m = entry.expert < 0 ? args.shared_down : args.down;
      ahead_units = m.k / kUnit;
      ahead_step = chunk_units(m.format);
      ahead_from = reinterpret_cast<const uint4*>(
                       (entry.expert < 0 ? args.shared : args.routed) +
                       static_cast<int64_t>(entry.first + min(q, entry.count - 1)) * m.k) +
                   t;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      ahead[i] = uint4{0, 0, 0, 0};
      if (i / 2 < min(ahead_step, ahead_units - ahead_unit))
        ahead[i] = load_cg(ahead_from + (ahead_unit * 8 + i * 4));
    }
    ahead_unit += ahead_step;
    if (ahead_unit < ahead_units) return;
    ahead_unit = 0;
    ++ahead_index;
  };
  if constexpr (!kOneRow) load_ahead();
#pragma unroll 1
  for (int index = 0; index < count; ++index) {
    if (kOneRow) wait_for_routed(index);
    RouteEntry entry = entry_at(index);
    bool is_shared = entry.expert < 0;
    const Matrix& m = is_shared ? args.shared_down : args.down;
    UnitRange all{0, m.k / kUnit};
    TileSum<1> sum;
    sum.clear();
    if constexpr (kOneRow) {
      const auto* from = reinterpret_cast<const uint4*>((is_shared ? args.shared : args.routed) +
                                                        static_cast<int64_t>(entry.first) * m.k);
      auto* x = reinterpret_cast<uint4*>(tail) + warp * (max(args.down.k, args.shared_down.k) / 8);
      __syncwarp();
      for (int at = lane; at < m.k / 8; at += 32) x[at] = load_cg(from + at);
      __syncwarp();
      add_tile<1, kStages>(sum, unit_shift_of(m.format), m.group_shift, all, ring, stage, lane,
                           feed, [&](int, int unit, int j) {
                             uint4 b{0, 0, 0, 0};
                             if (unit < all.end) b = x[unit * 8 + j * 4 + t];
                             return b;
                           });
    } else {
      int step = chunk_units(m.format);
#pragma unroll 1
      for (int unit = 0; unit < all.end; unit += step) {
        uint4 b[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) b[i] = ahead[i];
        load_ahead();
        copy_async_wait<kStages - 1>();
        __syncwarp();
        sum.add(unit_shift_of(m.format), m.group_shift, StagedChunk{ring + stage * kStageBytes},
                min(step, all.end - unit), lane, [&](int, int u, int j) { return b[u * 2 + j]; });
        __syncwarp();
        feed(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int n = 2 * t + j % 2;
      float weight = 1.0f;
      int pick = is_shared ? picks + entry.first + n : entry.first;
      if (kOneRow && !is_shared)
        weight = __shfl_sync(0xffffffffu, routing.pick.weight, entry.first);
      if (n >= entry.count) continue;
      if (!kOneRow && !is_shared) {
        pick = routing.pick_of(entry.first + n);
        weight = routing.plan.weight[pick];
      }
      sums[pick * 16 + q + j / 2 * 8] = __fmul_rn(weight, sum.total[0][j]);
    }
  }
  if (!waited) {
    wait_for_predecessor();
    launch_dependents();
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    int row = first_row + r * 2 * kDownWarps;
    if (row >= args.rows || slot[r] == 0) continue;
    float sum = 0;
    for (int rank = 0; rank < args.top_k; ++rank)
      sum = __fadd_rn(sum, sums[(row * args.top_k + rank) * 16 + thread % 16]);
    float gated = __fmul_rn(sigmoid(scale[r]), sums[(picks + row) * 16 + thread % 16]);
    args.hidden[static_cast<int64_t>(row) * args.down.n + output] =
        __fadd_rn(residual[r], __fadd_rn(sum, gated));
  }
}

// The plan in shared memory, and what making it takes.
size_t plan_bytes(const MoeArgs& args) {
  if (args.rows == 1) return 0;
  int picks = args.rows * args.top_k;
  return round_up_16(RoutePlan::bytes(picks)) +
         (args.rows > kEntryRows ? 0 : RouteScratch::bytes(args.experts, picks));
}

template <int kPerLane>
void allow(size_t limit) {
  allow_shared(route<kPerLane>, limit);
  allow_shared(gate_up<kPerLane, 4>, limit);
  allow_shared(gate_up<kPerLane, 3>, limit);
  allow_shared(down_combine<kPerLane, 3, 1>, limit);
  allow_shared(down_combine<kPerLane, 6, kMaxRows>, limit);
}

}  // namespace

void CudaOps::reserve_moe() {
  require(c_.num_experts <= 512 && c_.num_experts_per_tok <= 32,
          "the CUDA kernels take up to 512 experts and 32 per token; this model has ",
          c_.num_experts, " and ", c_.num_experts_per_tok);
  require(c_.moe_intermediate_size % kUnit == 0 && c_.shared_expert_intermediate_size % kUnit == 0,
          "moe_intermediate_size and shared_expert_intermediate_size must be multiples of ", kUnit,
          " on CUDA, got ", c_.moe_intermediate_size, " and ", c_.shared_expert_intermediate_size);
  auto limit = static_cast<size_t>(device_.shared_bytes) - 1024;
  c_.num_experts <= 256 ? allow<8>(limit) : allow<16>(limit);
  route_ =
      DeviceBuffer<std::byte>(round_up_16(RoutePlan::bytes(max_rows_ * c_.num_experts_per_tok)));
}

namespace {

MoeArgs moe_args(const ModelConfig& c, const LayerWeights& w, const float* router, int rows) {
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

template <int kPerLane>
void launch_gate_up(const Launcher& launch, const MoeArgs& args, int sms) {
  int picks = args.rows * args.top_k, act_rows = std::min(args.rows, kEntryRows);
  bool many = args.rows > kEntryRows;
  if (many)
    launch(route<kPerLane>, dim3(1), kRouteThreads, RouteScratch::bytes(args.experts, picks), args);
  auto bytes = [&](int stages) {
    return static_cast<size_t>(act_rows) * activation_pitch(args.gate_up.k) +
           static_cast<size_t>(2 * kWarps * act_rows * kPartialPitch * 4) +
           static_cast<size_t>(kWarps * stages * kStageBytes) + plan_bytes(args);
  };
  int most = std::min(args.experts, picks) * args.gate_up.tiles / 2;
  // Of several rows, two blocks a multiprocessor hide each other's barriers and changes of rows.
  dim3 grid(static_cast<unsigned>(std::min(args.rows > 1 ? 2 * sms : sms, most)));
  if (args.rows == 1)
    launch(gate_up<kPerLane, 4>, grid, kThreads, bytes(4), args, act_rows);
  else
    launch(gate_up<kPerLane, 3>, grid, kThreads, bytes(3), args, act_rows);
}

template <int kPerLane>
void launch_down(const Launcher& launch, const MoeArgs& args) {
  int picks = args.rows * args.top_k;
  dim3 grid(static_cast<unsigned>(args.down.tiles));
  auto bytes = [&](int stages, size_t tail) {
    return static_cast<size_t>(picks + args.rows) * 64 +
           static_cast<size_t>(kDownWarps * stages * kStageBytes) + tail;
  };
  auto row = static_cast<size_t>(2 * std::max(args.down.k, args.shared_down.k));
  constexpr int threads = 32 * kDownWarps;
  if (args.rows == 1)
    launch(down_combine<kPerLane, 3, 1>, grid, threads, bytes(3, kDownWarps * row), args);
  else
    launch(down_combine<kPerLane, 6, kMaxRows>, grid, threads, bytes(6, plan_bytes(args)), args);
}

}  // namespace

void CudaOps::routed_gate_up(const RoutedGateUpArgs<float, bf16>& args) {
  MoeArgs moe = moe_args(c_, args.layer, args.router, args.rows.rows);
  moe.slot = args.rows.slot;
  moe.normed = args.normed;
  moe.routed = args.routed;
  moe.plan = route_.data();
  c_.num_experts <= 256 ? launch_gate_up<8>(launch_, moe, device_.sms)
                        : launch_gate_up<16>(launch_, moe, device_.sms);
}

void CudaOps::down_combine_residual(const DownCombineArgs<float, bf16>& args) {
  MoeArgs moe = moe_args(c_, args.layer, args.router, args.rows.rows);
  moe.slot = args.rows.slot;
  moe.routed = const_cast<bf16*>(args.routed);
  moe.shared = args.shared;
  moe.shared_scale = args.shared_scale;
  moe.hidden = args.hidden;
  moe.plan = route_.data();
  c_.num_experts <= 256 ? launch_down<8>(launch_, moe) : launch_down<16>(launch_, moe);
}

}  // namespace qwen_moe::cuda
