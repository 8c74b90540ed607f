// RMSNorm taken apart, so that no phase waits for a row's norm before it begins its products.
//
// W (w * x / rms(x)) = (W (w * x)) / rms(x). The phase that makes a value x of the residual stream
// leaves w * x, rounded to fp16 once like any input of a projection, and the squares of every 16
// values summed; the projection behind it multiplies its sums by 1 / rms(x), which it needs last.
#pragma once

#include "cuda/dense.h"

namespace qwen_moe::cuda {

// All 16 lanes that hold the values of one row from a multiple of 16 on, n = 16 i + lane % 16.
__device__ __forceinline__ void weigh_value(const Weighed& to, int row, int k, int n, float x,
                                            float norm) {
  unsigned lanes = 0xffffu << (threadIdx.x & 16u);
  to.rows[static_cast<int64_t>(row) * k + n] = input_of(__fmul_rn(x, norm));
  float sum = __fmul_rn(x, x);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2)
    sum = __fadd_rn(sum, __shfl_xor_sync(lanes, sum, offset));
  if (n % 16 == 0) to.squares[row * (k / 16) + n / 16] = sum;
}

// 1 / rms of a row, in two halves: what is asked for early, and what waits for it. One warp.
struct RowSquares {
  float sum = 0;

  // `squares` is the row's, [k / 16].
  __device__ __forceinline__ void load(const float* squares, int k, int lane) {
    constexpr int kLoads = kMostSquares / 128;
    float4 of[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int at = i * 32 + lane;
      of[i] = at < k / 64 ? load_cg(reinterpret_cast<const float4*>(squares) + at) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(of[i].x, of[i].y), __fadd_rn(of[i].z, of[i].w)));
  }
  __device__ __forceinline__ float scale(float inverse_k, float eps) const {
    return rsqrtf(fmaf(warp_sum(sum), inverse_k, eps));
  }
};

}  // namespace qwen_moe::cuda
