// Routed experts and the shared expert of a step.
//
// gate/up: every block takes an even share of (expert, output tile) work; its warps split the
// inputs, as in dense.cu. down: a block owns 16 outputs of all rows and a warp a whole expert, so
// that the weighted sum in rank order, the shared expert and the residual end in the same block.
#include <algorithm>

#include "cuda/dense.h"
#include "cuda/ops.h"
#include "cuda/route.cuh"

namespace qwen_moe::cuda {
namespace {

constexpr int kGateUpThreads = 32 * kSlices;
constexpr int kDownWarps = 12;  // top_k + 1 of one row in one go, for every known model
constexpr int kRouteThreads = 512;

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

// How a kernel's warps see the routing: their own registers for one row, else a plan in shared or
// device memory.
struct Routing {
  Pick pick;  // of one row, lane < top_k
  RoutePlan plan;
  int entries;
  bool one_row;

  __device__ RouteEntry entry(int i) const {
    if (one_row) return {__shfl_sync(0xffffffffu, pick.expert, i), i, 1};
    return {__ldcg(&plan.entry[i].expert), __ldcg(&plan.entry[i].first),
            __ldcg(&plan.entry[i].count)};
  }
};

// Entries beyond shared memory are read past L1; those in shared memory need a plain read.
__device__ __forceinline__ RouteEntry entry_of(const Routing& r, bool in_shared, int i) {
  if (r.one_row || !in_shared) return r.entry(i);
  return r.plan.entry[i];
}

// Grid (blocks). Shared memory: [plan and scratch][activations 8 rows][partial 2 x 2 tiles][rings].
template <int kPerLane, int kStages>
__global__ __launch_bounds__(kGateUpThreads, 2) void gate_up(const __grid_constant__ MoeArgs args,
                                                             int act_rows) {
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Matrix& m = args.gate_up;
  int pitch = activation_pitch(m.k), picks = args.rows * args.top_k;
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(activations + act_rows * pitch);
  int buffer_floats = 2 * kSlices * act_rows * kPartialPitch;
  std::byte* rings = reinterpret_cast<std::byte*>(partial + 2 * buffer_floats);
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kSlices * kStages * kStageBytes;
  bool one_row = args.rows == 1, in_shared = args.rows <= kEntryRows;
  UnitRange slice = slice_units(m.k, warp, kSlices);
  int pairs = m.tiles / 2;

  wait_for_predecessor();
  launch_dependents();
  Routing routing{{}, RoutePlan(in_shared ? tail : args.plan, picks), 0, one_row};
  if (one_row) {
    if (args.slot[0] != 0) {
      routing.pick = pick_experts<kPerLane>(args.router, args.experts, args.top_k, lane);
      routing.entries = args.top_k;
    }
  } else if (in_shared) {
    build_plan<kPerLane>(
        routing.plan, RouteScratch(tail + (RoutePlan::bytes(picks) + 15) / 16 * 16, args.experts),
        args.router, args.slot, args.rows, args.experts, args.top_k);
    routing.entries = *routing.plan.entries;
  } else {
    routing.entries = load_cg(routing.plan.entries);
  }

  int64_t all = static_cast<int64_t>(routing.entries) * pairs;
  int begin = static_cast<int>(all * blockIdx.x / gridDim.x);
  int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);

