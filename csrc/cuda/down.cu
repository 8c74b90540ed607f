// Down projections of the routed experts and of the shared one, and what they add up to: a block
// owns 16 outputs of all rows and a warp a whole expert, so that the weighted sum in rank order,
// the shared expert and the residual end in the same block.
#include <algorithm>

#include "cuda/moe.cuh"
#include "engine/backend.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kDownWarps = 12;  // top_k + 1 in one go, for every known model
constexpr int kFewStages = 5;

// How many rows, and so how the activations come: one row's an entry at a time, those of up to 8
// rows all at once, those of more a chunk ahead.
enum class DownRows { one, few, many };

// Grid (hidden / 16). A warp takes whole entries. Shared memory: [weighted sums (picks + rows) x
// 16][rings][one row's activations of every warp, or plan] [activations of few rows: picks, then
// rows of the shared expert]. For one row it keeps to half of the registers, so that it starts
// beside the kernel before.
template <int kPerLane, int kStages, DownRows kRows>
__global__ __launch_bounds__(32 * kDownWarps, kRows == DownRows::one ? 2 : 1) void down_combine(
    const __grid_constant__ MoeArgs args) {
  constexpr bool kOneRow = kRows == DownRows::one;
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int tile = static_cast<int>(blockIdx.x), picks = args.rows * args.top_k;
  auto* sums = reinterpret_cast<float*>(shared);  // [picks, then rows][16]
  std::byte* rings = shared + (picks + args.rows) * 64;
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kDownWarps * kStages * kStageBytes;
  Routing routing{.plan = RoutePlan(tail, picks), .one_row = kOneRow};

  RouterKeys<kPerLane> keys;
  if (kOneRow && warp == 0) keys.load(args.router, args.experts, lane);
  // What the end needs is older than the last phase, and so are the router's logits and the plan of
  // more than 8 rows: there the weights are on their way before the experts' activations are made.
  constexpr int kMostRows = kOneRow ? 1 : kRows == DownRows::few ? kEntryRows : qwen_moe::kMaxRows;
  constexpr int kRounds = (kMostRows + 2 * kDownWarps - 1) / (2 * kDownWarps);
  int first_row = thread / 16, output = tile * 16 + thread % 16;
  float residual[kRounds], scale[kRounds];
  float norm = args.next.norm ? __ldg(args.next.norm + output) : 0.0f;
  int slot[kRounds] = {};
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    int row = first_row + r * 2 * kDownWarps;
    if (row >= args.rows) break;
    residual[r] = load_cg(args.hidden + static_cast<int64_t>(row) * args.down.n + output);
    scale[r] = load_cg(args.shared_scale + row);
    slot[r] = load_cg(args.slot + row);
  }
  bool waited = false;
  auto wait = [&] {
    if (waited) return;
    wait_for_predecessor();
    if (!kOneRow) launch_dependents();
    waited = true;
  };
  // Few rows' activations are asked for before weights, which they would queue behind.
  std::byte* few = tail + plan_bytes(picks);
  int pitch = activation_pitch(args.down.k), shared_pitch = activation_pitch(args.shared_down.k);
  if constexpr (kOneRow) {
    find_picks(routing, args, keys, args.top_k, true, warp, lane);
  } else {
    if (args.rows <= kEntryRows) wait();  // the plan is gate/up's
    copy_plan(args, tail);
    if constexpr (kRows == DownRows::few) {
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
  }

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
  if (kRows == DownRows::few) {
    copy_async_wait<kStages>();
    __syncthreads();
  }

  if (kOneRow) launch_dependents();  // early, as its start takes longer than these products

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
  if constexpr (kRows == DownRows::many) load_ahead();
#pragma unroll 1
  for (int index = 0; index < count; ++index) {
    if (kOneRow) wait_for_routed(index);
    RouteEntry entry = entry_at(index);
    bool is_shared = entry.expert < 0;
    const Matrix& m = is_shared ? args.shared_down : args.down;
    UnitRange all{0, m.k / kUnit};
    TileSum<1, kOneRow ? 2 : 4> sum;  // one row: registers are short
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
    } else if constexpr (kRows == DownRows::few) {
      const std::byte* rows = is_shared ? few + picks * pitch : few;
      uint32_t mine = held_address(
          rows + (entry.first + min(q, entry.count - 1)) * (is_shared ? shared_pitch : pitch) +
          t * 16);
      add_tile<1, kStages>(
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
      int pick = is_shared ? picks + entry.first + n : entry.first;
      if (kOneRow && !is_shared)
        weight *= __shfl_sync(0xffffffffu, routing.pick.weight, entry.first);
      if (n >= entry.count) continue;
      if (!kOneRow && !is_shared) {
        pick = routing.pick_of(entry.first + n);
        weight *= routing.plan.weight[pick];
      }
      sums[pick * 16 + q + j / 2 * 8] = __fmul_rn(weight, sum.total[0][j]);
    }
  }
  wait();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    int row = first_row + r * 2 * kDownWarps;
    if (row >= args.rows || slot[r] == 0) continue;
    float sum = 0;
    for (int rank = 0; rank < args.top_k; ++rank)
      sum = __fadd_rn(sum, sums[(row * args.top_k + rank) * 16 + thread % 16]);
    float gated = __fmul_rn(sigmoid(scale[r]), sums[(picks + row) * 16 + thread % 16]);
    float x = __fadd_rn(residual[r], __fadd_rn(sum, gated));
    args.hidden[static_cast<int64_t>(row) * args.down.n + output] = x;
    if (args.next.norm) weigh_value(args.next, row, args.down.n, output, x, norm);
  }
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
      (args.rows == 1 && launched(down_combine<kPerLane, 3, DownRows::one>, 3, one)) ||
      (args.rows <= kEntryRows && launched(down_combine<kPerLane, kFewStages, DownRows::few>,
                                           kFewStages, plan_bytes(picks) + few)) ||
      launched(down_combine<kPerLane, 6, DownRows::many>, 6, plan_bytes(picks));
  require<Error>(done, "no kernel holds the down projections of ", args.rows, " rows");
}

template <int kPerLane>
void allow(size_t limit) {
  allow_shared(down_combine<kPerLane, 3, DownRows::one>, limit);
  allow_shared(down_combine<kPerLane, kFewStages, DownRows::few>, limit);
  allow_shared(down_combine<kPerLane, 6, DownRows::many>, limit);
}

}  // namespace

void CudaOps::reserve_down() {
  c_.num_experts <= 256 ? allow<8>(moe_shared_limit(device_))
                        : allow<16>(moe_shared_limit(device_));
}

void CudaOps::down_combine_residual(const DownCombineArgs<float, Input>& args) {
  MoeArgs moe = moe_args(c_, args.layer, args.router, args.rows.rows);
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
