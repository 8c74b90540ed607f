// Every operation rounds as in cpu/pack.cpp and comes in the same order, so that a matrix packed
// here and one packed there are the same bytes.
#include "cuda/pack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kMaxGroup = 128;
constexpr int kScales = 8;  // tried for a group of int4
constexpr int kThreads = kTile * kScales;
constexpr int kVectorBytes = 64;

__device__ float value_of(float v) { return v; }
__device__ float value_of(__half v) { return __half2float(v); }
__device__ float value_of(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ uint16_t to_f16(float v) { return __half_as_ushort(__float2half_rn(v)); }

// Infinity reads as 65536, as on the host.
__device__ float from_f16(uint16_t half) {
  const float size = __fmul_rn(__uint_as_float((half & 0x7fffu) << 13), 0x1p112f);
  return half & 0x8000u ? -size : size;
}

struct Encoder {
  float scale, inverse, low, high;

  __device__ Encoder(uint16_t half, bool int4)
      : scale(from_f16(half)),
        inverse(scale == 0.0f ? 0.0f : 1.0f / scale),
        low(int4 ? -8.0f : -127.0f),
        high(int4 ? 7.0f : 127.0f) {}

  __device__ float code(float w) const {
    const float magic = 12582912.0f;  // rounds to the nearest integer, ties to even
    float code = __fsub_rn(__fadd_rn(__fmul_rn(w, inverse), magic), magic);
    code = code < low ? low : code;
    return code > high ? high : code;
  }
};

struct Shared {
  float values[kMaxGroup][kTile + 1];
  float errors[kScales][kTile];
  uint16_t tried[kScales][kTile];
  uint16_t scales[kTile];
};

// The scale of an int4 group; thread `which` of an output tries one.
__device__ uint16_t int4_scale(Shared& s, float peak, int group, int o, int which) {
  const float onto = which < 4 ? peak / -8.0f : fabsf(peak) / 7.0f;
  const float shrink[] = {1.0f, 0.95f, 0.9f, 0.82f};
  const uint16_t half = to_f16(__fmul_rn(onto, shrink[which % 4]));
  const Encoder encoder(half, true);
  float error = 0.0f;
  for (int i = 0; i < group; ++i) {
    const float w = s.values[i][o];
    const float miss = __fsub_rn(w, __fmul_rn(encoder.code(w), encoder.scale));
    error = __fadd_rn(error, __fmul_rn(miss, miss));
  }
  s.errors[which][o] = error;
  s.tried[which][o] = half;
  __syncthreads();
  uint16_t best = 0;
  float least = INFINITY;
  for (int c = 0; c < kScales; ++c) {
    if (s.errors[c][o] < least) {
      least = s.errors[c][o];
      best = s.tried[c][o];
    }
  }
  return best;
}

__device__ uint16_t int8_scale(float peak) {
  const float largest = fabsf(peak);
  const uint16_t half = to_f16(largest / 127.0f);
  return static_cast<uint16_t>(half + (largest > __fmul_rn(from_f16(half), 127.5f)));
}

struct Packing {
  int n, k, group, tiles;  // of one matrix
  int scale_bytes, tile_bytes;
  bool int4;
};

// One block a tile (x) and group of input features (y).
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack(std::byte* to, const T* rows, Packing p, int* bad) {
  __shared__ Shared s;
  const int thread = static_cast<int>(threadIdx.x), g = static_cast<int>(blockIdx.y);
  const int tile = static_cast<int>(blockIdx.x) % p.tiles;
  const int64_t matrix = static_cast<int>(blockIdx.x) / p.tiles;
  std::byte* out = to + static_cast<int64_t>(blockIdx.x) * p.tile_bytes;
  {
    const int row = tile * kTile + thread / kScales;
    const T* from = rows + (matrix * p.n + row) * p.k + g * p.group;
    bool finite = true;
    for (int i = thread % kScales; i < p.group; i += kScales) {
      const float w = row < p.n ? value_of(from[i]) : 0.0f;
      finite &= isfinite(w);
      s.values[i][thread / kScales] = w;
    }
    if (!finite) *bad = 1;
  }
  __syncthreads();
  {
    const int o = thread % kTile, which = thread / kTile;
    float peak = 0.0f;
    for (int i = 0; i < p.group; ++i)
      peak = fabsf(s.values[i][o]) > fabsf(peak) ? s.values[i][o] : peak;
    const uint16_t half = p.int4 ? int4_scale(s, peak, p.group, o, which) : int8_scale(peak);
    if (which == 0) {
      s.scales[o] = half;
      reinterpret_cast<uint16_t*>(out)[g * kTile + o] = half;
      if ((half & 0x7c00) == 0x7c00) *bad = 1;
    }
    // Zeros behind the last scale.
    const int at = p.k / p.group * kTile + thread;
    if (g == 0 && at < p.scale_bytes / 2) reinterpret_cast<uint16_t*>(out)[at] = 0;
  }
  __syncthreads();
  // Lane 2 * o + parity of every vector of 64 bytes.
  const int lane = thread % 32, o = lane / 2, parity = lane % 2;
  const Encoder encoder(s.scales[o], p.int4);
  const auto code = [&](int i) { return static_cast<int>(encoder.code(s.values[i][o])); };
  const int step = p.int4 ? 8 : 4;  // inputs of a vector
  std::byte* vectors = out + p.scale_bytes + g * (p.group / step) * kVectorBytes;
  for (int t = thread / 32; t < p.group / step; t += kThreads / 32) {
    int word = 0;
    if (p.int4) {
      for (int j = 0; j < 4; ++j) word |= (code(t * 8 + 2 * j + parity) + 8) << (4 * j);
    } else {
      word = (code(t * 4 + parity) & 0xff) | (code(t * 4 + 2 + parity) & 0xff) << 8;
    }
    reinterpret_cast<uint16_t*>(vectors + t * kVectorBytes)[lane] = static_cast<uint16_t>(word);
  }
}

struct Dense {
  int n, k, tiles;  // of one matrix
  int tile_bytes;
};

// One block a tile (x) and 128 input features (y), which it transposes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_dense(std::byte* to, const T* rows, Dense d, int* bad) {
  __shared__ uint16_t values[kMaxGroup][kTile + 2];
  const int thread = static_cast<int>(threadIdx.x),
            begin = static_cast<int>(blockIdx.y) * kMaxGroup;
  const int tile = static_cast<int>(blockIdx.x) % d.tiles;
  const int64_t matrix = static_cast<int>(blockIdx.x) / d.tiles;
  const int count = min(kMaxGroup, d.k - begin);
  const int row = tile * kTile + thread / kScales;
  const T* from = rows + (matrix * d.n + row) * d.k + begin;
  bool fits = true;
  for (int i = thread % kScales; i < count; i += kScales) {
    const uint32_t bits = __float_as_uint(row < d.n ? value_of(from[i]) : 0.0f);
    const uint32_t half = (bits + ((bits >> 16 & 1u) + 0x7fffu)) >> 16;  // of a finite value
    fits &= (bits & 0x7f800000u) != 0x7f800000u && (half & 0x7f80u) != 0x7f80u;
    values[i][thread / kScales] = static_cast<uint16_t>(half);
  }
  if (!fits) *bad = 1;
  __syncthreads();
  auto* out = reinterpret_cast<uint16_t*>(to + static_cast<int64_t>(blockIdx.x) * d.tile_bytes) +
              begin * kTile;
  for (int i = thread; i < count * kTile; i += kThreads) out[i] = values[i / kTile][i % kTile];
}

