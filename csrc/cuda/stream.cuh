// Streaming weight tiles through the tensor cores, for 1 to 32 activation rows.
//
// A block's warps split the inputs k of a tile; each warp streams its own slice of every tile
// through a ring in shared memory that only it reads and writes, so the copies need no barrier and
// run far ahead: before the kernel's predecessor has ended, and across the block's barriers.
// A chunk is up to 2048 bytes of codes of one tile, with their scales.
//
// The sum of an output runs over the steps of a group on the tensor core (fp32), then over the
// groups of a slice, then over the slices: the same order for any number of rows.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tile.cuh"
#include "model/weights.h"

namespace qwen_moe::cuda {

inline constexpr int kSlices = 8;               // warps that share a tile's inputs
inline constexpr int kChunkBytes = 2048;        // codes of a chunk
inline constexpr int kStageBytes = 2048 + 128;  // and the scales of at most 4 groups
inline constexpr int kPartialPitch = 20;        // floats of a row of 16 outputs; free of conflicts

// A packed matrix as the kernels see it.
struct Matrix {
  const std::byte* data = nullptr;
  WeightFormat format = WeightFormat::bf16;
  int n = 0, k = 0, group = 0;
  int tiles = 0;
  int scale_bytes = 0;  // of a tile
  int64_t tile_bytes = 0;

  Matrix() = default;
  explicit Matrix(const WeightView& view)
      : data(view.data),
        format(view.spec.format),
        n(view.spec.n),
        k(view.spec.k),
        group(view.spec.group),
        tiles(view.spec.tiles()),
        scale_bytes(static_cast<int>(view.spec.scale_bytes())),
        tile_bytes(static_cast<int64_t>(view.spec.tile_bytes())) {}
};

// Bytes between activation rows in shared memory: 8 lanes that read 16 bytes each of two
// neighbouring rows meet no bank twice.
__host__ __device__ constexpr int activation_pitch(int k) { return k * 2 + 64; }

// Units [begin, end) of slice w of `slices`: whole groups of 128 inputs (64 where 128 does not
// divide k), shared out evenly.
struct UnitRange {
  int begin, end;
};
__device__ __forceinline__ UnitRange slice_units(int k, int w, int slices) {
  int per = k % 128 == 0 ? 2 : 1, blocks = k / kUnit / per;
  return {w * blocks / slices * per, (w + 1) * blocks / slices * per};
}

__device__ __forceinline__ int chunk_units(WeightFormat format) {
  return kChunkBytes / unit_bytes(format);
}

// Starts copying `units` units of a tile from unit `first` on; all lanes of a warp.
__device__ __forceinline__ void copy_chunk(std::byte* stage, const Matrix& m, const std::byte* tile,
                                           int first, int units, int lane) {
  int each = unit_bytes(m.format), bytes = units * each;
  const std::byte* codes = tile + m.scale_bytes + static_cast<int64_t>(first) * each;
#pragma unroll
  for (int i = 0; i < kChunkBytes / 512; ++i) {
    int at = i * 512 + lane * 16;
    if (at < bytes) copy_async_16(stage + at, codes + at);
  }
  if (m.group != 0) {
    int scale_bytes = units * kUnit / m.group * 32;
    const std::byte* scales = tile + first * kUnit / m.group * 32;
    if (lane * 16 < scale_bytes) copy_async_16(stage + kChunkBytes + lane * 16, scales + lane * 16);
  }
}

// Four bf16 pairs of one step from a word of eight int4 codes: 128 + code is exact in bf16.
__device__ __forceinline__ void widen_int4(uint32_t (&a)[4], uint32_t word) {
  const uint32_t bias = 0x43084308;  // 136 = 128 + 8
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    uint32_t biased;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(biased) : "r"(word >> (4 * p)));
    __nv_bfloat162 difference = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&biased),
                                        *reinterpret_cast<const __nv_bfloat162*>(&bias));
    a[p] = *reinterpret_cast<uint32_t*>(&difference);
  }
}

