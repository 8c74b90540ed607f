// Down projections of the routed experts and of the shared one, and what they add up to: a block
// owns 16 outputs of all rows and a warp a whole expert, so that the weighted sum in rank order,
// the shared expert and the residual end in the same block.
#include <algorithm>

#include "cuda/moe.cuh"
#include "engine/backend.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kDownWarps = 12;  // top_k + 1 in one go, for every known model
constexpr int kOneRowStages = 3, kFewStages = 5, kManyStages = 6;

// What the end of a block needs of a row besides the sums, and the end itself: a thread for an
// output of a row.
struct Ending {
  float residual = 0, scale = 0, norm = 0;
  int slot = 0;

  __device__ __forceinline__ void load(const MoeArgs& args, int row, int output) {
    residual = load_cg(args.hidden + static_cast<int64_t>(row) * args.down.n + output);
    scale = load_cg(args.shared_scale + row);
    slot = load_cg(args.slot + row);
    if (args.next.norm) norm = __ldg(args.next.norm + output);
  }
  // `sums` is [picks, then rows][16], weighted.
  __device__ __forceinline__ void combine(const MoeArgs& args, const float* sums, int row,
                                          int output) const {
    if (slot == 0) return;
    int at = output % 16, picks = args.rows * args.top_k;
    float sum = 0;
    for (int rank = 0; rank < args.top_k; ++rank)
      sum = __fadd_rn(sum, sums[(row * args.top_k + rank) * 16 + at]);
    float gated = __fmul_rn(sigmoid(scale), sums[(picks + row) * 16 + at]);
    float x = __fadd_rn(residual, __fadd_rn(sum, gated));
    args.hidden[static_cast<int64_t>(row) * args.down.n + output] = x;
    if (args.next.norm) weigh_value(args.next, row, args.down.n, output, x, norm);
  }
};

// Of one row. Grid (hidden / 16). A warp takes whole tiles: the last that of the shared expert, the
// others those of the routed ones. Shared memory: [weighted sums (top_k + 1) x 16][rings][a row for
// every warp]. It keeps to half of the registers, so that it starts beside the kernel before.
//
// What the end needs is older than the last phase, and so are the router's logits and what the
// shared expert's product needs, which is on its way while the experts are looked for.
template <int kPerLane, int kStages>
__global__ __launch_bounds__(32 * kDownWarps,
                             2) void down_one_row(const __grid_constant__ MoeArgs args) {
  constexpr int kRouted = kDownWarps - 1;
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int tile = static_cast<int>(blockIdx.x), most_inputs = max(args.down.k, args.shared_down.k);
  auto* sums = reinterpret_cast<float*>(shared);
  std::byte* rings = shared + (args.top_k + 1) * 64;
  std::byte* ring = rings + warp * kStages * kStageBytes;
  auto* row = reinterpret_cast<uint4*>(rings + kDownWarps * kStages * kStageBytes) +
              warp * (most_inputs / 8);

  RouterKeys<kPerLane> keys;
  if (warp == 0) keys.load(args.router, args.experts, lane);
  Ending ending;
  if (thread < 16) ending.load(args, 0, tile * 16 + thread);
  bool is_shared = warp == kRouted;
  const Matrix m = is_shared ? args.shared_down : args.down;
  UnitRange all{0, m.k / kUnit};
  Routing routing{.plan = RoutePlan(nullptr, 0), .one_row = true};
  if (!is_shared) find_picks(routing, args, keys, args.top_k, true, warp, lane, kRouted);

  TileCopy copy;
  uint32_t ring_address = shared_address(ring) + lane * 16;
  auto feed = [&]<Way kWay>(WayOf<kWay>, int stage) {
    if (copy.left > 0) copy.next_chunk<kWay>(ring_address + stage * kStageBytes, lane);
    copy_async_commit();
  };
  int rank = is_shared ? args.top_k : warp;
  do {
    bool has_tile = rank < args.top_k + is_shared;
    int expert = __shfl_sync(0xffffffffu, routing.pick.expert, rank);
    float weight = is_shared ? 1.0f : __shfl_sync(0xffffffffu, routing.pick.weight, rank);
    if (has_tile) {
      const std::byte* matrix = m.data + (is_shared ? 0 : expert * args.down_bytes);
      copy.open(Tile(m, matrix + tile * m.tile_bytes), all, lane);
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) feed(WayOf<Way::any>{}, i);
    }
    launch_dependents();  // early, as its start takes longer than these products
    if (!is_shared) wait_for_predecessor();
    if (has_tile) {
      const auto* from =
          reinterpret_cast<const uint4*>(is_shared ? args.shared : args.routed + rank * m.k);
#pragma unroll 2
      for (int at = lane; at < m.k / 8; at += 32) row[at] = load_cg(from + at);
      __syncwarp();
      TileSum<1, true, 2> sum;  // registers are short
      sum.clear();
      int stage = 0;
      with_way(is_shared ? args.shared_down_way : args.down_way, [&]<Way kWay>(WayOf<kWay> way) {
        add_tile<kStages, kWay>(
            sum, unit_shift_of(m.format), m.group_shift, all, ring, stage, lane,
            [&](int s) { feed(way, s); },
            [&](int, int unit, int j) {
              bool there = kWay != Way::any || unit < all.end;
              return there ? row[unit * 8 + j * 4 + lane % 4] : uint4{0, 0, 0, 0};
            });
      });
      __syncwarp();
      weight *= kInputScale;
      if (lane % 4 == 0) {
        sums[rank * 16 + lane / 4] = __fmul_rn(weight, sum.total[0][0]);
        sums[rank * 16 + lane / 4 + 8] = __fmul_rn(weight, sum.total[0][2]);
      }
    }
    rank += kRouted;
  } while (!is_shared && rank < args.top_k);
  wait_for_predecessor();  // the shared expert's warp as well
  __syncthreads();
  if (thread < 16) ending.combine(args, sums, 0, tile * 16 + thread);
}

