// The second kernel of decode attention: merges the splits of every head.
#pragma once

#include <algorithm>

#include "cuda/attention_splits.cuh"

namespace qwen_moe::cuda {

constexpr int kSplitsAtOnce = 8;  // a chunk: they are added up together
constexpr int kQuads = kHeadDim / 4;

// A thread of combine has four dimensions. kGroups groups of threads share the chunks of a head,
// and where one head would have more threads than a block, kParts blocks share its dimensions.
template <int kGroups>
struct Merge {
  static constexpr int kParts = std::max(kQuads * kGroups / kThreads, 1);
  static constexpr int kHeads = std::max(kThreads / (kQuads * kGroups), 1);  // of a block
  static constexpr int kWidth = kQuads / kParts;                             // threads of a group
};

// Merges the splits of a row's head, divides, and gates: chunks of splits in order, each added up
// in order.
template <int kGroups>
__global__ void __launch_bounds__(kThreads) combine(const StepParams p) {
  using M = Merge<kGroups>;
  __shared__ float weight[M::kHeads][kMaxSplits];
  __shared__ float4
      sums[kGroups == 1 ? 1 : kMaxSplits / kSplitsAtOnce][M::kWidth];  // of the chunks
  const int thread = threadIdx.x, lane = thread % 32, block = static_cast<int>(blockIdx.x);
  const int mine = thread / (M::kWidth * kGroups), group = thread / M::kWidth % kGroups;
  const int at = thread % M::kWidth, quad = block % M::kParts * M::kWidth + at;
  const int pair = block / M::kParts * M::kHeads + mine, row = pair / p.heads;
  const int head = pair % p.heads, slot = row < p.rows ? load_cg(p.slot + row) : 0;
  const int splits = slot == 0 ? 0 : Splits(load_cg(p.position + row) + 1).count;
  if (p.rows == 1) launch_dependents();
  wait_for_predecessor();
  if (p.rows > 1) launch_dependents();

  float4 part[kSplitsAtOnce];
  auto load_chunk = [&](int first) {
#pragma unroll
    for (int j = 0; j < kSplitsAtOnce; ++j)
      if (first + j < splits)
        part[j] = load_cg(reinterpret_cast<const float4*>(p.split(row, head, first + j)) + quad);
  };
  if (thread % (M::kWidth * kGroups) < 32) {  // a lane weighs splits lane, lane + 32 and so on
    float2 of[kMaxSplits / 32];
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      of[i] = {-INFINITY, 0};
      if (32 * i + lane < splits)
        of[i] =
            __ldcg(reinterpret_cast<const float2*>(p.split(row, head, 32 * i + lane) + kHeadDim));
    }
    load_chunk(group * kSplitsAtOnce);
    float highest = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) highest = fmaxf(highest, of[i].x);
    highest = warp_max(highest);
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      of[i].x = __expf(of[i].x - highest);
      total = fmaf(of[i].x, of[i].y, total);
    }
    const float scale = __fdividef(1.0f, warp_sum(total));
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i)
      if (32 * i < splits) weight[mine][32 * i + lane] = of[i].x * scale;
  } else {
    load_chunk(group * kSplitsAtOnce);
  }
  float4 gate{}, sum{};
  if (group == 0 && slot != 0)
    gate = load_cg(reinterpret_cast<const float4*>(p.proj + row * p.proj_stride +
                                                   static_cast<int64_t>(2 * head + 1) * kHeadDim) +
                   quad);
  __syncthreads();

  auto add_scaled = [](float4& to, float scale, float4 x) {
    to = {fmaf(scale, x.x, to.x), fmaf(scale, x.y, to.y), fmaf(scale, x.z, to.z),
          fmaf(scale, x.w, to.w)};
  };
#pragma unroll 1
  for (int first = group * kSplitsAtOnce; first < splits; first += kGroups * kSplitsAtOnce) {
    if (first > group * kSplitsAtOnce) load_chunk(first);
    float4 of_chunk{};
#pragma unroll
    for (int j = 0; j < kSplitsAtOnce; ++j)
      if (first + j < splits) add_scaled(of_chunk, weight[mine][first + j], part[j]);
    if constexpr (kGroups == 1)
      add_scaled(sum, 1.0f, of_chunk);
    else
      sums[first / kSplitsAtOnce][at] = of_chunk;
  }
  if constexpr (kGroups > 1) {
    __syncthreads();
    if (group > 0) return;
#pragma unroll 4
    for (int first = 0; first < splits; first += kSplitsAtOnce)
      add_scaled(sum, 1.0f, sums[first / kSplitsAtOnce][at]);
  }
  if (row >= p.rows) return;
  uint2 out{pack_inputs(sum.x * sigmoid(gate.x), sum.y * sigmoid(gate.y)),
            pack_inputs(sum.z * sigmoid(gate.z), sum.w * sigmoid(gate.w))};
  reinterpret_cast<uint2*>(p.core + row * p.core_stride + head * kHeadDim)[quad] = out;
}

}  // namespace qwen_moe::cuda
