// Rows times a packed weight matrix. See kernels_impl.h for how this file is compiled.
//
// One fixed order per output, the same for any number of rows: dense formats sum the even and the
// odd input features in two chains; quantized formats sum the products of a group exactly, in
// integers, and add the groups in order.
#pragma once

#include "cpu/kernels.h"
#include "cpu/math_impl.h"

namespace qwen_moe::cpu {
namespace {

constexpr int kVecs = kTile / kW;  // vectors of a tile
constexpr int kMaxRows = 8;
constexpr size_t kBlockBytes = 64 * 1024;  // weights reread for every block of rows; fits in L2

template <WeightFormat kFormat>
constexpr int kElementBytes = kFormat == WeightFormat::f32 ? 4 : 2;

// Where the rows of a block are and how long they are.
struct Rows {
  const float* x[kMaxRows];
  const int16_t* q[kMaxRows];
  const float* scale[kMaxRows];
  const int32_t* sum[kMaxRows];
  float* out[kMaxRows];  // at the tile in hand
};

template <int kRows>
inline void store_tile(const Rows& rows, const F (&acc)[kRows][kVecs], int lanes) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      const int left = lanes - v * kW;
      if (left >= kW) {
        store(rows.out[r] + v * kW, acc[r][v]);
      } else if (left > 0) {
        store_n(rows.out[r] + v * kW, acc[r][v], left);
      }
    }
  }
}

template <WeightFormat kFormat>
inline F load_weight(const std::byte* p) {
  if constexpr (kFormat == WeightFormat::f32) {
    return load(reinterpret_cast<const float*>(p));
  } else if constexpr (kFormat == WeightFormat::f16) {
    return load_f16(p);
  } else {
    return load_bf16(p);
  }
}

// acc += the products with input feature i.
template <WeightFormat kFormat, int kRows>
inline void dense_step(F (&acc)[kRows][kVecs], const Rows& rows, const std::byte* weight, int i) {
  constexpr int kBytes = kElementBytes<kFormat>;
  F w[kVecs];
  for (int v = 0; v < kVecs; ++v)
    w[v] = load_weight<kFormat>(weight + (static_cast<int64_t>(i) * kTile + v * kW) * kBytes);
  for (int r = 0; r < kRows; ++r) {
    const F x = set1(rows.x[r][i]);
    for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(w[v], x, acc[r][v]);
  }
}

template <WeightFormat kFormat, int kRows>
void dense_tile(const Rows& rows, const std::byte* weight, int k, int lanes) {
  constexpr int kBytes = kElementBytes<kFormat>;
  F even[kRows][kVecs], odd[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) even[r][v] = odd[r][v] = zero();
  int i = 0;
  for (; i + 2 <= k; i += 2) {
    const std::byte* now = weight + static_cast<int64_t>(i) * kTile * kBytes;
    prefetch_ahead(now);
    if (kBytes == 4) prefetch_ahead(now + 64);
    dense_step<kFormat>(even, rows, weight, i);
    dense_step<kFormat>(odd, rows, weight, i + 1);
  }
  if (i < k) dense_step<kFormat>(even, rows, weight, i);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) even[r][v] = add(even[r][v], odd[r][v]);
  store_tile<kRows>(rows, even, lanes);
}

// A tile of a quantized matrix.
struct QuantTile {
  const std::byte* scales;
  const std::byte* offsets;  // with has_zero
  const std::byte* codes;
  int groups, group;
};

