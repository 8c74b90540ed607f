// How fast one row times int4 tiles (cuda/tile.cuh, group 128) streams: alone from cold memory by
// ring depth and blocks per multiprocessor, what the parts of the work cost, and in chains of
// dependent ones with the weights asked for before or after the wait.
//   nvcc -std=c++20 -O3 -arch=sm_90a -Icsrc benchmarks/bench_gpu_gemv.cu csrc/cuda/runtime.cpp
//   bench_gpu_gemv [--json FILE]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "cuda/tile.cuh"
#include "gpu_timing.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kReplays = 24;
constexpr int kK = 2048;  // inputs of every size measured
constexpr int kGroup = 128;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpK = kK / kWarps;
constexpr int kWarpUnits = kWarpK / kUnit;
constexpr int kWarpGroups = kWarpK / kGroup;
constexpr int kUnitBytes = unit_bytes(WeightFormat::int4);
constexpr int kTileScaleBytes = kK / kGroup * kTile * 2;
constexpr int kTileBytes = kTileScaleBytes + kK / kUnit * kUnitBytes;
constexpr int kWarpScaleBytes = kWarpGroups * kTile * 2;
constexpr int kStageBytes = kWarpUnits * kUnitBytes + kWarpScaleBytes;  // a warp's part of a tile
constexpr int kSlots = 8;                                               // tiles between reductions
constexpr int64_t kPoolTiles = 66000;                                   // 1.1 GB

static_assert(kWarpK % kGroup == 0 && kTileScaleBytes % 64 == 0);

// ---- kernels
// -------------------------------------------------------------------------------------

// What is done with the codes. full: code - 8 in bf16. folded: code + 128 goes in, and 136 times
// the sum of the activations comes off a group's result. raw: the words go in as they are. none: no
// tensor core work either, the words are only looked at.
enum class Work { full, folded, raw, none };
enum class X { registers, shared };

struct Gemv {
  const uint8_t* tiles = nullptr;  // [n_tiles][kTileBytes]
  const bf16* x = nullptr;         // [kK]
  bf16* y = nullptr;               // [n_tiles * kTile]
  int n_tiles = 0;
  bool before = false;  // the ring is filled before the wait
};

constexpr size_t gemv_shared_bytes(int depth, X x) {
  return static_cast<size_t>(kWarps * depth * kStageBytes + 2 * kSlots * kWarps * kTile * 4 +
                             (x == X::shared ? kK * 2 : 0));
}

// The four nibble pairs of a word as mma operands.
template <Work kWork>
__device__ __forceinline__ void operands(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    if constexpr (kWork == Work::raw) {
      a[p] = word;
      continue;
    }
    // 128 + code, exact in bf16. (word & mask) | bias; written in C it takes two instructions.
    uint32_t biased;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(biased)
        : "r"(word >> (4 * p)), "r"(0x000f000fu), "r"(0x43004300u));
    if constexpr (kWork == Work::full) {
      auto value = *reinterpret_cast<__nv_bfloat162*>(&biased);
      value = __hsub2(value, __float2bfloat162_rn(136.0f));
      biased = *reinterpret_cast<uint32_t*>(&value);
    }
    a[p] = biased;
  }
}

