// Streaming weight tiles through the tensor cores, for 1 to 32 activation rows.
//
// A block's warps split the inputs k of a tile; each warp streams its own slice of every tile
// through a ring in shared memory that only it writes and reads, so the copies need no barrier and
// run ahead: before the kernel's predecessor has ended, and across the block's barriers. A chunk is
// up to 2048 bytes of codes of one tile, with their scales.
//
// The sum of an output runs over the inputs of a unit on the tensor core (fp32), then over the
// units of a slice with their scales, then over the slices: the same order for any number of rows.
//
// With few rows a multiprocessor is bound by what its warps issue before memory is: what counts is
// the number of instructions for a chunk. With one row their code counts as well: six kernels take
// turns in a layer, each new to the instruction cache, so loops around memory stay rolled and what
// is known when a kernel is compiled (Way) is used inside its loop only.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/tile.cuh"
#include "model/weights.h"

namespace qwen_moe::cuda {

inline constexpr int kWarps = 8;  // of a block; they share a tile's inputs
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kChunkBytes = 2048;        // codes of a chunk
inline constexpr int kStageBytes = 2048 + 128;  // and the scales of at most 4 groups
inline constexpr int kPartialPitch = 20;        // floats of a row of 16 outputs; no bank conflicts

// A packed matrix as the kernels see it.
struct Matrix {
  const std::byte* data = nullptr;
  WeightFormat format = WeightFormat::bf16;
  int n = 0, k = 0;
  int group_shift = -1;  // units of a group: 1 << group_shift; -1: no groups, no scales
  int tiles = 0;
  int scale_bytes = 0;  // of a tile
  int64_t tile_bytes = 0;

  Matrix() = default;
  explicit Matrix(const WeightView& view)
      : data(view.data),
        format(view.spec.format),
        n(view.spec.n),
        k(view.spec.k),
        group_shift(view.spec.group == 0 ? -1 : view.spec.group / kUnit - 1),
        tiles(view.spec.tiles()),
        scale_bytes(static_cast<int>(view.spec.scale_bytes())),
        tile_bytes(static_cast<int64_t>(view.spec.tile_bytes())) {}
};

// Bytes between activation rows in shared memory: 8 lanes that read 16 bytes each of two
// neighbouring rows meet no bank twice, and a row is followed by a unit of zeros, which meets the
// unit that a slice of an odd number lacks.
__host__ __device__ constexpr int activation_pitch(int k) { return k * 2 + 192; }
__device__ __forceinline__ void zero_ends(std::byte* activations, int k, int rows) {
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < rows * 8; at += static_cast<int>(blockDim.x))
    *reinterpret_cast<uint4*>(activations + at / 8 * activation_pitch(k) + k * 2 + at % 8 * 16) =
        uint4{0, 0, 0, 0};
}

// Units [begin, end) of slice w of `slices`: whole groups of 128 inputs (64 where 128 does not
// divide k), shared out evenly.
struct UnitRange {
  int begin, end;
};
__device__ __forceinline__ UnitRange slice_units(int k, int w, int slices) {
  int per = k % 128 == 0 ? 2 : 1, blocks = k / kUnit / per;
  return {w * blocks / slices * per, (w + 1) * blocks / slices * per};
}

// Units of a full chunk.
__host__ __device__ constexpr int chunk_units(WeightFormat format) {
  return kChunkBytes / unit_bytes(format);
}

__host__ __device__ constexpr int unit_shift_of(WeightFormat format) {
  return format == WeightFormat::int4 ? 9 : format == WeightFormat::int8 ? 10 : 11;
}

// A tile as a warp needs it: in one vector of shared memory, or made up on the way.
struct alignas(16) Tile {
  const std::byte* codes;
  int32_t scale_bytes;  // before the codes
  uint16_t place;       // of a list of tiles: segment << 14 | tile
  uint8_t unit_shift;   // log2 of a unit's bytes: the format
  int8_t group_shift;