// Of more rows. Grid (hidden / 16). A warp takes whole entries. Shared memory: [weighted sums
// (picks + rows) x 16][rings][plan][activations of up to 8 rows: picks, then rows of the shared
// expert]. The activations of up to 8 rows come all at once, those of more a chunk ahead.
template <int kPerLane, int kStages, bool kFew>
__global__ __launch_bounds__(32 * kDownWarps,
                             1) void down_combine(const __grid_constant__ MoeArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int tile = static_cast<int>(blockIdx.x), picks = args.rows * args.top_k;
  auto* sums = reinterpret_cast<float*>(shared);  // [picks, then rows][16]
  std::byte* rings = shared + (picks + args.rows) * 64;
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kDownWarps * kStages * kStageBytes;
  Routing routing{.plan = RoutePlan(tail, picks), .one_row = false};

  // What the end needs is older than the last phase, and so is the plan of more than 8 rows: there
  // the weights are on their way before the experts' activations are made.
  constexpr int kMostRows = kFew ? kEntryRows : qwen_moe::kMaxRows;
  constexpr int kRounds = (kMostRows + 2 * kDownWarps - 1) / (2 * kDownWarps);
  int first_row = thread / 16, output = tile * 16 + thread % 16;
  Ending ending[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r)
    if (int row = first_row + r * 2 * kDownWarps; row < args.rows)
      ending[r].load(args, row, output);
  bool waited = false;
  auto wait = [&] {
    if (waited) return;
    wait_for_predecessor();
    launch_dependents();
    waited = true;
  };
  // Few rows' activations are asked for before weights, which they would queue behind.
  std::byte* few = tail + plan_bytes(picks);
  int pitch = activation_pitch(args.down.k), shared_pitch = activation_pitch(args.shared_down.k);
  if (kFew) wait();  // the plan is gate/up's
  copy_plan(args, tail);
  if constexpr (kFew) {
    auto copy_rows = [&](std::byte* to, int to_pitch, const Input* from, int rows, int k) {
      zero_ends(to, k, rows);
      for (int row = warp; row < rows; row += kDownWarps)
        for (int v = lane; v < k / 8; v += 32)
          copy_async_16(to + row * to_pitch + v * 16, from + row * k + v * 8);
    };
    copy_rows(few, pitch, args.routed, picks, args.down.k);
    copy_rows(few + picks * pitch, shared_pitch, args.shared, args.rows, args.shared_down.k);
    copy_async_commit();
    copy_async_wait<1>();
  } else {
    copy_async_wait<0>();
  }
  __syncthreads();
  routing.entries = *routing.plan.entries;

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
  if (kFew) {
    copy_async_wait<kStages>();
    __syncthreads();
  }

  int stage = 0, q = lane / 4, t = lane % 4;
  // The shared expert's activations are as old as the router's logits, the others' are new.
  auto wait_for_routed = [&](int index) {
    if (index >= own_shared) wait();
  };
  // Of many rows the lane's activations of the next chunk, of this entry or the next,
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
  if constexpr (!kFew) load_ahead();
#pragma unroll 1
  for (int index = 0; index < count; ++index) {
    RouteEntry entry = entry_at(index);
    bool is_shared = entry.expert < 0;
    const Matrix& m = is_shared ? args.shared_down : args.down;
    UnitRange all{0, m.k / kUnit};
    TileSum<1> sum;
    sum.clear();
    if constexpr (kFew) {
      const std::byte* rows = is_shared ? few + picks * pitch : few;
      uint32_t mine = held_address(
          rows + (entry.first + min(q, entry.count - 1)) * (is_shared ? shared_pitch : pitch) +
          t * 16);
      add_tile<kStages>(
          sum, unit_shift_of(m.format), m.group_shift, all, ring, stage, lane, feed,
          [&](int, int unit, int j) { return load_shared_16(mine + unit * 128 + j * 64); });
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
      float weight = kInputScale;
      int pick = picks + entry.first + n;
      if (n >= entry.count) continue;
      if (!is_shared) {
        pick = routing.pick_of(entry.first + n);
        weight *= routing.plan.weight[pick];
      }
      sums[pick * 16 + q + j / 2 * 8] = __fmul_rn(weight, sum.total[0][j]);
    }
  }
  wait();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r)
    if (int row = first_row + r * 2 * kDownWarps; row < args.rows)
      ending[r].combine(args, sums, row, output);
}