__device__ __forceinline__ uint32_t component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// y = W x for one row. A block takes whole tiles, its warps split the inputs; each warp streams its
// 2 KB of a tile and its scales through its own ring. A lane reads back the codes it copied itself;
// the scales are shared by the warp.
template <int kDepth, Work kWork, X kX>
__global__ void __launch_bounds__(kThreads, 2) gemv(Gemv g) {
  extern __shared__ __align__(16) uint8_t shared[];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  uint8_t* ring = shared + warp * kDepth * kStageBytes;
  // [2][kSlots][kWarps][kTile]: one half is summed up while the next is written
  auto* partial = reinterpret_cast<float*>(shared + kWarps * kDepth * kStageBytes);
  auto* shared_x = reinterpret_cast<uint4*>(partial + 2 * kSlots * kWarps * kTile);

  int count = (g.n_tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
              static_cast<int>(gridDim.x);
  auto tile_of = [&](int i) {
    return static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
  };
  auto issue = [&](int i, int slot) {
    if (i < count) {
      const uint8_t* tile = g.tiles + static_cast<int64_t>(tile_of(i)) * kTileBytes;
      uint8_t* stage = ring + slot * kStageBytes;
      const uint8_t* codes = tile + kTileScaleBytes + warp * kWarpUnits * kUnitBytes;
#pragma unroll
      for (int u = 0; u < kWarpUnits; ++u)
        copy_async_16(stage + u * kUnitBytes + lane * 16, codes + u * kUnitBytes + lane * 16);
      if (lane < kWarpScaleBytes / 16)
        copy_async_16(stage + kWarpUnits * kUnitBytes + lane * 16,
                      tile + warp * kWarpScaleBytes + lane * 16);
    }
    copy_async_commit();
  };

  auto wait = [] {
    wait_for_predecessor();
    launch_dependents();
  };
  if (!g.before) wait();
#pragma unroll
  for (int i = 0; i < kDepth; ++i) issue(i, i);
  if (g.before) wait();

  // One row: all 8 columns of the B operand hold the same activations, column 0 is used.
  const auto* x = reinterpret_cast<const uint4*>(g.x);
  uint4 mine[kX == X::registers ? kWarpK / 32 : 1];
  float sums[kWarpGroups] = {};
  if constexpr (kX == X::registers) {
#pragma unroll
    for (int j = 0; j < kWarpK / 32; ++j) mine[j] = load_cg(x + warp * (kWarpK / 8) + j * 4 + t);
    if constexpr (kWork == Work::folded) {
#pragma unroll
      for (int j = 0; j < kWarpK / 32; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t pair = component(mine[j], i);
          float2 two = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
          sums[j / (kGroup / 32)] += two.x + two.y;
        }
#pragma unroll
      for (float& sum : sums) {
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      }
    }
  } else {
    if (threadIdx.x < kK / 8) shared_x[threadIdx.x] = load_cg(x + threadIdx.x);
    __syncthreads();
  }

  int slot = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    copy_async_wait<kDepth - 1>();
    __syncwarp();
    const uint8_t* stage = ring + slot * kStageBytes;
    uint4 words[kWarpUnits];
#pragma unroll
    for (int u = 0; u < kWarpUnits; ++u)
      words[u] = *reinterpret_cast<const uint4*>(stage + u * kUnitBytes + lane * 16);
    const auto* stage_scales = reinterpret_cast<const __half*>(stage + kWarpUnits * kUnitBytes);
    float scales[kWarpGroups][2];
#pragma unroll
    for (int s = 0; s < kWarpGroups; ++s) {
      scales[s][0] = __half2float(stage_scales[s * kTile + q]);
      scales[s][1] = __half2float(stage_scales[s * kTile + q + 8]);
    }
    __syncwarp();  // all have read the scales before one of them asks for the next
    issue(i + kDepth, slot);
    slot = slot + 1 == kDepth ? 0 : slot + 1;

    float low = 0, high = 0;  // outputs q and q + 8, in the lanes with t == 0
    if constexpr (kWork == Work::none) {
      uint32_t bits = 0;
#pragma unroll
      for (int u = 0; u < kWarpUnits; ++u)
        bits ^= words[u].x ^ words[u].y ^ words[u].z ^ words[u].w;
      low = __uint_as_float(bits & 0x3fffffffu) * (scales[0][0] + scales[1][0]);
      high = scales[0][1] + scales[1][1];
    } else {
      // Four accumulators, because a chain of 16 products would end long after the last byte came.
      float d[kWarpGroups][2][4] = {};
#pragma unroll
      for (int u = 0; u < kGroup / kUnit; ++u)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int s = 0; s < kWarpGroups; ++s)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              int unit = s * (kGroup / kUnit) + u;
              uint4 b;
              if constexpr (kX == X::registers)
                b = mine[unit * 2 + j];
              else
                b = shared_x[warp * (kWarpK / 8) + (unit * 2 + j) * 4 + t];
              uint32_t a[4];
              operands<kWork>(component(words[unit], j * 2 + h), a);
              mma_16x8x16(d[s][j], a, component(b, h * 2), component(b, h * 2 + 1));
            }
#pragma unroll
      for (int s = 0; s < kWarpGroups; ++s) {
        low += scales[s][0] * (d[s][0][0] + d[s][1][0] - 136.0f * sums[s]);
        high += scales[s][1] * (d[s][0][2] + d[s][1][2] - 136.0f * sums[s]);
      }
    }
    float* half = partial + i / kSlots % 2 * kSlots * kWarps * kTile;
    if (t == 0 || kWork == Work::none) {
      float* to = half + (i % kSlots * kWarps + warp) * kTile;
      to[q] = low;
      to[q + 8] = high;
    }
    if (i % kSlots == kSlots - 1 || i == count - 1) {
      __syncthreads();
      int done = i / kSlots * kSlots + static_cast<int>(threadIdx.x) / kTile;
      if (threadIdx.x < kSlots * kTile && done <= i) {
        const float* from = half + threadIdx.x / kTile * kWarps * kTile + threadIdx.x % kTile;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += from[w * kTile];
        g.y[static_cast<int64_t>(tile_of(done)) * kTile + threadIdx.x % kTile] =
            __float2bfloat16(sum);
      }
    }
  }
}