// Adds to the integer sums the products with pair `kPart` of the input features of a code vector.
template <WeightFormat kFormat, int kPart, int kRows>
inline void quant_part(I (&sum)[kRows][kVecs], const I (&raw)[kVecs], const Rows& rows, int i) {
  I w[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    if constexpr (kFormat == WeightFormat::int4) {
      w[v] = nibble<kPart>(raw[v]);
    } else {
      w[v] = kPart == 0 ? low_byte(raw[v]) : high_byte(raw[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const I x = pair(rows.q[r] + i + 2 * kPart);
    for (int v = 0; v < kVecs; ++v) sum[r][v] = dot2(sum[r][v], w[v], x);
  }
}

template <WeightFormat kFormat, bool kZero, int kRows>
void quant_tile(const Rows& rows, const QuantTile& tile, int lanes) {
  constexpr int kParts = kFormat == WeightFormat::int4 ? 4 : 2;
  constexpr int kStep = 2 * kParts;  // input features in a code vector of 64 bytes
  // Few rows leave too few chains to hide the latency of a multiply-add: give each row several.
  constexpr int kChains = kRows * kVecs == 1 ? kParts : kRows * kVecs <= 4 ? 2 : 1;
  F acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
  // Below, every step looks the same distance ahead of the codes; the scales between the codes of
  // two tiles make the gap that is closed here.
  for (const std::byte* p = tile.scales; p < tile.codes; p += 64) prefetch_ahead(p);
  const std::byte* codes = tile.codes;
  int i = 0;  // input feature
  for (int g = 0; g < tile.groups; ++g) {
    I sum[kChains][kRows][kVecs];
    for (int c = 0; c < kChains; ++c)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVecs; ++v) sum[c][r][v] = izero();
    for (const int end = i + tile.group; i < end; i += kStep) {
      prefetch_ahead(codes);
      I raw[kVecs];
      for (int v = 0; v < kVecs; ++v) raw[v] = load_raw(codes + v * kW * 4);
      codes += 64;
      quant_part<kFormat, 0>(sum[0], raw, rows, i);
      quant_part<kFormat, 1>(sum[1 % kChains], raw, rows, i);
      if constexpr (kParts == 4) {
        quant_part<kFormat, 2>(sum[2 % kChains], raw, rows, i);
        quant_part<kFormat, 3>(sum[3 % kChains], raw, rows, i);
      }
    }
    F w_scale[kVecs], offset[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = (static_cast<int64_t>(g) * kTile + v * kW) * 2;
      w_scale[v] = load_f16(tile.scales + at);
      if constexpr (kZero) offset[v] = load_f16(tile.offsets + at);
    }
    for (int r = 0; r < kRows; ++r) {
      const F x_scale = set1(rows.scale[r][g]);
      const int32_t x_sum = rows.sum[r][g];
      for (int v = 0; v < kVecs; ++v) {
        I total = sum[0][r][v];
        for (int c = 1; c < kChains; ++c) total = iadd(total, sum[c][r][v]);
        if constexpr (kFormat == WeightFormat::int4 && !kZero)
          total = isub(total, iset1(8 * x_sum));
        F part = mul(to_float(total), w_scale[v]);
        if constexpr (kZero) part = sub(part, mul(offset[v], set1(static_cast<float>(x_sum))));
        acc[r][v] = fma(part, x_scale, acc[r][v]);
      }
    }
  }
  store_tile<kRows>(rows, acc, lanes);
}

inline int lanes_of(const GemmArgs& args, int tile) {
  const int left = args.spec->n - tile * kTile;
  return left < kTile ? left : kTile;
}

// Rows [row, row + kRows) by tiles [begin, end).
template <WeightFormat kFormat, bool kZero, int kRows>
void gemm_rows(const GemmArgs& args, int row, int begin, int end) {
  const WeightSpec& spec = *args.spec;
  const size_t tile_bytes = spec.tile_bytes();
  constexpr bool kQuantized = kFormat == WeightFormat::int8 || kFormat == WeightFormat::int4;
  QuantTile tile{};
  Rows rows;
  if constexpr (kQuantized) {
    tile.group = spec.group;
    tile.groups = spec.k / spec.group;
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t source = args.row_index ? args.row_index[row + r] : row + r;
    if constexpr (kQuantized) {
      rows.q[r] = args.in.q + source * spec.k;
      rows.scale[r] = args.in.scale + source * tile.groups;
      rows.sum[r] = args.in.sum + source * tile.groups;
    } else {
      rows.x[r] = args.in.x + source * spec.k;
    }
  }
  for (int t = begin; t < end; ++t) {
    const std::byte* weight = args.weight + tile_bytes * static_cast<size_t>(t);
    for (int r = 0; r < kRows; ++r)
      rows.out[r] = args.out + (row + r) * args.out_stride + int64_t{t} * kTile;
    if constexpr (kQuantized) {
      const size_t scale_bytes = spec.scale_bytes();
      tile.scales = weight;
      tile.offsets = weight + scale_bytes;
      tile.codes = weight + scale_bytes * (kZero ? 2 : 1);
      quant_tile<kFormat, kZero, kRows>(rows, tile, lanes_of(args, t));
    } else {
      dense_tile<kFormat, kRows>(rows, weight, spec.k, lanes_of(args, t));
    }
  }
}

// Calls gemm_rows for `count` rows, count in [1, kRows].
template <WeightFormat kFormat, bool kZero, int kRows>
void gemm_count(const GemmArgs& args, int row, int count, int begin, int end) {
  if constexpr (kRows > 1) {
    if (count < kRows) return gemm_count<kFormat, kZero, kRows - 1>(args, row, count, begin, end);
  }
  gemm_rows<kFormat, kZero, kRows>(args, row, begin, end);
}

template <WeightFormat kFormat, bool kZero = false>
void gemm_format(const GemmArgs& args) {
  constexpr bool kQuantized = kFormat == WeightFormat::int8 || kFormat == WeightFormat::int4;
  constexpr int kBlock = kQuantized ? kQuantRows : kDenseRows;
  // One block of rows reads the weights once, straight through. More read them again from cache.
  int step = args.tile_end - args.tile_begin;
  if (args.rows > kBlock) {
    const size_t fit = kBlockBytes / args.spec->tile_bytes();
    step = fit < 1 ? 1 : static_cast<int>(fit);
  }
  for (int begin = args.tile_begin; begin < args.tile_end; begin += step) {
    const int end = args.tile_end - begin < step ? args.tile_end : begin + step;
    for (int row = 0; row < args.rows; row += kBlock) {
      const int count = args.rows - row < kBlock ? args.rows - row : kBlock;
      gemm_count<kFormat, kZero, kBlock>(args, row, count, begin, end);
    }
  }
}

void gemm(const GemmArgs& args) {
  switch (args.spec->format) {
    case WeightFormat::f32: return gemm_format<WeightFormat::f32>(args);
    case WeightFormat::f16: return gemm_format<WeightFormat::f16>(args);
    case WeightFormat::bf16: return gemm_format<WeightFormat::bf16>(args);
    case WeightFormat::int8: return gemm_format<WeightFormat::int8>(args);
    case WeightFormat::int4:
      return args.spec->has_zero ? gemm_format<WeightFormat::int4, true>(args)
                                 : gemm_format<WeightFormat::int4>(args);
  }
}

}  // namespace
}  // namespace qwen_moe::cpu
