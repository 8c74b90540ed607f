// Which experts take which rows of a step, worked out on the device.
//
// For one row every warp finds the experts itself; for up to 8 rows every block does; for more, one
// kernel does it once and the blocks read its plan.
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
  __host__ __device__ static size_t bytes(int experts) {
    return static_cast<size_t>(experts) * 12 + 128;
  }
  __device__ RouteScratch(std::byte* at, int experts)
      : rows_of(reinterpret_cast<unsigned long long*>(at)),
        begin(reinterpret_cast<int*>(rows_of + experts)),
        warp_total(begin + experts) {}
};

// One pick of the router for lane < top_k: the lane's rank.
struct Pick {
  int expert;
  float weight;
};

// The top_k likeliest experts of a row, ties to the lowest index, and their softmax renormalised to
// sum 1. All lanes of a warp; experts <= 32 * kPerLane.
template <int kPerLane>
__device__ __forceinline__ Pick pick_experts(const float* logits, int experts, int top_k,
                                             int lane) {
  uint32_t key[kPerLane];  // grows with the logit
  uint32_t alive = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    key[j] = 0;
    if (int e = j * 32 + lane; e < experts) {
      uint32_t bits = __float_as_uint(load_cg(logits + e));
      key[j] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
      alive |= 1u << j;
    }
  }
  Pick mine{0, 0.0f};
  float top = 0, sum = 0;
  for (int rank = 0; rank < top_k; ++rank) {
    uint32_t best = 0;
    int at = -1;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if ((alive >> j & 1) && (at < 0 || key[j] > best)) {
        best = key[j];
        at = j;
      }
    uint32_t most = __reduce_max_sync(0xffffffffu, best);
    unsigned candidate = at >= 0 && best == most ? static_cast<unsigned>(at * 32 + lane) : ~0u;
    int expert = static_cast<int>(__reduce_min_sync(0xffffffffu, candidate));
    if (at >= 0 && expert == at * 32 + lane) alive &= ~(1u << at);
    float logit = __uint_as_float(most & 0x80000000u ? most & 0x7fffffffu : ~most);
    if (rank == 0) top = logit;
    float weight = expf(logit - top);
    sum += weight;
    if (lane == rank) mine = {expert, weight};
  }
  mine.weight /= sum;
  return mine;
}

// The plan of up to 64 rows; all threads of a block. Rows whose slot is 0 take no expert.
template <int kPerLane>
__device__ void build_plan(const RoutePlan& plan, const RouteScratch& scratch, const float* router,
                           const int32_t* slot, int rows, int experts, int top_k) {
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  for (int e = thread; e < experts; e += threads) scratch.rows_of[e] = 0;
  __syncthreads();
  Pick mine[64 / 8];  // of the rows that this warp takes: at most 8 with 8 warps
  int taken = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int row = warp + i * warps;
    if (row >= rows || slot[row] == 0) continue;
    mine[i] =
        pick_experts<kPerLane>(router + static_cast<int64_t>(row) * experts, experts, top_k, lane);
    taken |= 1 << i;
    if (lane < top_k) {
      plan.weight[row * top_k + lane] = mine[i].weight;
      atomicOr(&scratch.rows_of[mine[i].expert], 1ull << row);
    }
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
    int before = carried, total = carried;
    for (int w = 0; w < warps; ++w) {
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
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int row = warp + i * warps;
    if (!(taken >> i & 1) || lane >= top_k) continue;
    int e = mine[i].expert;
    int place = scratch.begin[e] + __popcll(scratch.rows_of[e] & ((1ull << row) - 1));
    plan.pick_of[place] = row * top_k + lane;
  }
  __syncthreads();
}

}  // namespace qwen_moe::cuda