// Predicated, not branched around, so that a run of them is issued back to back.
__device__ __forceinline__ uint4 load_if(const uint4* from, bool there) {
  uint4 v{0, 0, 0, 0};
  asm volatile(
      "{ .reg .pred q; setp.ne.s32 q, %5, 0; @q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, "
      "[%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return v;
}

// The ceiling: the same bytes, only read. With `before` all of it happens ahead of the wait.
template <int kUnroll>
__global__ void __launch_bounds__(1024, 1) plain_read(Gemv g) {
  const auto* data = reinterpret_cast<const uint4*>(g.tiles);
  size_t words = static_cast<size_t>(g.n_tiles) * kTileBytes / 16;
  auto wait = [] {
    wait_for_predecessor();
    launch_dependents();
  };
  unsigned bits = 0;
  if (!g.before) wait();
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t base = blockIdx.x * static_cast<size_t>(blockDim.x); base < words;
       base += kUnroll * stride) {
    size_t i = base + threadIdx.x;
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_if(data + i + u * stride, i + u * stride < words);
    // Last first: else the compiler uses each word as it comes and keeps only two loads in flight.
#pragma unroll
    for (int u = kUnroll - 1; u >= 0; --u) bits ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  if (g.before) wait();
  bits ^= __float_as_uint(load_cg(reinterpret_cast<const float*>(g.x)));
  if (bits == 0x9e3779b9u) g.y[0] = __float2bfloat16(1.0f);
}

// Random codes, and scales of 0.5 to 1.5 times 0.0046: products keep about the size of x, so that
// chains of any length neither die nor overflow.
__global__ void fill_tiles(uint32_t* pool, int64_t words) {
  int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < words;
       i += stride) {
    uint64_t h = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ull;  // splitmix64
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
    h ^= h >> 31;
    auto bits = static_cast<uint32_t>(h);
    if (i % (kTileBytes / 4) < kTileScaleBytes / 4) {
      auto scale = [](uint32_t r) { return __float2half(0.0046f * (0.5f + r * (1.0f / 65536))); };
      bits = static_cast<uint32_t>(__half_as_ushort(scale(bits & 0xffff))) |
             static_cast<uint32_t>(__half_as_ushort(scale(bits >> 16))) << 16;
    }
    pool[i] = bits;
  }
}

// ---- measuring
// -----------------------------------------------------------------------------------

