// The candidates of a draw, and the walk over them, likeliest first, to where a count or a sum of
// weights is reached. Sums are of integers, so their order does not matter.
#pragma once

#include "base/error.h"
#include "cuda/device.cuh"
#include "cuda/sample.h"

namespace qwen_moe::cuda {

using ChunkSummary = Sampler::ChunkSummary;
using RowState = Sampler::RowState;
using Listed = Sampler::Listed;
using Sum = unsigned long long;

constexpr int kChunk = 2048;  // tokens that a warp sums up
constexpr int kSummarizeChunks = 8, kSummarizeThreads = 32 * kSummarizeChunks;  // of a block
constexpr int kMaxChunks = 512;
constexpr int kListThreads = 512, kSpan = 32 * kListThreads;  // a thread marks its 32 in one word
constexpr int kListed = 16384;                                // candidates in a row's list
constexpr int kChooseThreads = 1024, kBins = kChooseThreads, kBinBits = 10;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kOne = 0x1.0p40f;  // the weight of the likeliest token
constexpr double kLog2E = 1.4426950408889634;

// Bits in the order of the values; the two zeros are one.
__device__ __forceinline__ uint32_t order_key(float x) {
  uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ Sum warp_add(Sum x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}
__device__ __forceinline__ Sum warp_largest(Sum x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}
// The sum over this lane and those before it.
template <class T>
__device__ __forceinline__ T warp_scan(T x) {
  int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    T before = __shfl_up_sync(kAll, x, offset);
    if (lane >= offset) x += before;
  }
  return x;
}

struct RowSummary {
  uint32_t top_key, raw_top_key;
  int32_t token;  // the likeliest after penalties
  bool finite;
};

// Every warp merges for itself.
__device__ inline RowSummary merge(const ChunkSummary* summaries, int chunks) {
  Sum best = 0;
  float raw_max = -INFINITY;
  bool finite = true;
  for (int i = static_cast<int>(threadIdx.x % 32); i < chunks; i += 32) {
    best = max(best, __ldcg(&summaries[i].best));
    raw_max = fmaxf(raw_max, __ldcg(&summaries[i].raw_max));
    finite = finite && __ldcg(&summaries[i].finite);
  }
  best = warp_largest(best);
  return {static_cast<uint32_t>(best >> 32), order_key(warp_max(raw_max)),
          static_cast<int32_t>(~static_cast<uint32_t>(best)), __all_sync(kAll, finite) != 0};
}

// The weight of a logit, in units of 2^-40 of the likeliest; 0 for one that cannot be drawn.
struct Weighing {
  uint32_t top_key;
  float top;
  float scale;  // log2(e) / temperature
  Sum least;    // smaller weights count as 0

  __device__ Weighing(uint32_t key, double temperature, double min_p)
      : top_key(key),
        top(from_key(key)),
        scale(static_cast<float>(kLog2E / temperature)),
        least(max(Sum{1}, static_cast<Sum>(ceil(min_p * static_cast<double>(kOne))))) {}
  __device__ Sum operator()(float logit) const {
    // Equality first: the difference of infinities, and 0 times an infinite scale, are no numbers.
    if (logit == top) return static_cast<Sum>(kOne);
    float share = exp2f((logit - top) * scale);
    Sum weight = share > 0 ? static_cast<Sum>(share * kOne) : 0;
    return weight >= least ? weight : 0;
  }
};

struct Candidate {
  int32_t token;
  uint32_t distance;  // from the key of the likeliest
  uint32_t bin;       // of the first histogram; never falls as the distance grows
  Sum weight;
};

// The tokens that may be drawn, or with `alike` (every weight is 1) reported: those of the list
// when all fit in it, else those of the whole row. Every token of a smaller distance than a
// candidate's is a candidate too, unless its weight is 0.
struct Candidates {
  const Listed* list;  // or null
  const float* row;
  int count;  // to look at
  Weighing weigh;
  bool alike;
  uint32_t span;
  float bins_per_logit;

  __device__ Candidates(const Listed* list, const float* row, int vocab, uint32_t listed,
                        uint32_t span, const Weighing& weigh, bool alike)
      : list(listed <= kListed ? list : nullptr),
        row(row),
        count(listed <= kListed ? static_cast<int>(listed) : vocab),
        weigh(weigh),
        alike(alike),
        span(span),
        bins_per_logit(kBins / (weigh.top - from_key(weigh.top_key - span))) {}