  Tile() = default;
  __device__ __forceinline__ Tile(const Matrix& m, const std::byte* tile, int place = 0)
      : codes(tile + m.scale_bytes),
        scale_bytes(m.scale_bytes),
        place(static_cast<uint16_t>(place)),
        unit_shift(static_cast<uint8_t>(unit_shift_of(m.format))),
        group_shift(static_cast<int8_t>(m.group_shift)) {}
};

// What a kernel knows of its tiles when it is compiled: nothing, or the common case, codes of that
// format in groups of 128 inputs and slices of whole chunks, which takes a fraction of the
// instructions around the products.
enum class Way : int { any, int8, int4 };
template <Way kWay>
inline constexpr WeightFormat kFormatOf =
    kWay == Way::int4 ? WeightFormat::int4 : WeightFormat::int8;
template <Way kWay>
inline constexpr int kStepOf = chunk_units(kFormatOf<kWay>);  // units of a chunk

// Of matrices whose inputs are shared out to `slices`.
inline Way way_of(const WeightSpec& spec, int slices) {
  bool int4 = spec.format == WeightFormat::int4, int8 = spec.format == WeightFormat::int8;
  if ((!int4 && !int8) || spec.group != 2 * kUnit) return Way::any;
  bool whole = spec.k % (chunk_units(spec.format) * kUnit * slices) == 0;
  return !whole ? Way::any : int4 ? Way::int4 : Way::int8;
}

// visit(WayOf<way>{}): from what is known now to what is known when a kernel is compiled.
template <Way kWay>
struct WayOf {};
template <class Visit>
__host__ __device__ __forceinline__ void with_way(Way way, const Visit& visit) {
  if (way == Way::int4)
    visit(WayOf<Way::int4>{});
  else if (way == Way::int8)
    visit(WayOf<Way::int8>{});
  else
    visit(WayOf<Way::any>{});
}

// A chunk in a stage of a ring: the lane's vectors of codes, and the scales of its two outputs.
struct StagedChunk {
  const std::byte* stage;

  __device__ __forceinline__ uint4 codes(int vector, int lane) const {
    return reinterpret_cast<const uint4*>(stage)[vector * 32 + lane];
  }
  __device__ __forceinline__ void scales(int group, int lane, float& low, float& high) const {
    const auto* of = reinterpret_cast<const __half*>(stage + kChunkBytes) + group * 16 + lane / 4;
    low = __half2float(of[0]);
    high = __half2float(of[8]);
  }
  __device__ __forceinline__ void used(int, int) const {}
};

// A chunk in the registers of a warp; every lane has two of the scales. A unit that has been used
// makes room for one of the chunk that comes next.
struct HeldChunk {
  uint4 vector[kChunkBytes / 512] = {};
  uint32_t two_scales = 0, next_scales = 0;
  const std::byte* next_codes = nullptr;
  int next_bytes = 0;

  __device__ __forceinline__ uint4 codes(int i, int) const { return vector[i]; }
  __device__ __forceinline__ void scales(int group, int lane, float& low, float& high) const {
    auto scale = [&](int output) {
      uint32_t two = __shfl_sync(0xffffffffu, two_scales, group * 8 + output / 2);
      return __half2float(__ushort_as_half(
          static_cast<unsigned short>(output % 2 == 0 ? two & 0xffff : two >> 16)));
    };
    low = scale(lane / 4);
    high = scale(lane / 4 + 8);
  }
  __device__ __forceinline__ void used(int first, int end) {
#pragma unroll
    for (int i = 0; i < kChunkBytes / 512; ++i)
      if (i >= first && i < end && i * 512 < next_bytes)
        vector[i] = load_weights(next_codes + i * 512);
  }
};

// A warp's slice of one tile on its way into a ring or into registers, chunk by chunk.
struct TileCopy {
  const std::byte *codes = nullptr, *scales = nullptr;  // what the lane copies next
  int left = 0;                                         // units
  int group_shift = 0, unit_shift = 0;                  // a unit has 1 << unit_shift bytes

