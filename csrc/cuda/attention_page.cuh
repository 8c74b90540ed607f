// What a block of decode attention does in its shared memory: it norms and rotates heads before the
// first page, then takes scores, weights and values of one page at a time.
#pragma once

#include <cmath>

#include "cuda/device.cuh"
#include "model/ops.h"

namespace qwen_moe::cuda {

constexpr int kHeadDim = 256;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 8;                // query heads that one mma takes
constexpr int kRow = kHeadDim + 8;      // bf16 of a shared row; 16 bytes more than a multiple of
constexpr int kPRow = kPageTokens + 8;  // 128, so that the 8 rows of an ldmatrix meet all banks
constexpr int kScoreRow = kPageTokens + 4;  // floats; 4 modulo 16, for the same reason
constexpr float kScale = 0.0625f;           // 1 / sqrt(kHeadDim)

template <int kTiles>
struct alignas(16) AttentionShared {
  struct Softmax {
    float score[2][kTile][kScoreRow];  // of the two halves of the warps
    alignas(16) bf16 p[kTiles * kTile][kPRow];
    float shrink[kTiles * kTile];
  };
  bf16 keys[kPageTokens][kRow];
  bf16 values[kPageTokens][kRow];
  alignas(16) bf16 query[kTiles * kTile][kRow];
  union alignas(16) {
    float normed[kWarps][kHeadDim];  // only before the first page
    Softmax softmax;
  };
  alignas(16) bf16 new_key[kHeadDim];
  alignas(16) bf16 new_value[kHeadDim];
  float cos[kHeadDim / 2], sin[kHeadDim / 2];
};

// Four 8 x 8 matrices of bf16; lane l names row l % 8 of matrix l / 8. Of each a lane gets the pair
// (row lane / 4, columns 2 (lane % 4) and the next), with kTranspose of the transposed matrix.
template <bool kTranspose = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const bf16* row) {
  auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

// Begins to load the first `tokens` tokens of a page. With kClear the rows after the one that
// follows become zero (that one is the token of this step): they count with weight 0, and what lies
// in memory there may be NaN.
template <bool kClear>
__device__ __forceinline__ void load_page(bf16 (&tile)[kPageTokens][kRow], const bf16* page,
                                          int tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int token = warp; token < kPageTokens; token += kWarps) {
    if (token < tokens)
      copy_async_16(&tile[token][lane * 8], page + token * kHeadDim + lane * 8);
    else if (kClear && token > tokens)
      *reinterpret_cast<uint4*>(&tile[token][lane * 8]) = uint4{};
  }
  copy_async_commit();
}

// A lane's share of a head: dimensions 4 lane .. 4 lane + 3 and those 128 further.
struct HeadPart {
  float4 x[2];
  __device__ __forceinline__ void load(const float* head) {
    const int lane = threadIdx.x % 32;
    x[0] = load_cg(reinterpret_cast<const float4*>(head) + lane);
    x[1] = load_cg(reinterpret_cast<const float4*>(head) + 32 + lane);
  }
  __device__ __forceinline__ void store_bf16(bf16* head) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      reinterpret_cast<uint2*>(head)[32 * i + lane] = {pack_bf16(x[i].x, x[i].y),
                                                       pack_bf16(x[i].z, x[i].w)};
  }
};

// RMSNorm, then RoPE on the halves of the first 2 * half dimensions. One warp, one head; `normed`
// is the warp's own scratch.
__device__ __forceinline__ void norm_and_rotate(HeadPart& head, const HeadPart& weight, float eps,
                                                int half, const float* cos, const float* sin,
                                                float* normed) {
  const int lane = threadIdx.x % 32;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    squares += head.x[i].x * head.x[i].x + head.x[i].y * head.x[i].y + head.x[i].z * head.x[i].z +
               head.x[i].w * head.x[i].w;
  const float factor = 1.0f / sqrtf(warp_sum(squares) / kHeadDim + eps);
  __syncwarp();  // the head before has been read
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float4 x = head.x[i], w = weight.x[i];
    head.x[i] = {x.x * factor * w.x, x.y * factor * w.y, x.z * factor * w.z, x.w * factor * w.w};
    reinterpret_cast<float4*>(normed)[32 * i + lane] = head.x[i];
  }
  __syncwarp();
  auto rotate = [&](float& x, int d) {
    if (d < half)
      x = x * cos[d] - normed[d + half] * sin[d];
    else if (d < 2 * half)
      x = x * cos[d - half] + normed[d - half] * sin[d - half];
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int d = 128 * i + 4 * lane;
    rotate(head.x[i].x, d);
    rotate(head.x[i].y, d + 1);
    rotate(head.x[i].z, d + 2);
    rotate(head.x[i].w, d + 3);
  }
}

