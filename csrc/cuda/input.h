// What meets a weight on the device: x / 64 in fp16. Three bits more than bf16 has, weights that
// are widened with fewer instructions (stream.cuh), and room up to 4 million; what is larger still
// is taken as that, and what is not a number stays so.
#pragma once

#include <cuda_fp16.h>

namespace qwen_moe::cuda {

using Input = __half;
inline constexpr float kInputScale = 64.0f;  // products are multiplied by it

__host__ __device__ __forceinline__ Input input_of(float x) {
  constexpr float kMost = 65504.0f;
  x *= 1.0f / kInputScale;
  x = x > kMost ? kMost : x;
  x = x < -kMost ? -kMost : x;
  return __float2half_rn(x);
}
__host__ __device__ __forceinline__ float from_input(Input x) {
  return kInputScale * __half2float(x);
}

}  // namespace qwen_moe::cuda
