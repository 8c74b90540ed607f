// Device-side building blocks shared by the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/input.h"

namespace qwen_moe::cuda {

using bf16 = __nv_bfloat16;

// Programmatic dependent launch. Every kernel launched through `launch` below calls wait() once in
// every thread, before it touches anything that an earlier kernel of the layer writes and before it
// writes anything; what comes before it (weights, tables, state of earlier steps) overlaps the
// kernel before. launch_dependents() lets the next kernel start: mostly called after wait(), so
// that when kernel n + 1 starts, kernel n - 1 is complete and may be read before wait(). Of one
// row most kernels call it before wait(), since the start of the next takes longer than their
// products: those behind them read before wait() nothing that is made in the same layer.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What an earlier kernel wrote is read with these: never through the read-only path, and past L1,
// so that nothing stale is met.
__device__ __forceinline__ float4 load_cg(const float4* p) { return __ldcg(p); }
__device__ __forceinline__ float load_cg(const float* p) { return __ldcg(p); }
__device__ __forceinline__ uint4 load_cg(const uint4* p) { return __ldcg(p); }
__device__ __forceinline__ int load_cg(const int* p) { return __ldcg(p); }

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The address as a value that the compiler cannot work out again: left to itself it does so in
// every round of a loop, with a slow read of the block's place in its cluster. All lanes of a warp.
__device__ __forceinline__ uint32_t held_address(const void* shared) {
  return __shfl_sync(0xffffffffu, shared_address(shared), static_cast<int>(threadIdx.x % 32));
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}

// 16 bytes from global to shared memory, past L1.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  copy_async_16(shared_address(shared), global);
}
__device__ __forceinline__ void copy_async_16_if(bool copy, uint32_t to, const void* global) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
          to),
      "l"(global), "r"(static_cast<int>(copy))
      : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Weights into registers, past L1: no block reads them again. Asked for here, not where they are
// used.
__device__ __forceinline__ uint4 load_weights(const void* global) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global));
  return x;
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// A barrier for `threads` threads of a block; 0 is that of __syncthreads.
__device__ __forceinline__ void group_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], bf16 in, f32 out. With q = lane / 4 and t = lane % 4: a holds
// rows (q, q + 8, q, q + 8) at k pairs (2t, 2t, 2t + 8, 2t + 8), b column q at k pairs (2t, 2t +
// 8), d rows (q, q, q + 8, q + 8) at columns (2t, 2t + 1, 2t, 2t + 1).
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with fp16 in.
__device__ __forceinline__ void mma_half_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t pack_inputs(float low, float high) {
  __half2 pair = __halves2half2(input_of(low), input_of(high));
  return *reinterpret_cast<uint32_t*>(&pair);
}

// Butterfly sums and maxima over a warp: the same order in every lane and every launch.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// By the fast division, which is 0 where the divisor is as large as floats get.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// log(1 + e^x), linear where e^x would overflow or swallow the 1.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

}  // namespace qwen_moe::cuda