// Scores [token, head] = K Q^T of a page. Warp w has tokens 16 (w % 4) and on; w / 4 is the tile of
// heads, or when there is one tile, the half of the dimensions.
template <int kTiles>
__device__ __forceinline__ void score_page(AttentionShared<kTiles>& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int part = warp / 4, tile = kTiles == 1 ? 0 : part, token = warp % 4 * 16;
  const int first = kTiles == 1 ? part * (kHeadDim / 2) : 0;
  constexpr int kCount = kTiles == 1 ? kHeadDim / 2 : kHeadDim;
  const bf16* a_row = &s.keys[token + lane % 16][first + lane / 16 * 8];
  const bf16* b_row = &s.query[tile * kTile + lane % 8][first + lane / 8 * 8];
  float even[4] = {}, odd[4] = {};  // two chains, to wait less for each mma
#pragma unroll
  for (int d = 0; d < kCount; d += 32) {
    uint32_t a[4], b[4];
    load_matrices(b, b_row + d);
    load_matrices(a, a_row + d);
    mma_16x8x16(even, a, b[0], b[1]);
    load_matrices(a, a_row + d + 16);
    mma_16x8x16(odd, a, b[2], b[3]);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    s.softmax.score[part][2 * t + e % 2][token + q + e / 2 * 8] = even[e] + odd[e];
}

// Turns the scores of the first `seen` tokens of a page into weights p, those of the others into 0.
// Warp w has heads w and w + 8, whose running maximum and sum of p it keeps.
template <int kTiles>
__device__ __forceinline__ void softmax_page(AttentionShared<kTiles>& s, int seen,
                                             float (&top)[kTiles], float (&sum)[kTiles]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {  // a lane has tokens 2 lane and 2 lane + 1
    auto score = [&](int part) {
      return *reinterpret_cast<const float2*>(&s.softmax.score[part][warp][2 * lane]);
    };
    float2 x = score(n);
    if constexpr (kTiles == 1) {
      float2 rest = score(1);
      x = {x.x + rest.x, x.y + rest.y};
    }
    if (2 * lane >= seen) x.x = -INFINITY;  // whatever K holds there, NaN included
    if (2 * lane + 1 >= seen) x.y = -INFINITY;
    const float higher = fmaxf(top[n], warp_max(fmaxf(x.x, x.y)));
    const float shrink = __expf(top[n] - higher);
    x = {__expf(x.x - higher), __expf(x.y - higher)};
    sum[n] = sum[n] * shrink + warp_sum(x.x + x.y);
    top[n] = higher;
    *reinterpret_cast<uint32_t*>(&s.softmax.p[n * kTile + warp][2 * lane]) = pack_bf16(x.x, x.y);
    if (lane == 0) s.softmax.shrink[n * kTile + warp] = shrink;
  }
}

// out [dimension, head] = out * shrink + V^T P. Warp w has dimensions 32 w .. 32 w + 31.
template <int kTiles>
__device__ __forceinline__ void add_values(const AttentionShared<kTiles>& s,
                                           float (&out)[2][kTiles][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float shrink = s.softmax.shrink[n * kTile + 2 * t + e % 2];
      out[0][n][e] *= shrink;
      out[1][n][e] *= shrink;
    }
  }
#pragma unroll
  for (int token = 0; token < kPageTokens; token += 32) {
    uint32_t b[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      load_matrices(b[n], &s.softmax.p[n * kTile + lane % 8][token + lane / 8 * 8]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t a[4];
        load_matrices<true>(a, &s.values[token + k * 16 + lane % 8 + lane / 16 * 8]
                                        [warp * 32 + m * 16 + lane / 8 % 2 * 8]);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) mma_16x8x16(out[m][n], a, b[n][2 * k], b[n][2 * k + 1]);
      }
    }
  }
}

}  // namespace qwen_moe::cuda