template <int kPerLane>
void launch_down(const Launcher& launch, const MoeArgs& args, size_t limit) {
  int picks = args.rows * args.top_k;
  auto row = [](int k) { return static_cast<size_t>(activation_pitch(k)); };
  size_t one = kDownWarps * static_cast<size_t>(2 * std::max(args.down.k, args.shared_down.k));
  size_t few = static_cast<size_t>(picks) * row(args.down.k) +
               static_cast<size_t>(args.rows) * row(args.shared_down.k);
  auto launched = [&](auto kernel, int stages, size_t tail) {
    size_t bytes = static_cast<size_t>(picks + args.rows) * 64 +
                   static_cast<size_t>(kDownWarps * stages * kStageBytes) + tail;
    if (bytes > limit) return false;
    launch(kernel, dim3(static_cast<unsigned>(args.down.tiles)), 32 * kDownWarps, bytes, args);
    return true;
  };
  bool done =
      (args.rows == 1 && launched(down_one_row<kPerLane, kOneRowStages>, kOneRowStages, one)) ||
      (args.rows <= kEntryRows &&
       launched(down_combine<kPerLane, kFewStages, true>, kFewStages, plan_bytes(picks) + few)) ||
      launched(down_combine<kPerLane, kManyStages, false>, kManyStages, plan_bytes(picks));
  require<Error>(done, "no kernel holds the down projections of ", args.rows, " rows");
}

template <int kPerLane>
void allow(size_t limit) {
  allow_shared(down_one_row<kPerLane, kOneRowStages>, limit);
  allow_shared(down_combine<kPerLane, kFewStages, true>, limit);
  allow_shared(down_combine<kPerLane, kManyStages, false>, limit);
}

}  // namespace

void CudaOps::reserve_down() {
  c_.num_experts <= 256 ? allow<8>(moe_shared_limit(device_))
                        : allow<16>(moe_shared_limit(device_));
}

void CudaOps::down_combine_residual(const DownCombineArgs<float, Input>& args) {
  MoeArgs moe = moe_args(c_, args.layer, args.router, args.rows.rows);
  moe.down_way = way_of(args.layer.experts_down.spec, 1);
  moe.shared_down_way = way_of(args.layer.shared_down.spec, 1);
  moe.slot = args.rows.slot;
  moe.routed = const_cast<Input*>(args.routed);
  moe.shared = args.shared;
  moe.shared_scale = args.shared_scale;
  moe.hidden = args.hidden;
  moe.next = weigh(args.hidden, args.next_norm);
  moe.plan = route_.data();
  c_.num_experts <= 256 ? launch_down<8>(launch_, moe, moe_shared_limit(device_))
                        : launch_down<16>(launch_, moe, moe_shared_limit(device_));
}

}  // namespace qwen_moe::cuda