  template <Way kWay = Way::any>
  __device__ __forceinline__ void open(const Tile& tile, UnitRange slice, int lane) {
    left = slice.end - slice.begin;
    if constexpr (kWay != Way::any) {
      codes = tile.codes + (slice.begin * unit_bytes(kFormatOf<kWay>) + lane * 16);
      scales = tile.codes + ((slice.begin + lane) * 16 - tile.scale_bytes);
      return;
    }
    unit_shift = tile.unit_shift;
    group_shift = tile.group_shift;
    codes = tile.codes + ((slice.begin << unit_shift) + lane * 16);
    scales =
        tile.codes + ((slice.begin >> max(group_shift, 0)) * 32 + lane * 16 - tile.scale_bytes);
  }
  // `to` is the lane's address in a stage.
  template <Way kWay = Way::any>
  __device__ __forceinline__ void next_chunk(uint32_t to, int lane) {
    if constexpr (kWay != Way::any) {
      constexpr int kStep = kStepOf<kWay>;
#pragma unroll
      for (int i = 0; i < kChunkBytes; i += 512) copy_async_16(to + i, codes + i);
      copy_async_16_if(lane < kStep, to + kChunkBytes, scales);
      left -= kStep;
      codes += kChunkBytes;
      scales += kStep * 16;
      return;
    }
    int units = min(kChunkBytes >> unit_shift, left), bytes = units << unit_shift;
    left -= units;
    int scale_bytes = group_shift < 0 ? 0 : units >> group_shift << 5;
    bool has_scales = lane * 16 < scale_bytes;
    if (bytes == kChunkBytes) {  // in one go: every group of copies has a cost
#pragma unroll
      for (int i = 0; i < kChunkBytes; i += 512) copy_async_16(to + i, codes + i);
      copy_async_16_if(has_scales, to + kChunkBytes, scales);
    } else {
#pragma unroll 1
      for (int i = 0; i < bytes; i += 512) copy_async_16(to + i, codes + i);
      copy_async_16_if(has_scales, to + kChunkBytes, scales);
    }
    codes += bytes;
    scales += scale_bytes;
  }
  // Says what comes next; the codes are asked for where there is room.
  __device__ __forceinline__ void next_chunk(HeldChunk& to, int lane) {
    int units = min(kChunkBytes >> unit_shift, left);
    left -= units;
    to.next_codes = codes;
    to.next_bytes = units << unit_shift;
    int scale_bytes = group_shift < 0 ? 0 : units >> group_shift << 5;
    if (lane * 4 < scale_bytes)
      to.next_scales = __ldg(reinterpret_cast<const uint32_t*>(scales - lane * 12));
    codes += to.next_bytes;
    scales += scale_bytes;
  }
};

// Four fp16 pairs of one step from a word of eight int4 codes: 1024 + code and 1024 + 16 code are
// exact in fp16, so that only two of the four need a shift.
__device__ __forceinline__ void widen_int4(uint32_t (&a)[4], uint32_t word) {
  auto half2_of = [](uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); };
  auto bits_of = [](__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); };
  auto low = [&](uint32_t w) {
    uint32_t biased;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(biased) : "r"(w));
    return bits_of(__hsub2(half2_of(biased), half2_of(0x64086408)));  // 1032
  };
  auto high = [&](uint32_t w) {
    uint32_t biased;
    asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(biased) : "r"(w));
    return bits_of(__hfma2(half2_of(biased), half2_of(0x2c002c00), half2_of(0xd480d480)));
  };  // / 16 - 72
  a[0] = low(word);
  a[1] = high(word);
  a[2] = low(word >> 8);
  a[3] = high(word >> 8);
}

// Two fp16 pairs from a word of four codes + 128: 1024 + byte is exact in fp16.
__device__ __forceinline__ void widen_int8(uint32_t& first, uint32_t& second, uint32_t word) {
  auto widen = [](uint32_t biased) {
    const uint32_t bias = 0x64806480;  // 1152
    __half2 difference =
        __hsub2(*reinterpret_cast<__half2*>(&biased), *reinterpret_cast<const __half2*>(&bias));
    return *reinterpret_cast<uint32_t*>(&difference);
  };
  first = widen(__byte_perm(word, 0x64646464, 0x4140));
  second = widen(__byte_perm(word, 0x64646464, 0x4342));
}

