// RMSNorm in front of a projection: by a kernel of its own for many rows, in the projection for
// few, with the same sums in the same order.
#pragma once

#include "cuda/dense.h"

namespace qwen_moe::cuda {

inline constexpr int kNormVectors = 4;  // float4s of a row that one thread holds: k <= 4096

// Sum of squares of a thread's part of a row, in the order that every kernel shares.
__device__ __forceinline__ float squares(float sum, const float4& x) {
  return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}
__device__ __forceinline__ float rms_scale(const float* warp_sums, float inverse_k, float eps) {
  float sum = warp_sums[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += warp_sums[w];
  return rsqrtf(fmaf(sum, inverse_k, eps));
}
__device__ __forceinline__ uint2 normed_values(const float4& x, float scale, const float4& w) {
  return {pack_bf16(x.x * scale * w.x, x.y * scale * w.y),
          pack_bf16(x.z * scale * w.z, x.w * scale * w.w)};
}

// One block per row: what the projection kernel does itself for a few rows.
static __global__ __launch_bounds__(kThreads) void norm_rows(bf16* out, const float* hidden,
                                                             const float* norm, int k,
                                                             float inverse_k, float eps) {
  __shared__ float warp_sums[kWarps];
  int thread = static_cast<int>(threadIdx.x);
  int64_t row = static_cast<int64_t>(blockIdx.x) * k;
  float4 weight[kNormVectors], x[kNormVectors];
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (int at = v * 4 * kThreads + thread * 4; at < k)
      weight[v] = *reinterpret_cast<const float4*>(norm + at);
  wait_for_predecessor();
  launch_dependents();
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (int at = v * 4 * kThreads + thread * 4; at < k) {
      x[v] = load_cg(reinterpret_cast<const float4*>(hidden + row + at));
      sum = squares(sum, x[v]);
    }
  sum = warp_sum(sum);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  __syncthreads();
  float scale = rms_scale(warp_sums, inverse_k, eps);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (int at = v * 4 * kThreads + thread * 4; at < k)
      *reinterpret_cast<uint2*>(out + row + at) = normed_values(x[v], scale, weight[v]);
}

// RMSNorm of up to kRows rows by the whole block; their loads hide each other's latency.
template <int kRows, int kVectors>
__device__ __forceinline__ void norm_block(std::byte* to, int pitch, const ProjectArgs& args,
                                           int block, int first, int rows,
                                           const float4 (&weight)[kNormVectors]) {
  __shared__ float warp_sums[kRows][kWarps];
  int thread = static_cast<int>(threadIdx.x);
  float4 x[kRows][kVectors];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float* from = args.hidden + static_cast<int64_t>(first + r) * args.k + thread * 4;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (r < rows && v * 4 * kThreads + thread * 4 < args.k)
        x[r][v] = load_cg(reinterpret_cast<const float4*>(from + v * 4 * kThreads));
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (r < rows && v * 4 * kThreads + thread * 4 < args.k) sum = squares(sum, x[r][v]);
    sum = warp_sum(sum);
    if (thread % 32 == 0) warp_sums[r][thread / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    float scale = rms_scale(warp_sums[r], args.inverse_k, args.eps);
    bool write = args.normed != nullptr && block == (first + r) % static_cast<int>(gridDim.x);
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (int at = v * 4 * kThreads + thread * 4; at < args.k) {
        uint2 values = normed_values(x[r][v], scale, weight[v]);
        *reinterpret_cast<uint2*>(to + r * pitch + at * 2) = values;
        if (write)
          *reinterpret_cast<uint2*>(args.normed + static_cast<int64_t>(first + r) * args.k + at) =
              values;
      }
  }
}

}  // namespace qwen_moe::cuda