  __device__ bool get(int i, Candidate& c) const {
    float logit;
    if (list) {
      logit = __ldcg(&list[i].logit);
      c.token = __ldcg(&list[i].token);
    } else {
      logit = __ldcg(row + i);
      c.token = i;
    }
    c.distance = weigh.top_key - order_key(logit);
    if (c.distance > span) return false;
    // What is no number (0 / 0, when all are equal) gives bin 0.
    c.bin = min(__float2uint_rz((weigh.top - logit) * bins_per_logit), kBins - 1u);
    c.weight = alike ? 1 : weigh(logit);
    return c.weight > 0;
  }
};

// What a thread knows of the bin of its number.
struct Bin {
  uint32_t count, before;     // candidates in it, and in the bins of smaller number
  Sum weight, weight_before;  // alike
  int32_t token;              // the candidate, when there is one only
  uint32_t all;               // candidates in all bins
  Sum all_weight;
};

struct Shared {
  uint32_t count[kBins], low[kBins], high[kBins];  // low and high: words of the sum of weights
  int32_t token[kBins];
  uint32_t warp_count[32];
  Sum warp_weight[32];
  Bin picked;
  uint32_t picked_bin;
  uint32_t nearest, farthest, cursor;
  Sum top[kMaxLogprobs];
};

// The histogram of bin_of(candidate) over the candidates for which it is not negative. For all
// threads of a block, as everything below.
template <class BinOf>
__device__ inline Bin histogram(Shared& s, const Candidates& in, const BinOf& bin_of) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  s.count[thread] = s.low[thread] = s.high[thread] = 0;
  __syncthreads();
  for (int i = thread; i < in.count; i += kChooseThreads) {
    Candidate c;
    int bin = in.get(i, c) ? bin_of(c) : -1;
    if (bin < 0) continue;
    // 64 bits in two words: whoever makes the low one wrap carries.
    uint32_t low = static_cast<uint32_t>(c.weight);
    uint32_t carry = atomicAdd(&s.low[bin], low) + low < low;
    uint32_t high = static_cast<uint32_t>(c.weight >> 32) + carry;
    if (high) atomicAdd(&s.high[bin], high);
    atomicAdd(&s.count[bin], 1u);
    s.token[bin] = c.token;
  }
  __syncthreads();
  Bin b;
  b.count = s.count[thread];
  b.weight = Sum{s.high[thread]} << 32 | s.low[thread];
  b.token = s.token[thread];
  uint32_t count = warp_scan(b.count);
  Sum weight = warp_scan(b.weight);
  if (lane == 31) {
    s.warp_count[warp] = count;
    s.warp_weight[warp] = weight;
  }
  __syncthreads();
  uint32_t warps = warp_scan(s.warp_count[lane]);
  Sum warps_weight = warp_scan(s.warp_weight[lane]);
  b.all = __shfl_sync(kAll, warps, 31);
  b.all_weight = __shfl_sync(kAll, warps_weight, 31);
  b.before = count - b.count + __shfl_sync(kAll, warps, warp) - s.warp_count[warp];
  b.weight_before = weight - b.weight + __shfl_sync(kAll, warps_weight, warp) - s.warp_weight[warp];
  return b;
}

// Makes s.picked the bin in which the count, or the sum of weights, reaches `goal`, which is at
// least 1 and at most that of all.
__device__ inline void pick(Shared& s, const Bin& bin, bool by_count, Sum goal) {
  __syncthreads();  // all have read what was picked before
  Sum before = by_count ? bin.before : bin.weight_before;
  Sum here = by_count ? bin.count : bin.weight;
  if (before < goal && goal <= before + here) {
    s.picked = bin;
    s.picked_bin = threadIdx.x;
  }
  __syncthreads();
}

struct Reached {
  int32_t token;
  Sum through;  // weight of the candidates up to and including it
};

// Walks the candidates, likeliest first and the lowest token first among equals, to the one at
// which their count, or the sum of their weights, reaches `goal`. `first` is their histogram by
// bin; `list` has room for kListed.
__device__ inline Reached walk(Shared& s, const Candidates& all, const Bin& first, bool by_count,
                               Sum goal, Listed* list, int token_bits) {
  pick(s, first, by_count, goal);
  Bin at = s.picked;
  const uint32_t bin = s.picked_bin;
  Sum through = at.weight_before;
  goal -= by_count ? at.before : at.weight_before;
  if (at.count == 1) return {at.token, through + at.weight};

  // The range of the bin's distances, and, when the whole row had to be looked at, its tokens.
  Candidates in = all;
  const bool gather = !all.list && at.count <= kListed;
  if (threadIdx.x == 0) {
    s.nearest = kAll;
    s.farthest = s.cursor = 0;
  }
  __syncthreads();
  uint32_t nearest = kAll, farthest = 0;
  for (int i = static_cast<int>(threadIdx.x); i < all.count; i += kChooseThreads) {
    Candidate c;
    if (!all.get(i, c) || c.bin != bin) continue;
    nearest = min(nearest, c.distance);
    farthest = max(farthest, c.distance);
    if (gather) list[atomicAdd(&s.cursor, 1u)] = {__ldcg(all.row + i), i};
  }
  nearest = __reduce_min_sync(kAll, nearest);
  farthest = __reduce_max_sync(kAll, farthest);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&s.nearest, nearest);
    atomicMax(&s.farthest, farthest);
  }
  __syncthreads();
  nearest = s.nearest;
  if (gather) {
    in.list = list;
    in.count = static_cast<int>(at.count);
  }

  // Digit by digit over (distance, token), which no two candidates share.
  int bits = 32 - __clz(static_cast<int>(s.farthest - nearest)) + token_bits;
  uint64_t prefix = 0;
  while (at.count > 1 && bits > 0) {
    const int shift = max(bits - kBinBits, 0);
    const uint32_t mask = (1u << (bits - shift)) - 1;
    Bin bins = histogram(s, in, [&](const Candidate& c) {
      if (c.bin != bin) return -1;
      uint64_t place =
          uint64_t{c.distance - nearest} << token_bits | static_cast<uint32_t>(c.token);
      if (place >> bits != prefix) return -1;
      return static_cast<int>(static_cast<uint32_t>(place >> shift) & mask);
    });
    pick(s, bins, by_count, goal);
    at = s.picked;
    through += at.weight_before;
    goal -= by_count ? at.before : at.weight_before;
    prefix = prefix << (bits - shift) | s.picked_bin;
    bits = shift;
  }
  return {at.token, through + at.weight};
}

__device__ inline int by_bin(const Candidate& c) { return static_cast<int>(c.bin); }

}  // namespace qwen_moe::cuda