// A pair of bf16 weights in fp16: exact from 2^-17 on, and 3e-8 off at most below.
__device__ __forceinline__ uint32_t half_of_bf16(uint32_t pair) {
  __half2 halves =
      __floats2half2_rn(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  return *reinterpret_cast<uint32_t*>(&halves);
}

// 16-byte vectors that a lane holds of a unit.
__host__ __device__ constexpr int lane_vectors(WeightFormat format) {
  return unit_bytes(format) / 512;
}

// The A fragment of step 2 j + s of a unit, from the lane's vectors.
template <WeightFormat kFormat>
__device__ __forceinline__ void widen_step(uint32_t (&a)[4], const uint4* raw, int j, int s) {
  if constexpr (kFormat == WeightFormat::int4) {
    widen_int4(a, j == 0 ? (s == 0 ? raw->x : raw->y) : (s == 0 ? raw->z : raw->w));
  } else if constexpr (kFormat == WeightFormat::int8) {
    widen_int8(a[0], a[1], s == 0 ? raw[j].x : raw[j].z);
    widen_int8(a[2], a[3], s == 0 ? raw[j].y : raw[j].w);
  } else {
    const uint4& words = raw[2 * j + s];
    a[0] = half_of_bf16(words.x);
    a[1] = half_of_bf16(words.y);
    a[2] = half_of_bf16(words.z);
    a[3] = half_of_bf16(words.w);
  }
}

// A warp's sums of one tile for 8 * kTiles rows, in mma's accumulator order. Units come up to kSide
// side by side, as the products of one follow each other only at their full latency.
template <int kTiles, bool kOneRow = false,
          int kSide = kTiles == 1   ? 4
                      : kTiles == 2 ? 2
                                    : 1>
struct TileSum {
  static constexpr int kNext = kOneRow ? 2 : 1;  // of one row only the even sums are anybody's
  float total[kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) total[i][j] = 0.0f;
  }

  // Adds a chunk of `units` units. `rows_of(tile, u, half)` gives the lane's 8 activations of row
  // tile `tile`, inputs 32 half + 8 (lane % 4) on of the chunk's unit u, as four words; anything
  // for rows beyond the last, and anything finite for a unit beyond the last.
  template <class Chunk, class RowsOf>
  __device__ __forceinline__ void add(int unit_shift, int group_shift, Chunk&& chunk, int units,
                                      int lane, const RowsOf& rows_of) {
    if (unit_shift == unit_shift_of(WeightFormat::int4))
      add_as<WeightFormat::int4>(group_shift, chunk, units, lane, rows_of);
    else if (unit_shift == unit_shift_of(WeightFormat::int8))
      add_as<WeightFormat::int8>(group_shift, chunk, units, lane, rows_of);
    else
      add_as<WeightFormat::bf16>(group_shift, chunk, units, lane, rows_of);
  }

  // Adds a whole chunk in groups of 128 inputs.
  template <WeightFormat kFormat, class Chunk, class RowsOf>
  __device__ __forceinline__ void add_whole(Chunk&& chunk, int lane, const RowsOf& rows_of) {
    constexpr int kUnits = chunk_units(kFormat);
    add_side<kFormat, std::min(kSide, kUnits), true, 2>(1, chunk, kUnits, lane, rows_of);
  }

  template <WeightFormat kFormat, class Chunk, class RowsOf>
  __device__ __forceinline__ void add_as(int group_shift, Chunk&& chunk, int units, int lane,
                                         const RowsOf& rows_of) {
    constexpr int kUnits = chunk_units(kFormat);
    if constexpr (kSide >= kUnits)
      if (units == kUnits)
        return add_side<kFormat, kUnits, true>(group_shift, chunk, kUnits, lane, rows_of);
    add_side<kFormat, std::min({kSide, kUnits, 2}), false>(group_shift, chunk, units, lane,
                                                           rows_of);
  }

  // `kAlike` units, from a multiple of it on, have the same scales.
  template <WeightFormat kFormat, int kBeside, bool kFull, int kAlike = 1, class Chunk,
            class RowsOf>
  __device__ __forceinline__ void add_side(int group_shift, Chunk&& chunk, int units, int lane,
                                           const RowsOf& rows_of) {
    constexpr int kVectors = lane_vectors(kFormat);
#pragma unroll
    for (int u = 0; u < chunk_units(kFormat); u += kBeside) {
      if (!kFull && u >= units) {
        chunk.used(u * kVectors, kChunkBytes / 512);
        break;
      }
      uint4 raw[kBeside][kVectors];
      float low[kBeside], high[kBeside];
#pragma unroll
      for (int v = 0; v < kBeside; ++v) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) raw[v][i] = chunk.codes((u + v) * kVectors + i, lane);
        low[v] = high[v] = 1.0f;
        if (v % kAlike != 0) {
          low[v] = low[v - v % kAlike];
          high[v] = high[v - v % kAlike];
          continue;
        }
        if constexpr (kFormat != WeightFormat::bf16) {
          chunk.scales((u + v) >> group_shift, lane, low[v], high[v]);
          if (!kFull && v > 0 && u + v >= units)
            low[v] = high[v] = 0.0f;  // and whatever the codes are
        }
      }
      float sum[kBeside][kTiles][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint4 b[kBeside][kTiles];
#pragma unroll
        for (int v = 0; v < kBeside; ++v)
#pragma unroll
          for (int i = 0; i < kTiles; ++i) b[v][i] = rows_of(i, u + v, j);
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int v = 0; v < kBeside; ++v) {
            uint32_t a[4];
            widen_step<kFormat>(a, raw[v], j, s);
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
              mma_half_16x8x16(sum[v][i], a, s == 0 ? b[v][i].x : b[v][i].z,
                               s == 0 ? b[v][i].y : b[v][i].w);
          }
      }