using Kernel = void (*)(Gemv);

struct Form {
  std::string name;
  Kernel kernel;
  int threads;
  size_t shared_bytes;
};

template <int kDepth, Work kWork = Work::full, X kX = X::registers>
Form gemv_form(std::string name) {
  return {std::move(name), gemv<kDepth, kWork, kX>, kThreads, gemv_shared_bytes(kDepth, kX)};
}

struct Size {
  const char* name;
  int n;
  int chain;        // nodes of a long chain
  int graphs_of_3;  // so that together they read more than 200 MB
  int tiles() const { return n / kTile; }
  int64_t bytes() const { return static_cast<int64_t>(tiles()) * kTileBytes; }
};
constexpr Size kSizes[] = {
    {"n=4096", 4096, 96, 20}, {"n=12352", 12352, 72, 8}, {"n=248320", 248320, 12, 1}};

float bf16_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

class Bench {
 public:
  Bench()
      : properties(device_properties(0)),
        tiles_(static_cast<size_t>(kPoolTiles) * kTileBytes),
        x_(kK),
        y_(2 * kMaxN),
        host_x_(kK) {
    fill_tiles<<<properties.sms * 8, 512, 0, stream>>>(reinterpret_cast<uint32_t*>(tiles_.data()),
                                                       kPoolTiles * kTileBytes / 4);
    QWEN_MOE_CUDA(cudaGetLastError());
    // About normal, and rounded to bf16 by cutting off.
    uint64_t state = 88172645463325252ull;
    for (uint16_t& bits : host_x_) {
      float sum = -6;
      for (int i = 0; i < 12; ++i) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        sum += static_cast<float>(state >> 40) * (1.0f / (1 << 24));
      }
      uint32_t wide;
      std::memcpy(&wide, &sum, 4);
      bits = static_cast<uint16_t>(wide >> 16);
    }
    stream.synchronize();
    QWEN_MOE_CUDA(cudaMemcpy(x_.data(), host_x_.data(), kK * 2, cudaMemcpyHostToDevice));
  }

  struct Chain {
    bool programmatic = false;
    bool before = false;
    int per_sm = 1;
  };

  bool fits(const Form& form, int per_sm) const {
    if (form.shared_bytes > static_cast<size_t>(properties.shared_bytes)) return false;
    prepare(form);
    int blocks = 0;
    QWEN_MOE_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, form.kernel, form.threads,
                                                                form.shared_bytes));
    return blocks >= per_sm;
  }

  // Microseconds per node of a long chain in one graph; each node has its own cold weights and
  // reads what the one before wrote.
  double chain(const Form& form, const Size& size, Chain how) {
    CapturedChain graph = record(form, size, how, 0, size.chain);
    for (int i = 0; i < 2; ++i) graph.launch(stream);
    std::vector<float> times;
    for (int i = 0; i < kReplays; ++i) times.push_back(timed([&] { graph.launch(stream); }));
    return median(times) * 1e3 / size.chain;
  }

  // Microseconds of a whole graph of three, its start included.
  double three(const Form& form, const Size& size, Chain how) {
    std::vector<CapturedChain> graphs;
    for (int g = 0; g < size.graphs_of_3; ++g) graphs.push_back(record(form, size, how, g * 3, 3));
    for (const auto& graph : graphs) graph.launch(stream);
    std::vector<float> times;
    for (int i = 0; i < kReplays; ++i)
      times.push_back(
          timed([&] { graphs[static_cast<size_t>(i) % graphs.size()].launch(stream); }));
    return median(times) * 1e3;
  }

  // What the last node of the chain left.
  std::vector<uint16_t> chain_output(const Size& size) {
    std::vector<uint16_t> y(static_cast<size_t>(size.n));
    stream.synchronize();
    QWEN_MOE_CUDA(cudaMemcpy(y.data(), y_.data() + (size.chain - 1) % 2 * kMaxN, y.size() * 2,
                             cudaMemcpyDeviceToHost));
    return y;
  }

  // Largest error of a few rows against float64, relative to the result or, where that is small, to
  // the root mean square of the results.
  double error(const Form& form, const Size& size, int per_sm) {
    QWEN_MOE_CUDA(cudaMemsetAsync(y_.data(), 0xff, y_.bytes(), stream));  // NaN until written
    launch(form, {.programmatic = false, .before = false, .per_sm = per_sm},
           {.tiles = tiles_.data(), .x = x_.data(), .y = y_.data(), .n_tiles = size.tiles()});
    stream.synchronize();
    double squares = 0;
    std::vector<double> want, got;
    std::vector<uint8_t> tile(kTileBytes);
    std::vector<uint16_t> y(kTile);
    for (int at : {0, 1, size.tiles() / 3, size.tiles() / 2, size.tiles() - 2, size.tiles() - 1}) {
      QWEN_MOE_CUDA(cudaMemcpy(tile.data(), tiles_.data() + static_cast<int64_t>(at) * kTileBytes,
                               kTileBytes, cudaMemcpyDeviceToHost));
      QWEN_MOE_CUDA(cudaMemcpy(y.data(), y_.data() + static_cast<int64_t>(at) * kTile, kTile * 2,
                               cudaMemcpyDeviceToHost));
      for (int o = 0; o < kTile; ++o) {
        double sum = 0;
        for (int k = 0; k < kK; ++k) {
          CodePlace place = code_place(WeightFormat::int4, o, k);
          int byte = tile[static_cast<size_t>(kTileScaleBytes + place.byte)];
          int code = place.high_nibble ? byte >> 4 : byte & 15;
          __half scale;
          std::memcpy(&scale, tile.data() + (k / kGroup * kTile + o) * 2, 2);
          sum += static_cast<double>(__half2float(scale)) * (code - 8) *
                 static_cast<double>(bf16_to_float(host_x_[static_cast<size_t>(k)]));
        }
        squares += sum * sum;
        want.push_back(sum);
        got.push_back(static_cast<double>(bf16_to_float(y[static_cast<size_t>(o)])));
      }
    }
    double rms = std::sqrt(squares / static_cast<double>(want.size())), worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isnan(got[i])) return HUGE_VAL;
      worst = std::max(worst, std::abs(got[i] - want[i]) / std::max(std::abs(want[i]), rms));
    }
    return worst;
  }

  DeviceProperties properties;
  Stream stream;

 private:
  static constexpr int64_t kMaxN = 248320;

  static void prepare(const Form& form) {
    if (!form.shared_bytes) return;
    allow_shared(form.kernel, form.shared_bytes);
    // A split that holds one block would keep the next kernel of a chain off the multiprocessor.
    QWEN_MOE_CUDA(cudaFuncSetAttribute(form.kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                       cudaSharedmemCarveoutMaxShared));
  }

  CapturedChain record(const Form& form, const Size& size, Chain how, int first, int length) {
    prepare(form);
    CapturedChain graph(stream, [&] {
      for (int i = 0; i < length; ++i) {
        int64_t copy = (first + i) % (kPoolTiles / size.tiles());
        launch(form, how,
               {.tiles = tiles_.data() + copy * size.bytes(),
                .x = i == 0 ? x_.data() : y_.data() + (i - 1) % 2 * kMaxN,
                .y = y_.data() + i % 2 * kMaxN,
                .n_tiles = size.tiles(),
                .before = how.before});
      }
    });
    if (how.programmatic)
      require<Device>(graph.programmatic_edges() == static_cast<size_t>(length - 1),
                      "the graph has ", graph.programmatic_edges(),
                      " programmatic edges, expected ", length - 1);
    return graph;
  }

  void launch(const Form& form, Chain how, Gemv g) {
    prepare(form);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(properties.sms * how.per_sm));
    config.blockDim = dim3(static_cast<unsigned>(form.threads));
    config.dynamicSmemBytes = form.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = how.programmatic ? 1 : 0;
    QWEN_MOE_CUDA(cudaLaunchKernelEx(&config, form.kernel, g));
  }

  float timed(auto&& work) { return stopwatch_(stream, work); }

  Stopwatch stopwatch_;
  DeviceBuffer<uint8_t> tiles_;
  DeviceBuffer<bf16> x_, y_;  // y: two vectors in turn
  std::vector<uint16_t> host_x_;
};