// Two bf16 pairs from a word of four codes + 128: 2^23 + code is exact in fp32, and an integer of 8
// bits is exact in the upper half of an fp32.
__device__ __forceinline__ void widen_int8(uint32_t& first, uint32_t& second, uint32_t word) {
  const uint32_t magic = 0x4b000000;
  float f[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    f[i] = __uint_as_float(__byte_perm(word, magic, 0x7650 + i)) - 8388736.0f;
  first = __byte_perm(__float_as_uint(f[0]), __float_as_uint(f[1]), 0x7632);
  second = __byte_perm(__float_as_uint(f[2]), __float_as_uint(f[3]), 0x7632);
}

// The four A fragments of a unit.
template <WeightFormat kFormat>
__device__ __forceinline__ void widen_unit(uint32_t (&a)[4][4], const std::byte* codes, int lane) {
  const auto* vectors = reinterpret_cast<const uint4*>(codes);
  if constexpr (kFormat == WeightFormat::int4) {
    uint4 words = vectors[lane];
    widen_int4(a[0], words.x);
    widen_int4(a[1], words.y);
    widen_int4(a[2], words.z);
    widen_int4(a[3], words.w);
  } else if constexpr (kFormat == WeightFormat::int8) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint4 words = vectors[j * 32 + lane];
      widen_int8(a[2 * j][0], a[2 * j][1], words.x);
      widen_int8(a[2 * j][2], a[2 * j][3], words.y);
      widen_int8(a[2 * j + 1][0], a[2 * j + 1][1], words.z);
      widen_int8(a[2 * j + 1][2], a[2 * j + 1][3], words.w);
    }
  } else {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint4 words = vectors[s * 32 + lane];
      a[s][0] = words.x;
      a[s][1] = words.y;
      a[s][2] = words.z;
      a[s][3] = words.w;
    }
  }
}

// Sums of one tile slice for 8 * kTiles rows, in mma's accumulator order.
template <int kTiles>
struct TileSum {
  float group[kTiles][4];  // of the running group
  float total[kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) group[i][j] = total[i][j] = 0.0f;
  }

  // Adds a chunk. `rows_of(tile, unit, half)` gives the lane's 8 activations of row tile `tile`,
  // inputs 64 unit + 32 half + 8 (lane % 4) on, as four words; zeros for rows beyond the last.
  template <class RowsOf>
  __device__ __forceinline__ void add(const Matrix& m, const std::byte* stage, int first, int units,
                                      int lane, const RowsOf& rows_of) {
    if (m.format == WeightFormat::int4)
      add_as<WeightFormat::int4>(m, stage, first, units, lane, rows_of);
    else if (m.format == WeightFormat::int8)
      add_as<WeightFormat::int8>(m, stage, first, units, lane, rows_of);
    else
      add_as<WeightFormat::bf16>(m, stage, first, units, lane, rows_of);
  }

  template <WeightFormat kFormat, class RowsOf>
  __device__ __forceinline__ void add_as(const Matrix& m, const std::byte* stage, int first,
                                         int units, int lane, const RowsOf& rows_of) {
#pragma unroll
    for (int u = 0; u < kChunkBytes / unit_bytes(kFormat); ++u) {
      if (u >= units) break;
      uint32_t a[4][4];
      widen_unit<kFormat>(a, stage + u * unit_bytes(kFormat), lane);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          uint4 b = rows_of(i, first + u, j);
          mma_16x8x16(group[i], a[2 * j], b.x, b.y);
          mma_16x8x16(group[i], a[2 * j + 1], b.z, b.w);
        }
      if constexpr (kFormat != WeightFormat::bf16)
        if ((u + 1) * kUnit % m.group == 0)
          end_group(stage + kChunkBytes + ((u + 1) * kUnit / m.group - 1) * 32, lane);
    }
  }

  __device__ __forceinline__ void end_group(const std::byte* scales, int lane) {
    float low = __half2float(reinterpret_cast<const __half*>(scales)[lane / 4]);
    float high = __half2float(reinterpret_cast<const __half*>(scales)[lane / 4 + 8]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        total[i][j] = __fadd_rn(total[i][j], __fmul_rn(j < 2 ? low : high, group[i][j]));
        group[i][j] = 0.0f;
      }
  }

  // What the slice adds up to; dense formats have one group without a scale.
  __device__ __forceinline__ float result(const Matrix& m, int i, int j) const {
    return m.group == 0 ? group[i][j] : total[i][j];
  }

  // Writes the rows below `rows` to to[row * kPartialPitch + output].
  __device__ __forceinline__ void store(const Matrix& m, float* to, int rows, int lane) const {
    int q = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int row = 8 * i + 2 * t + j % 2;
        if (row < rows) to[row * kPartialPitch + q + j / 2 * 8] = result(m, i, j);
      }
  }
};

// The sum of the slices, in order. `partial` is [slices][rows][kPartialPitch].
__device__ __forceinline__ float sum_slices(const float* partial, int rows, int row, int output) {
  float sum = partial[row * kPartialPitch + output];
#pragma unroll
  for (int w = 1; w < kSlices; ++w)
    sum = __fadd_rn(sum, partial[(w * rows + row) * kPartialPitch + output]);
  return sum;
}

}  // namespace qwen_moe::cuda