#pragma unroll
      for (int v = 0; v < kBeside; ++v)
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
          for (int j = 0; j < 4; j += kNext)
            total[i][j] = fmaf(j < 2 ? low[v] : high[v], sum[v][i][j], total[i][j]);
      chunk.used(u * kVectors, (u + kBeside) * kVectors);
    }
  }

  // Writes the rows below `rows` to to[row * kPartialPitch + output].
  __device__ __forceinline__ void store(float* to, int rows, int lane) const {
    int q = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += kNext) {
        int row = 8 * i + 2 * t + j % 2;
        if (row < rows) to[row * kPartialPitch + q + j / 2 * 8] = total[i][j];
      }
  }
};

// Adds a warp's slice of a tile, chunk by chunk as they come. `feed(stage)` starts the copy that
// comes next, into the stage just read; every call is one group of copies.
template <int kStages, Way kWay = Way::any, class Sum, class Feed, class RowsOf>
__device__ __forceinline__ void add_tile(Sum& sum, int unit_shift, int group_shift, UnitRange slice,
                                         const std::byte* ring, int& stage, int lane,
                                         const Feed& feed, const RowsOf& rows_of) {
  int step = kWay == Way::any ? kChunkBytes >> unit_shift : kStepOf<kWay>;
#pragma unroll 1
  for (int unit = slice.begin; unit < slice.end; unit += step) {
    copy_async_wait<kStages - 1>();
    __syncwarp();  // scales come from other lanes
    StagedChunk chunk{ring + stage * kStageBytes};
    auto rows_at = [&](int i, int u, int half) { return rows_of(i, unit + u, half); };
    if constexpr (kWay == Way::any)
      sum.add(unit_shift, group_shift, chunk, min(step, slice.end - unit), lane, rows_at);
    else
      sum.template add_whole<kFormatOf<kWay>>(chunk, lane, rows_at);
    __syncwarp();
    feed(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// The sum over `kSlices` slices, in order. `partial` is [kSlices][rows][kPartialPitch].
template <int kSlices = kWarps>
__device__ __forceinline__ float sum_slices(const float* partial, int rows, int row, int output) {
  const float* from = partial + row * kPartialPitch + output;
  float sum = from[0];
#pragma unroll
  for (int w = 1; w < kSlices; ++w) sum = __fadd_rn(sum, from[w * rows * kPartialPitch]);
  return sum;
}

}  // namespace qwen_moe::cuda