struct Report {
  std::string json = "[";
  void add(const Size& size, const std::string& section, const std::string& what, double us,
           double gb_per_s, double share) {
    char line[512];
    std::snprintf(line, sizeof line,
                  "%s\n {\"size\": \"%s\", \"section\": \"%s\", \"what\": \"%s\", \"us\": %.4f, "
                  "\"gb_per_s\": %.1f, \"share\": %.4f}",
                  json.size() > 1 ? "," : "", size.name, section.c_str(), what.c_str(), us,
                  gb_per_s, share);
    json += line;
  }
};

std::vector<Form> depths() {
  return {gemv_form<2>("depth 2"), gemv_form<3>("depth 3"), gemv_form<4>("depth 4"),
          gemv_form<5>("depth 5"), gemv_form<6>("depth 6"), gemv_form<8>("depth 8")};
}
// At depth 4, which fits twice on a multiprocessor and holds 68 KB in flight.
std::vector<Form> parts() {
  return {gemv_form<4>("full, x in registers"),
          gemv_form<4, Work::full, X::shared>("full, x in shared"),
          gemv_form<4, Work::folded>("offset folded into sums of x"),
          gemv_form<4, Work::raw>("no dequantization"),
          gemv_form<4, Work::none>("no dequantization, no mma")};
}