// Calls `launch` with the rows as what they are.
template <class Launch>
void with_type(const void* rows, DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::f32: return launch(static_cast<const float*>(rows));
    case DType::f16: return launch(static_cast<const __half*>(rows));
    default: return launch(static_cast<const __nv_bfloat16*>(rows));
  }
}

}  // namespace

bool packs_on_device(const WeightSpec& spec, DType dtype) {
  return (is_quantized(spec.format) || spec.format == WeightFormat::bf16) && !spec.has_zero &&
         (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16);
}

void pack_on_device(std::byte* to, const WeightSpec& spec, const void* rows, DType dtype, int* bad,
                    cudaStream_t stream) {
  const bool dense = spec.format == WeightFormat::bf16;
  require(packs_on_device(spec, dtype) &&
              (dense || (spec.group <= kMaxGroup && spec.k % spec.group == 0)),
          "weights of dtype ", dtype_name(dtype), " in groups of ", spec.group,
          " are not packed on a GPU");
  const int tile_bytes = static_cast<int>(spec.tile_bytes());
  const int inputs = dense ? kMaxGroup : spec.group;  // of a block
  const dim3 blocks(static_cast<unsigned>(spec.tiles() * spec.count),
                    static_cast<unsigned>((spec.k + inputs - 1) / inputs));
  if (dense) {
    const Dense d{.n = spec.n, .k = spec.k, .tiles = spec.tiles(), .tile_bytes = tile_bytes};
    with_type(rows, dtype, [&](const auto* from) {
      pack_dense<<<blocks, kThreads, 0, stream>>>(to, from, d, bad);
    });
  } else {
    const Packing p{.n = spec.n,
                    .k = spec.k,
                    .group = spec.group,
                    .tiles = spec.tiles(),
                    .scale_bytes = static_cast<int>(spec.scale_bytes()),
                    .tile_bytes = tile_bytes,
                    .int4 = spec.format == WeightFormat::int4};
    with_type(rows, dtype,
              [&](const auto* from) { pack<<<blocks, kThreads, 0, stream>>>(to, from, p, bad); });
  }
  QWEN_MOE_CUDA(cudaGetLastError());
}

}  // namespace qwen_moe::cuda
