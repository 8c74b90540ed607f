// Gate and up projections of the routed experts: every block takes an even share of (expert, pair
// of tiles) work; half of its warps share the gate tile's inputs, half the up tile's.
#include <algorithm>

#include "cuda/moe.cuh"
#include "engine/backend.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kGateUpSlices = kWarps / 2;  // of each of the two tiles of a pair
constexpr int kRouteThreads = 1024;
constexpr int kOneRowStages = 4, kFewStages = 3;

template <int kPerLane>
__global__ __launch_bounds__(kRouteThreads) void route(const __grid_constant__ MoeArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  wait_for_predecessor();
  launch_dependents();
  RoutePlan plan(args.plan, args.rows * args.top_k);
  build_plan<kPerLane>(plan, RouteScratch(shared, args.experts), args.router, args.slot, args.rows,
                       args.experts, args.top_k, [] {});
}

// Grid (blocks): every block takes an even share of (entry, pair of a gate and an up tile); half of
// its warps do the gates, half the ups. Shared memory: [activations][partial sums of two pairs]
// [rings][plan and scratch]. Activations are of all rows where there are up to 8, else of one
// entry's rows.
template <int kPerLane, bool kOneRow>
__global__ __launch_bounds__(kThreads, 2) void gate_up(const __grid_constant__ MoeArgs args,
                                                       int act_rows) {
  constexpr int kStages = kOneRow ? kOneRowStages : kFewStages;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ float scales[kMaxRows];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Matrix& m = args.gate_up;
  int pitch = activation_pitch(m.k), picks = args.rows * args.top_k, pairs = m.tiles / 2;
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(activations + act_rows * pitch);
  int pair_floats = kWarps * act_rows * kPartialPitch;
  std::byte* rings = reinterpret_cast<std::byte*>(partial + 2 * pair_floats);
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kWarps * kStages * kStageBytes;
  Routing routing{.plan = RoutePlan(tail, picks), .one_row = kOneRow};
  bool all_rows = kOneRow || args.rows <= kEntryRows;  // in shared memory
  UnitRange slice = slice_units(m.k, warp % kGateUpSlices, kGateUpSlices);
  int half = warp / kGateUpSlices;

  auto load_row = [&](int to, int row, int from_thread, int threads) {
    const Input* from = args.weighed + static_cast<int64_t>(row) * m.k;
#pragma unroll 1
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
  RouterKeys<kPerLane> keys;
  if (kOneRow && warp == 0) keys.load(args.router, args.experts, lane);
  if (kOneRow) launch_dependents();
  float scale_of_row = thread < args.rows ? load_cg(args.row_scale + thread) : 0.0f;
  auto load_all_rows = [&] {
#pragma unroll 1
    for (int row = 0; row < (kOneRow ? 1 : args.rows); ++row) load_row(row, row, thread, kThreads);
    copy_async_commit();
  };
  if constexpr (kOneRow) {
    load_all_rows();
    find_picks(routing, args, keys, last_rank + 1, false, warp, lane, kWarps);
  } else {
    if (all_rows) {
      make_plan<kPerLane>(routing, args, tail, load_all_rows);
    } else {
      copy_plan(args, tail);
      copy_async_wait<0>();
      __syncthreads();
    }
    routing.entries = *routing.plan.entries;
  }
  if (thread < args.rows) scales[thread] = scale_of_row;

  if (!kOneRow) share = share_of(routing.entries);
  int begin = share.begin, end = routing.entries == 0 ? begin : share.end;
  int index = begin / pairs, pair = begin - index * pairs;

  TileCopy copy;
  uint32_t ring_address = shared_address(ring) + lane * 16;
  int next = slice.begin == slice.end ? end : begin, next_entry = index, next_pair = pair;
  const std::byte* next_expert = nullptr;
  if (next < end) next_expert = m.data + routing.entry(index).expert * args.gate_up_bytes;
  auto feed = [&]<Way kWay>(WayOf<kWay>, int stage) {
    if (next < end) {
      if (copy.left == 0)
        copy.open<kWay>(Tile(m, next_expert + (next_pair + half * pairs) * m.tile_bytes), slice,
                        lane);
      copy.next_chunk<kWay>(ring_address + stage * kStageBytes, lane);
      if (copy.left == 0 && ++next < end && ++next_pair == pairs) {
        next_pair = 0;
        next_expert = m.data + routing.entry(++next_entry).expert * args.gate_up_bytes;
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) feed(WayOf<Way::any>{}, i);
  copy_async_wait<kStages>();  // the rows
  __syncthreads();
  if (!kOneRow) launch_dependents();  // it would take issue slots from the making of the plan

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
        column = kOneRow ? 0 : routing.pick_of(entry.first + column) / args.top_k;
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
    TileSum<1, kOneRow> sum;
    sum.clear();
    with_way(kOneRow ? args.gate_up_way : Way::any, [&]<Way kWay>(WayOf<kWay> way) {
      add_tile<kStages, kWay>(
          sum, unit_shift_of(m.format), m.group_shift, slice, ring, stage, lane,
          [&](int s) { feed(way, s); },
          [&](int, int unit, int j) { return load_shared_16(mine + unit * 128 + j * 64); });
    });
    // Two sets of partial sums in turn: what is written here was read before the last barrier.
    float* sums = partial + (item & 1) * pair_floats;
    sum.store(sums + warp * entry.count * kPartialPitch, entry.count, lane);
    __syncthreads();
    if (int row = thread / 16; row < entry.count) {
      int output = thread % 16;
      float scale = scales[kOneRow ? 0 : routing.pick_of(entry.first + row) / args.top_k];
      float gate = scale * sum_slices<kGateUpSlices>(sums, entry.count, row, output);
      float up =
          scale * sum_slices<kGateUpSlices>(sums + kGateUpSlices * entry.count * kPartialPitch,
                                            entry.count, row, output);
      args.routed[static_cast<int64_t>(entry.first + row) * (pairs * 16) + pair * 16 + output] =
          input_of(silu(gate) * up);
    }
    if (++pair == pairs) {
      pair = 0;
      ++index;
    }
  }
}

template <int kPerLane>
void launch_gate_up(const Launcher& launch, const MoeArgs& args, int sms, size_t alone) {
  int picks = args.rows * args.top_k, act_rows = std::min(args.rows, kEntryRows);
  bool many = args.rows > kEntryRows;
  if (many)
    launch(route<kPerLane>, dim3(1), kRouteThreads, RouteScratch::bytes(args.experts, picks), args);
  auto bytes = [&](int stages) {
    return static_cast<size_t>(act_rows) * activation_pitch(args.gate_up.k) +
           static_cast<size_t>(2 * kWarps * act_rows * kPartialPitch * 4) +
           static_cast<size_t>(kWarps * stages * kStageBytes) +
           (args.rows == 1 ? 0 : plan_bytes(picks)) +
           (args.rows == 1 || many ? 0 : RouteScratch::bytes(args.experts, picks));
  };
  int most = std::min(args.experts, picks) * args.gate_up.tiles / 2;
  // Of several rows, two blocks a multiprocessor hide each other's barriers and changes of rows.
  dim3 grid(static_cast<unsigned>(std::min(args.rows > 1 ? 2 * sms : sms, most)));
  if (args.rows == 1)
    launch(gate_up<kPerLane, true>, grid, kThreads, std::max(bytes(kOneRowStages), alone), args,
           act_rows);
  else
    launch(gate_up<kPerLane, false>, grid, kThreads, bytes(kFewStages), args, act_rows);
}

template <int kPerLane>
void allow(size_t limit) {
  allow_shared(route<kPerLane>, limit);
  allow_shared(gate_up<kPerLane, true>, limit);
  allow_shared(gate_up<kPerLane, false>, limit);
}

}  // namespace

void CudaOps::reserve_gate_up() {
  require(c_.num_experts <= 512 && c_.num_experts_per_tok <= 32,
          "the CUDA kernels take up to 512 experts and 32 per token; this model has ",
          c_.num_experts, " and ", c_.num_experts_per_tok);
  require(c_.moe_intermediate_size % kUnit == 0 && c_.shared_expert_intermediate_size % kUnit == 0,
          "moe_intermediate_size and shared_expert_intermediate_size must be multiples of ", kUnit,
          " on CUDA, got ", c_.moe_intermediate_size, " and ", c_.shared_expert_intermediate_size);
  c_.num_experts <= 256 ? allow<8>(moe_shared_limit(device_))
                        : allow<16>(moe_shared_limit(device_));
  route_ =
      DeviceBuffer<std::byte>(round_up_16(RoutePlan::bytes(max_rows_ * c_.num_experts_per_tok)));
}

void CudaOps::routed_gate_up(const RoutedGateUpArgs<float, Input>& args) {
  MoeArgs moe = moe_args(c_, args.layer, args.router, args.rows.rows);
  moe.gate_up_way = way_of(args.layer.experts_gate_up.spec, kGateUpSlices);
  moe.slot = args.rows.slot;
  moe.weighed = weighed_.data();
  moe.row_scale = row_scale_.data();
  moe.routed = args.routed;
  moe.plan = route_.data();
  c_.num_experts <= 256 ? launch_gate_up<8>(launch_, moe, device_.sms, alone_shared(device_))
                        : launch_gate_up<16>(launch_, moe, device_.sms, alone_shared(device_));
}

}  // namespace qwen_moe::cuda