// Results of forms that compute y: against float64, and between forms, which sum in one order.
bool verify(Bench& bench, const Size& size) {
  constexpr double kTolerance = 1e-2;
  double worst = 0;
  auto check = [&](const Form& form, int per_sm) {
    if (!bench.fits(form, per_sm)) return;
    worst = std::max(worst, bench.error(form, size, per_sm));
  };
  for (const Form& form : depths())
    for (int per_sm : {1, 2}) check(form, per_sm);
  for (size_t i = 1; i < 3; ++i) check(parts()[i], 1);
  bool pass = worst <= kTolerance;
  std::printf("  result against float64: largest relative error %.1e, allowed %.0e: %s\n", worst,
              kTolerance, pass ? "PASS" : "FAIL");
  return pass;
}

bool bench_size(Bench& bench, const Size& size, Report& report) {
  std::printf("\n%s, k=%d, int4 group %d: %.2f MB, chains of %d in one graph, us a node\n",
              size.name, kK, kGroup, static_cast<double>(size.bytes()) * 1e-6, size.chain);
  bool pass = verify(bench, size);
  auto gb_per_s = [&](double us) { return static_cast<double>(size.bytes()) / us * 1e-3; };

  Form best_form;
  int best_per_sm = 1;
  double read = 1e30;
  for (int threads : {256, 512, 1024})
    for (int per_sm : {1, 2})
      for (int unroll : {4, 8}) {
        Form form{concat(per_sm, " x ", threads, " threads, ", unroll, " loads"),
                  unroll == 4 ? plain_read<4> : plain_read<8>, threads, 0};
        if (!bench.fits(form, per_sm)) continue;
        double us = bench.chain(form, size, {.per_sm = per_sm});
        if (us < read) read = us, best_form = form, best_per_sm = per_sm;
      }
  std::printf("  plain read (%s)  %.2f us  %.0f GB/s\n", best_form.name.c_str(), read,
              gb_per_s(read));
  report.add(size, "read", best_form.name, read, gb_per_s(read), 1);

  auto alone = [&](const Form& form, const char* section) {
    std::printf("  %-30s", form.name.c_str());
    for (int per_sm : {1, 2}) {
      if (!bench.fits(form, per_sm)) {
        std::printf(" | %24s", "does not fit");
        continue;
      }
      double us = bench.chain(form, size, {.per_sm = per_sm});
      std::printf(" | %8.2f %8.0f %5.0f %%", us, gb_per_s(us), 100 * read / us);
      report.add(size, section, concat(form.name, ", ", per_sm, " blocks"), us, gb_per_s(us),
                 read / us);
    }
    std::printf("\n");
  };
  std::printf("  %-30s | %8s %8s %7s | %8s %8s %7s\n", "alone, plain graph edges", "1 a SM", "GB/s",
              "of read", "2 a SM", "GB/s", "of read");
  for (const Form& form : depths()) alone(form, "alone");
  std::printf("  what the parts cost, depth 4\n");
  for (const Form& form : parts()) alone(form, "parts");

  std::printf("  %-30s | %8s %8s %8s %7s | %s\n", "dependent, 1 block a SM", "plain", "after",
              "before", "of read", "graph of 3: plain, after, before");
  std::vector<uint16_t> want;
  auto dependent = [&](const Form& form, int per_sm, bool computes) {
    std::printf("  %-30s |", form.name.c_str());
    double last = 0;
    const char* names[] = {"plain", "after", "before"};
    for (int how = 0; how < 3; ++how) {
      last =
          bench.chain(form, size, {.programmatic = how > 0, .before = how == 2, .per_sm = per_sm});
      std::printf(" %8.2f", last);
      report.add(size, "chain", concat(form.name, " ", names[how]), last, gb_per_s(last),
                 read / last);
      if (!computes) continue;
      // A node that read its input too early would change bits somewhere down the chain.
      std::vector<uint16_t> got = bench.chain_output(size);
      if (want.empty()) want = got;
      if (got != want) {
        pass = false;
        std::printf(" FAIL: other bits than the plain chain\n");
      }
    }
    std::printf(" %5.0f %% |", 100 * read / last);
    for (int how = 0; how < 3; ++how) {
      double us =
          bench.three(form, size, {.programmatic = how > 0, .before = how == 2, .per_sm = per_sm});
      std::printf(" %8.2f", us);
      report.add(size, "three", concat(form.name, " ", names[how]), us, gb_per_s(us / 3),
                 3 * read / us);
    }
    std::printf("\n");
  };
  for (const Form& form : depths()) dependent(form, 1, true);
  best_form.name = "plain read";
  dependent(best_form, best_per_sm, false);
  return pass;
}