  int step = chunk_units(m.format);
  struct {
    int item, half, unit, entry, expert;
  } producer{slice.begin == slice.end ? end : begin, 0, slice.begin, -1, 0};
  int produced = 0;
  auto produce = [&] {
    if (producer.item < end) {
      if (int entry = producer.item / pairs; entry != producer.entry) {
        producer.entry = entry;
        producer.expert = entry_of(routing, in_shared, entry).expert;
      }
      int tile = producer.item % pairs + producer.half * pairs;
      int units = min(step, slice.end - producer.unit);
      copy_chunk(ring + produced * kStageBytes, m,
                 m.data + producer.expert * args.gate_up_bytes + tile * m.tile_bytes, producer.unit,
                 units, lane);
      produced = produced + 1 == kStages ? 0 : produced + 1;
      producer.unit += units;
      if (producer.unit >= slice.end) {
        producer.unit = slice.begin;
        producer.half ^= 1;
        producer.item += producer.half == 0;
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) produce();

  int current = -1, consumed = 0;
  RouteEntry entry{0, 0, 0};
  const std::byte* mine = activations + lane / 4 * pitch + lane % 4 * 16;
  for (int item = begin; item < end; ++item) {
    if (int index = item / pairs; index != current) {
      // The warp's own slice of the expert's rows; no other warp reads it.
      current = index;
      entry = entry_of(routing, in_shared, index);
      __syncwarp();
      int vectors = (slice.end - slice.begin) * 8;  // of 16 bytes in a row
      for (int base = 0; base < entry.count * vectors; base += 32 * 4) {
        uint4 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (int at = base + i * 32 + lane; at < entry.count * vectors) {
            int place = entry.first + at / vectors;
            int pick = one_row     ? 0
                       : in_shared ? routing.plan.pick_of[place]
                                   : load_cg(routing.plan.pick_of + place);
            x[i] = load_cg(reinterpret_cast<const uint4*>(
                               args.normed + static_cast<int64_t>(pick / args.top_k) * m.k +
                               slice.begin * kUnit) +
                           at % vectors);
          }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (int at = base + i * 32 + lane; at < entry.count * vectors)
            *reinterpret_cast<uint4*>(activations + at / vectors * pitch + slice.begin * kUnit * 2 +
                                      at % vectors * 16) = x[i];
      }
      __syncwarp();
    }
    auto rows_of = [&](int, int unit, int half) {
      uint4 b{0, 0, 0, 0};
      if (lane / 4 < entry.count)
        b = *reinterpret_cast<const uint4*>(mine + unit * 128 + half * 64);
      return b;
    };
    float* sums = partial + (item - begin) % 2 * buffer_floats;
    for (int half = 0; half < 2; ++half) {
      TileSum<1> sum;
      sum.clear();
      for (int unit = slice.begin; unit < slice.end; unit += step) {
        copy_async_wait<kStages - 2>();
        __syncwarp();
        produce();
        sum.add(m, ring + consumed * kStageBytes, unit, min(step, slice.end - unit), lane, rows_of);
        consumed = consumed + 1 == kStages ? 0 : consumed + 1;
        __syncwarp();
      }
      sum.store(m, sums + (half * kSlices + warp) * entry.count * kPartialPitch, entry.count, lane);
    }
    // One barrier an item: the other half of `partial` is free until the next one.
    __syncthreads();
    if (int row = thread / 16; row < entry.count) {
      int output = thread % 16;
      float gate = sum_slices(sums, entry.count, row, output);
      float up = sum_slices(sums + kSlices * entry.count * kPartialPitch, entry.count, row, output);
      args.routed[static_cast<int64_t>(entry.first + row) * (pairs * 16) + item % pairs * 16 +
                  output] = __float2bfloat16(silu(gate) * up);
    }
  }
}

// Grid (hidden / 16). Shared memory: [weighted sums (picks + rows) x 16][rings][one row's
// activations of every warp, or plan and scratch].
template <int kPerLane, int kStages, bool kOneRow>
__global__ __launch_bounds__(32 * kDownWarps,
                             kOneRow ? 2
                                     : 1) void down_combine(const __grid_constant__ MoeArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int tile = static_cast<int>(blockIdx.x), picks = args.rows * args.top_k;
  auto* sums = reinterpret_cast<float*>(shared);  // [picks, then rows][16]
  std::byte* rings = shared + (picks + args.rows) * 64;
  std::byte* ring = rings + warp * kStages * kStageBytes;
  std::byte* tail = rings + kDownWarps * kStages * kStageBytes;
  bool in_shared = args.rows <= kEntryRows;

  // The router's logits come from the phase before the last, so the plan is made, and the weights
  // are on their way, before the experts' activations are there.
  Routing routing{{}, RoutePlan(in_shared ? tail : args.plan, picks), 0, kOneRow};
  if (kOneRow) {
    if (args.slot[0] != 0) {
      routing.pick = pick_experts<kPerLane>(args.router, args.experts, args.top_k, lane);
      routing.entries = args.top_k;
    }
  } else if (in_shared) {
    build_plan<kPerLane>(
        routing.plan, RouteScratch(tail + (RoutePlan::bytes(picks) + 15) / 16 * 16, args.experts),
        args.router, args.slot, args.rows, args.experts, args.top_k);
    routing.entries = *routing.plan.entries;
  } else {
    routing.entries = load_cg(routing.plan.entries);
  }

  // This warp's share: shared-expert rows from the last warp backwards, then routed entries.
  int shared_entries = (args.rows + kEntryRows - 1) / kEntryRows;
  int own_shared = (shared_entries - (kDownWarps - 1 - warp) + kDownWarps - 1) / kDownWarps;
  int own_routed = (routing.entries - warp + kDownWarps - 1) / kDownWarps;
  own_shared = max(own_shared, 0);
  own_routed = max(own_routed, 0);
  auto entry_at = [&](int index) -> RouteEntry {
    if (index < own_shared) {
      int first = (kDownWarps - 1 - warp + index * kDownWarps) * kEntryRows;
      return {-1, first, min(kEntryRows, args.rows - first)};
    }
    return entry_of(routing, in_shared, warp + (index - own_shared) * kDownWarps);
  };

  struct {
    int index, unit;
    RouteEntry entry;
  } producer{0, 0, {}};
  int count = own_shared + own_routed, produced = 0;
  if (count > 0) producer.entry = entry_at(0);
  auto produce = [&] {
    if (producer.index < count) {
      bool is_shared = producer.entry.expert < 0;
      const Matrix& m = is_shared ? args.shared_down : args.down;
      int units = min(chunk_units(m.format), m.k / kUnit - producer.unit);
      copy_chunk(
          ring + produced * kStageBytes, m,
          m.data + (is_shared ? 0 : producer.entry.expert * args.down_bytes) + tile * m.tile_bytes,
          producer.unit, units, lane);
      produced = produced + 1 == kStages ? 0 : produced + 1;
      producer.unit += units;
      if (producer.unit >= m.k / kUnit) {
        producer.unit = 0;
        if (++producer.index < count) producer.entry = entry_at(producer.index);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) produce();

  int consumed = 0, q = lane / 4, t = lane % 4;
  auto run = [&](int index) {
    RouteEntry entry = entry_at(index);
    bool is_shared = entry.expert < 0;
    const Matrix& m = is_shared ? args.shared_down : args.down;
    const bf16* from = (is_shared ? args.shared : args.routed) +
                       static_cast<int64_t>(entry.first + q) * m.k + t * 8;
    int all = m.k / kUnit, step = chunk_units(m.format);
    TileSum<1> sum;
    sum.clear();
    auto consume = [&](int unit, const auto& rows_of) {
      copy_async_wait<kStages - 2>();
      __syncwarp();
      produce();
      sum.add(m, ring + consumed * kStageBytes, unit, min(step, all - unit), lane, rows_of);
      consumed = consumed + 1 == kStages ? 0 : consumed + 1;
      __syncwarp();
    };
    if constexpr (kOneRow) {
      auto* row =
          reinterpret_cast<uint4*>(tail) + warp * (max(args.down.k, args.shared_down.k) / 8);
      for (int at = lane; at < m.k / 8; at += 32)
        row[at] = load_cg(reinterpret_cast<const uint4*>(from - q * m.k - t * 8) + at);
      __syncwarp();
      for (int unit = 0; unit < all; unit += step)
        consume(unit, [&](int, int u, int half) {
          return q == 0 ? row[u * 8 + half * 4 + t] : uint4{0, 0, 0, 0};
        });
    } else {
      // The next chunk's activations are on their way while this one is summed.
      uint4 b[8], next[8];
      auto load = [&](uint4(&to)[8], int unit) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          to[i] = uint4{0, 0, 0, 0};
          if (i / 2 < step && unit + i / 2 < all && q < entry.count)
            to[i] = load_cg(reinterpret_cast<const uint4*>(from + unit * kUnit + i * 32));
        }
      };
      load(next, 0);
      for (int unit = 0; unit < all; unit += step) {
#pragma unroll
        for (int i = 0; i < 8; ++i) b[i] = next[i];
        if (unit + step < all) load(next, unit + step);
        consume(unit, [&](int, int u, int half) { return b[(u - unit) * 2 + half]; });
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int n = 2 * t + j % 2;
      float weight = 1.0f;
      int pick = is_shared ? picks + entry.first + n : 0;
      if (kOneRow && !is_shared) {
        pick = entry.first;
        weight = __shfl_sync(0xffffffffu, routing.pick.weight, entry.first);
      }
      if (n >= entry.count) continue;
      if (!kOneRow && !is_shared) {
        int place = entry.first + n;
        pick = in_shared ? routing.plan.pick_of[place] : load_cg(routing.plan.pick_of + place);
        weight = in_shared ? routing.plan.weight[pick] : load_cg(routing.plan.weight + pick);
      }
      sums[pick * 16 + q + j / 2 * 8] = __fmul_rn(weight, sum.result(m, 0, j));
    }
  };
  // The shared expert's activations are as old as the router's logits.
  for (int i = 0; i < own_shared; ++i) run(i);
  int row = thread / 16, output = tile * 16 + thread % 16;
  float residual = 0, scale = 0;
  if (row < args.rows) {
    residual = load_cg(args.hidden + static_cast<int64_t>(row) * args.down.n + output);
    scale = load_cg(args.shared_scale + row);
  }
  wait_for_predecessor();
  launch_dependents();
  for (int i = own_shared; i < count; ++i) run(i);
  __syncthreads();
  for (; row < args.rows; row += 2 * kDownWarps) {
    float* hidden = args.hidden + static_cast<int64_t>(row) * args.down.n + output;
    if (row * 16 >= 32 * kDownWarps) {
      residual = load_cg(hidden);
      scale = load_cg(args.shared_scale + row);
    }
    if (args.slot[row] == 0) continue;
    float sum = 0;
    for (int rank = 0; rank < args.top_k; ++rank)
      sum = __fadd_rn(sum, sums[(row * args.top_k + rank) * 16 + thread % 16]);
    float gated = __fmul_rn(sigmoid(scale), sums[(picks + row) * 16 + thread % 16]);
    *hidden = __fadd_rn(residual, __fadd_rn(sum, gated));
  }
}

size_t plan_bytes(int picks, int experts) {
  return (RoutePlan::bytes(picks) + 15) / 16 * 16 + RouteScratch::bytes(experts);
}

template <int kPerLane>
void allow(size_t limit) {
  allow_shared(route<kPerLane>, limit);
  allow_shared(gate_up<kPerLane, 6>, limit);
  allow_shared(gate_up<kPerLane, 4>, limit);
  allow_shared(down_combine<kPerLane, 3, true>, limit);
  allow_shared(down_combine<kPerLane, 6, false>, limit);
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
  route_ = DeviceBuffer<std::byte>(RoutePlan::bytes(max_rows_ * c_.num_experts_per_tok));
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
    launch(route<kPerLane>, dim3(1), kRouteThreads, RouteScratch::bytes(args.experts), args);
  auto bytes = [&](int stages) {
    return static_cast<size_t>(act_rows) * activation_pitch(args.gate_up.k) +
           static_cast<size_t>(4 * kSlices * act_rows * kPartialPitch * 4) +
           static_cast<size_t>(kSlices * stages * kStageBytes) +
           (many || args.rows == 1 ? 0 : plan_bytes(picks, args.experts));
  };
  int most = std::min(args.experts, picks) * args.gate_up.tiles / 2;
  dim3 grid(static_cast<unsigned>(std::min(sms, most)));
  if (args.rows == 1)
    launch(gate_up<kPerLane, 6>, grid, kGateUpThreads, bytes(6), args, act_rows);
  else
    launch(gate_up<kPerLane, 4>, grid, kGateUpThreads, bytes(4), args, act_rows);
}

template <int kPerLane>
void launch_down(const Launcher& launch, const MoeArgs& args) {
  int picks = args.rows * args.top_k;
  dim3 grid(static_cast<unsigned>(args.down.tiles));
  auto bytes = [&](int stages) {
    return static_cast<size_t>(picks + args.rows) * 64 +
           static_cast<size_t>(kDownWarps * stages * kStageBytes) +
           (args.rows == 1
                ? static_cast<size_t>(kDownWarps * 2 * std::max(args.down.k, args.shared_down.k))
            : args.rows > kEntryRows ? 0
                                     : plan_bytes(picks, args.experts));
  };
  if (args.rows == 1)
    launch(down_combine<kPerLane, 3, true>, grid, 32 * kDownWarps, bytes(3), args);
  else
    launch(down_combine<kPerLane, 6, false>, grid, 32 * kDownWarps, bytes(6), args);
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
