// Which experts take which rows of a step, worked out on the device.
//
// For one row a warp of every block finds the experts; for up to 8 rows every block does; for more,
// one kernel does it once and the blocks read its plan.
#pragma once

#include "cuda/device.cuh"

namespace qwen_moe::cuda {

inline constexpr int kEntryRows = 8;  // rows of one pass of mma columns

// Up to 8 picks of one expert, at consecutive places of the order by expert.
struct RouteEntry {
  int expert, first, count;
};

struct RoutePlan {
  int* entries;       // number of entries
  RouteEntry* entry;  // [entries], by expert
  int* pick_of;       // [place] row * top_k + rank
  float* weight;      // [row * top_k + rank]

  __host__ __device__ static size_t bytes(int picks) {
    return 16 + static_cast<size_t>(picks) * (sizeof(RouteEntry) + 8);
  }
  __device__ RoutePlan(std::byte* at, int picks)
      : entries(reinterpret_cast<int*>(at)),
        entry(reinterpret_cast<RouteEntry*>(at + 16)),
        pick_of(reinterpret_cast<int*>(entry + picks)),
        weight(reinterpret_cast<float*>(pick_of + picks)) {}
};

// What build_plan needs besides the plan, in shared memory.
struct RouteScratch {
  unsigned long long* rows_of;  // [experts] bit r: row r takes the expert
  int* begin;                   // [experts]
  int* warp_total;              // [32]
  int16_t* expert;              // [picks] -1: the row takes none
  __host__ __device__ static size_t bytes(int experts, int picks) {
    return static_cast<size_t>(experts) * 12 + 128 +
           (static_cast<size_t>(picks) * 2 + 15) / 16 * 16;
  }
  __device__ RouteScratch(std::byte* at, int experts)
      : rows_of(reinterpret_cast<unsigned long long*>(at)),
        begin(reinterpret_cast<int*>(rows_of + experts)),
        warp_total(begin + experts),
        expert(reinterpret_cast<int16_t*>(warp_total + 32)) {}
};

// One pick of the router for lane < top_k: the lane's rank.
struct Pick {
  int expert;
  float weight;
};

// A row's router logits in the lanes of a warp, as keys that grow with the logit: lane l holds
// experts l, 32 + l, ...; that of an infinity below all where there is none.
template <int kPerLane>
struct RouterKeys {
  uint32_t key[kPerLane];

  __device__ __forceinline__ void load(const float* logits, int experts, int lane) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      key[j] =
          __float_as_uint(j * 32 + lane < experts ? load_cg(logits + j * 32 + lane) : -INFINITY);
  }
  // After `load`; waits for it. The two zeros are one.
  __device__ __forceinline__ void order() {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      uint32_t bits = __float_as_uint(__fadd_rn(__uint_as_float(key[j]), 0.0f));
      key[j] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
  }
};

// The largest of a lane's keys.
template <int kPerLane>
__device__ __forceinline__ uint32_t largest_key(const RouterKeys<kPerLane>& keys) {
  uint32_t best[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) best[j] = keys.key[j];
#pragma unroll
  for (int level = 1; level <= 4; ++level)
#pragma unroll
    for (int j = 0; j < kPerLane / 2; ++j)
      if (j < kPerLane >> level) best[j] = max(best[j], best[j + (kPerLane >> level)]);
  return best[0];
}