int run(int argc, char** argv) {
  const char* json = nullptr;
  for (int i = 1; i < argc; ++i) {
    require(!std::strcmp(argv[i], "--json") && i + 1 < argc, "usage: ", argv[0], " [--json FILE]");
    json = argv[++i];
  }
  Bench bench;
  require<Device>(bench.properties.programmatic_launch(),
                  "programmatic edges need compute capability 9.0 or later");
  cudaDeviceProp device{};
  QWEN_MOE_CUDA(cudaGetDeviceProperties(&device, 0));
  std::printf(
      "%s, %d multiprocessors; %d warps a block, %d bytes a stage and warp; medians of %d\n",
      device.name, bench.properties.sms, kWarps, kStageBytes, kReplays);
  Report report;
  bool pass = true;
  for (const Size& size : kSizes) pass = bench_size(bench, size, report) && pass;
  std::printf("\n%s\n", pass ? "PASS" : "FAIL");
  if (json) {
    std::ofstream file(json);
    file << "{\"device\": \"" << device.name << "\", \"pass\": " << (pass ? "true" : "false")
         << ", \"figures\": " << report.json << "\n]}\n";
    require(file.good(), "cannot write ", json);
  }
  return pass ? 0 : 1;
}

}  // namespace
}  // namespace qwen_moe::cuda

int main(int argc, char** argv) {
  return qwen_moe::cuda::run_program(argc, argv, qwen_moe::cuda::run);
}