// The `ranks` likeliest experts of a row, ties to the lowest index, and with `weigh` their softmax
// renormalised to sum 1. All lanes of a warp; experts <= 32 * kPerLane.
//
// The largest keys are found one after the other, by value, and only then who holds them: every
// lane looks for that of its rank. Where two keys are alike, one after the other by place.
template <int kPerLane>
__device__ __forceinline__ Pick pick_experts(RouterKeys<kPerLane>& keys, int ranks, bool weigh,
                                             int lane) {
  Pick mine{0, 0.0f};
  uint32_t own = 0, top = 0, least = 0;  // own: the key of the lane's rank
  RouterKeys<kPerLane> left = keys;
#pragma unroll 1
  for (int rank = 0; rank < ranks; ++rank) {
    least = __reduce_max_sync(0xffffffffu, largest_key(left));
    if (rank == 0) top = least;
    if (lane == rank) own = least;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (left.key[j] == least) left.key[j] = 0;
  }
  unsigned chosen = 0;  // bit j: the lane's key j is among them
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) chosen |= keys.key[j] >= least ? 1u << j : 0u;
  if (__reduce_add_sync(0xffffffffu, __popc(chosen)) == static_cast<unsigned>(ranks)) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      unsigned holders = __ballot_sync(0xffffffffu, chosen >> j & 1);
      for (; holders; holders &= holders - 1) {
        int holder = __ffs(static_cast<int>(holders)) - 1;
        uint32_t key = __shfl_sync(0xffffffffu, keys.key[j], holder);
        if (lane < ranks && own == key) mine.expert = j * 32 + holder;
      }
    }
  } else {
    for (int rank = 0; rank < ranks; ++rank) {
      uint32_t most = __reduce_max_sync(0xffffffffu, largest_key(keys)), candidate = ~0u;
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j)
        if (keys.key[j] == most) candidate = static_cast<uint32_t>(j * 32 + lane);
      uint32_t expert = __reduce_min_sync(0xffffffffu, candidate);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (expert == static_cast<uint32_t>(j * 32 + lane)) keys.key[j] = 0;
      if (lane == rank) {
        mine.expert = static_cast<int>(expert);
        own = most;
      }
    }
  }
  if (!weigh) return mine;
  auto logit = [](uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
  };
  if (lane < ranks) mine.weight = expf(logit(own) - logit(top));
  mine.weight /= warp_sum(mine.weight);
  return mine;
}

// The plan of up to 64 rows; all threads of a block. Rows whose slot is 0 take no expert.
// `meanwhile` is called by all threads once the first logits have been asked for.
template <int kPerLane, class Meanwhile>
__device__ __forceinline__ void build_plan(const RoutePlan& plan, const RouteScratch& scratch,
                                           const float* router, const int32_t* slot, int rows,
                                           int experts, int top_k, const Meanwhile& meanwhile) {
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  RouterKeys<kPerLane> ahead;  // the next row's are on their way while this one's are looked at
  int next_of = 0;
  auto look_ahead = [&](int row) {
    if (row >= rows) return;
    ahead.load(router + static_cast<int64_t>(row) * experts, experts, lane);
    next_of = load_cg(slot + row);
  };
  look_ahead(warp);
  meanwhile();
  for (int e = thread; e < experts; e += threads) scratch.rows_of[e] = 0;
  __syncthreads();
#pragma unroll 1
  for (int row = warp; row < rows; row += warps) {
    RouterKeys<kPerLane> keys = ahead;
    int of = next_of;
    look_ahead(row + warps);
    keys.order();
    Pick mine = pick_experts(keys, top_k, true, lane);
    if (lane >= top_k) continue;
    plan.weight[row * top_k + lane] = mine.weight;
    scratch.expert[row * top_k + lane] = static_cast<int16_t>(of == 0 ? -1 : mine.expert);
    if (of != 0)  // 32 bits at a time: there is no wider atomic in shared memory
      atomicOr(reinterpret_cast<unsigned*>(scratch.rows_of + mine.expert) + row / 32,
               1u << row % 32);
  }
  __syncthreads();
  // Running sums over the experts, of picks in the low half and of entries in the high half.
  int carried = 0;
  for (int base = 0; base < experts; base += threads) {
    int e = base + thread;
    int count = e < experts ? __popcll(scratch.rows_of[e]) : 0;
    int own = count | (count + kEntryRows - 1) / kEntryRows << 16, sum = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      int before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += before;
    }
    if (lane == 31) scratch.warp_total[warp] = sum;
    __syncthreads();
    int before = carried, total = carried, used = min(warps, (experts - base + 31) / 32);
    for (int w = 0; w < used; ++w) {
      if (w == warp) before = total;
      total += scratch.warp_total[w];
    }
    carried = total;
    int begin = before + sum - own;
    if (e < experts) {
      scratch.begin[e] = begin & 0xffff;
      for (int i = 0; i * kEntryRows < count; ++i)
        plan.entry[(begin >> 16) + i] = {e, (begin & 0xffff) + i * kEntryRows,
                                         min(kEntryRows, count - i * kEntryRows)};
    }
    __syncthreads();
  }
  if (thread == 0) *plan.entries = carried >> 16;
  for (int pick = thread; pick < rows * top_k; pick += threads) {
    int e = scratch.expert[pick], row = pick / top_k;
    if (e < 0) continue;
    int place = scratch.begin[e] + __popcll(scratch.rows_of[e] & ((1ull << row) - 1));
    plan.pick_of[place] = pick;
  }
  __syncthreads();
}

}  // namespace qwen_moe::cuda
