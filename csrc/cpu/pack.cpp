#include "cpu/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "cpu/kernels.h"

namespace qwen_moe::cpu {
namespace {

// Four floats or integers in the compiler's vector types; lanes are output features here.
typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));

constexpr int kQuads = kTile / 4;
constexpr int kMaxGroup = 128;

U4 bits_of(F4 v) { return reinterpret_cast<U4>(v); }
F4 floats_of(U4 v) { return reinterpret_cast<F4>(v); }
F4 splat(float v) { return F4{v, v, v, v}; }
F4 absolute(F4 v) { return floats_of(bits_of(v) & 0x7fffffffu); }

// To the nearest integer, ties to even, for |v| < 2^22.
F4 round_even(F4 v) {
  const F4 magic = splat(12582912.0f);
  return (v + magic) - magic;
}

// To f16 and round to nearest even, for finite v; too large becomes infinity.
H4 to_f16(F4 v) {
  const U4 sign = (bits_of(v) >> 16) & 0x8000u;
  const F4 size = absolute(v);
  const U4 size_bits = bits_of(size);
  // Normal: rebias the exponent by adding and round on the way. Denormal: adding 0.5 puts the unit
  // in the last place at 2^-24, so the hardware rounds.
  const U4 normal = (size_bits + 0xc8000fffu + ((size_bits >> 13) & 1u)) >> 13;
  const U4 denormal = bits_of(size + splat(0.5f)) - 0x3f000000u;
  const U4 in_range = size_bits < 0x38800000u ? denormal : normal;
  const U4 infinity = U4{} + 0x7c00u;
  return __builtin_convertvector((size_bits >= 0x477ff000u ? infinity : in_range) | sign, H4);
}

F4 from_f16(H4 half) {
  const U4 bits = __builtin_convertvector(half, U4);
  const F4 size = floats_of((bits & 0x7fffu) << 13) * splat(0x1p112f);
  return floats_of(bits_of(size) | ((bits & 0x8000u) << 16));
}

H4 to_bf16(F4 v) {  // finite v
  const U4 bits = bits_of(v);
  return __builtin_convertvector((bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16, H4);
}

F4 load4(const float* p) {
  F4 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

void widen(float* out, const void* source, DType dtype, int64_t at, int64_t count) {
  switch (dtype) {
    case DType::f32:
      std::memcpy(out, static_cast<const float*>(source) + at,
                  static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::f16:
      return kernels().f16_to_f32(out, static_cast<const uint16_t*>(source) + at, count);
    case DType::bf16:
      return kernels().bf16_to_f32(out, static_cast<const uint16_t*>(source) + at, count);
    case DType::i32:
    case DType::coded: break;
  }
  throw InvalidArgument(concat("cannot pack weights of dtype ", dtype_name(dtype)));
}

bool all_finite(const float* x, size_t n) {
  uint32_t bad = 0;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

// Input features [begin, begin + count) of the outputs of a tile: [count][16], zero past n.
class TileReader {
 public:
  TileReader(const void* source, DType dtype, int n, int k)
      : source_(source), dtype_(dtype), n_(n), k_(k) {}

  void read(float* out, int tile, int begin, int count) {
    for (int o = 0; o < kTile; ++o) {
      const int row = tile * kTile + o;
      if (row < n_) {
        widen(row_, source_, dtype_, static_cast<int64_t>(row) * k_ + begin, count);
      } else {
        std::fill_n(row_, count, 0.0f);
      }
      for (int i = 0; i < count; ++i) out[i * kTile + o] = row_[i];
    }
    require<Format>(all_finite(out, static_cast<size_t>(count) * kTile),
                    "a weight is not finite, in output features ", tile * kTile, " to ",
                    std::min(n_, (tile + 1) * kTile) - 1, " and input features ", begin, " to ",
                    begin + count - 1);
  }

 private:
  const void* source_;
  DType dtype_;
  int n_, k_;
  float row_[kMaxGroup];
};

// Codes of 4 outputs over a group for scale s, as floats; returns the squared error of each.
template <bool kStore>
F4 encode(float* codes, const float* values, int group, F4 s, float low, float high) {
  const F4 inverse = s == 0.0f ? splat(0.0f) : splat(1.0f) / s;
  F4 error{};
  for (int i = 0; i < group; ++i) {
    const F4 w = load4(values + i * kTile);
    F4 code = round_even(w * inverse);
    code = code < low ? splat(low) : code;
    code = code > high ? splat(high) : code;
    const F4 miss = w - code * s;
    error += miss * miss;
    if (kStore) std::memcpy(codes + i * kTile, &code, sizeof(code));
  }
  return error;
}

// The value of largest magnitude of each of 4 outputs.
F4 extreme(const float* values, int group) {
  F4 best{};
  for (int i = 0; i < group; ++i) {
    const F4 w = load4(values + i * kTile);
    best = absolute(w) > absolute(best) ? w : best;
  }
  return best;
}

H4 int8_scale(const float* values, int group) {
  const F4 largest = absolute(extreme(values, group));
  H4 half = to_f16(largest / splat(127.0f));
  // Denormal scales are coarse: one rounded down must not cut the largest value off.
  const U4 short_of = reinterpret_cast<U4>(largest > from_f16(half) * 127.5f);
  return half + __builtin_convertvector(short_of & 1u, H4);
}

H4 int4_scale(const float* values, int group) {
  const F4 peak = extreme(values, group);
  const F4 onto_low = peak / splat(-8.0f), onto_high = absolute(peak) / splat(7.0f);
  const F4 candidates[] = {onto_low,  onto_low * 0.95f,  onto_low * 0.9f,  onto_low * 0.82f,
                           onto_high, onto_high * 0.95f, onto_high * 0.9f, onto_high * 0.82f};
  H4 best{};
  F4 least = splat(HUGE_VALF);
  for (const F4& candidate : candidates) {
    const H4 half = to_f16(candidate);
    const F4 error = encode<false>(nullptr, values, group, from_f16(half), -8.0f, 7.0f);
    const auto better = error < least;
    least = better ? error : least;
    best = __builtin_convertvector(better, H4) != uint16_t{0} ? half : best;
  }
  return best;
}

void put_codes(std::byte* out, const float* codes, int group, WeightFormat format) {
  alignas(16) uint16_t vector[2 * kTile];
  const int step = format == WeightFormat::int4 ? 8 : 4;
  for (int i = 0; i < group; i += step, out += sizeof(vector)) {
    for (int p = 0; p < 2; ++p) {
      const float* c = codes + (i + p) * kTile;
      for (int o = 0; o < kTile; ++o) {
        if (format == WeightFormat::int4) {
          const auto nibble = [&](int j) {
            return static_cast<int>(c[2 * j * kTile + o] + 8.0f) << (4 * j);
          };
          vector[2 * o + p] = static_cast<uint16_t>(nibble(0) | nibble(1) | nibble(2) | nibble(3));
        } else {
          const int low = static_cast<int>(c[o]), high = static_cast<int>(c[2 * kTile + o]);
          vector[2 * o + p] = static_cast<uint16_t>((low & 0xff) | (high & 0xff) << 8);
        }
      }
    }
    std::memcpy(out, vector, sizeof(vector));
  }
}

void pack_quantized(std::byte* tile, const WeightSpec& spec, TileReader& reader, int index) {
  std::vector<float> values(static_cast<size_t>(spec.group) * kTile), codes(values.size());
  const int code_bits = spec.format == WeightFormat::int4 ? 4 : 8;
  std::byte* out = tile + spec.scale_bytes();
  std::memset(tile, 0, spec.scale_bytes());
  for (int g = 0; g < spec.k / spec.group; ++g) {
    reader.read(values.data(), index, g * spec.group, spec.group);
    for (int quad = 0; quad < kQuads; ++quad) {
      const float* from = values.data() + quad * 4;
      const bool int4 = spec.format == WeightFormat::int4;
      const H4 half = int4 ? int4_scale(from, spec.group) : int8_scale(from, spec.group);
      for (int lane = 0; lane < 4; ++lane)
        require<Format>((half[lane] & 0x7c00) != 0x7c00, "the scale of output feature ",
                        index * kTile + quad * 4 + lane, ", input features from ", g * spec.group,
                        ", does not fit float16");
      std::memcpy(tile + (g * kTile + quad * 4) * 2, &half, sizeof(half));
      encode<true>(codes.data() + quad * 4, from, spec.group, from_f16(half),
                   int4 ? -8.0f : -127.0f, int4 ? 7.0f : 127.0f);
    }
    put_codes(out, codes.data(), spec.group, spec.format);
    out += spec.group * kTile * code_bits / 8;
  }
}

// Codes and scales that the source has already.
void pack_coded(std::byte* tile, const WeightSpec& spec, const void* source, int index) {
  struct Coded {
    int16_t code;
    uint16_t scale;
  };
  static_assert(sizeof(Coded) == 4);
  const auto* weights = static_cast<const Coded*>(source);
  const bool int4 = spec.format == WeightFormat::int4;
  const int low = int4 ? -8 : -128, high = int4 ? 7 : 127;
  std::vector<float> codes(static_cast<size_t>(spec.group) * kTile, 0.0f);
  std::memset(tile, 0, spec.scale_bytes());
  std::byte* out = tile + spec.scale_bytes();
  for (int g = 0; g < spec.k / spec.group; ++g) {
    for (int o = 0; o < std::min(kTile, spec.n - index * kTile); ++o) {
      const int row = index * kTile + o, begin = g * spec.group;
      const Coded* from = weights + static_cast<int64_t>(row) * spec.k + begin;
      const uint16_t scale = from[0].scale;
      require<Format>((scale & 0x7c00) != 0x7c00, "the scale of output feature ", row,
                      ", input features from ", begin, ", is not finite in float16");
      for (int i = 0; i < spec.group; ++i) {
        require<Format>(from[i].scale == scale, "the scale of output feature ", row,
                        " changes at input feature ", begin + i, ", within a group of ",
                        spec.group);
        require<Format>(from[i].code >= low && from[i].code <= high, "code ", from[i].code,
                        " of output feature ", row, ", input feature ", begin + i, ", is no ",
                        format_name(spec.format));
        codes[static_cast<size_t>(i * kTile + o)] = static_cast<float>(from[i].code);
      }
      std::memcpy(tile + (g * kTile + o) * 2, &scale, sizeof(scale));
    }
    put_codes(out, codes.data(), spec.group, spec.format);
    out += spec.group * kTile * (int4 ? 4 : 8) / 8;
  }
}

void pack_dense(std::byte* tile, const WeightSpec& spec, TileReader& reader, int index) {
  alignas(16) float values[kMaxGroup * kTile];
  for (int begin = 0; begin < spec.k; begin += kMaxGroup) {
    const int count = std::min(kMaxGroup, spec.k - begin);
    const int total = count * kTile;
    reader.read(values, index, begin, count);
    if (spec.format == WeightFormat::f32) {
      std::memcpy(tile, values, static_cast<size_t>(total) * 4);
      tile += total * 4;
      continue;
    }
    const bool f16 = spec.format == WeightFormat::f16;
    const uint16_t infinity = f16 ? 0x7c00 : 0x7f80;
    H4 overflow{};
    for (int i = 0; i < total; i += 4, tile += sizeof(H4)) {
      const F4 v = load4(values + i);
      const H4 half = f16 ? to_f16(v) : to_bf16(v);
      overflow |= reinterpret_cast<H4>((half & infinity) == infinity);
      std::memcpy(tile, &half, sizeof(half));
    }
    require<Format>((overflow[0] | overflow[1] | overflow[2] | overflow[3]) == 0,
                    "a weight does not fit ", format_name(spec.format), ", in output features ",
                    index * kTile, " to ", std::min(spec.n, (index + 1) * kTile) - 1);
  }
}

void check_spec(const WeightSpec& spec) {
  require(spec.n > 0 && spec.k > 0, "a weight needs positive sizes, got n ", spec.n, ", k ",
          spec.k);
  require(!spec.has_zero || spec.format == WeightFormat::int4,
          "only int4 weights have offsets, not ", format_name(spec.format));
  if (!is_quantized(spec.format)) return;
  require(spec.group == 32 || spec.group == 64 || spec.group == 128,
          "the group of a quantized weight is 32, 64 or 128, not ", spec.group);
  require(spec.k % spec.group == 0, "k ", spec.k, " is not a multiple of the group ", spec.group);
}

uint16_t word_at(const std::byte* p) {
  uint16_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

float half_at(const std::byte* p) { return from_f16(H4{word_at(p), 0, 0, 0})[0]; }

float bf16_at(const std::byte* p) { return floats_of(U4{uint32_t{word_at(p)} << 16, 0, 0, 0})[0]; }

uint64_t mix(uint64_t z) {  // the output function of splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

class Random {
 public:
  Random(uint64_t seed, int tile)
      : state_(mix(seed) ^ mix(static_cast<uint64_t>(tile) + 0x632be59bd9b4e019u)) {}
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15u); }

 private:
  uint64_t state_;
};

// Uniform codes; the scale gives them the deviation asked for. Symmetric int4 codes have a mean of
// -0.5, which the random signs of the scales take away.
void fill_quantized(std::byte* tile, const WeightSpec& spec, Random& random, float std, int lanes) {
  const bool int4 = spec.format == WeightFormat::int4;
  const float rms = !int4 ? 73.9f : spec.has_zero ? 4.61f : 4.637f;
  const uint16_t scale = to_f16(splat(std / rms))[0];
  const uint16_t offset = to_f16(splat(std / rms * 7.5f))[0];
  const size_t area = spec.scale_bytes();
  std::memset(tile, 0, area * (spec.has_zero ? 2 : 1));
  for (int g = 0; g < spec.k / spec.group; ++g) {
    const uint64_t signs = random.next();
    for (int o = 0; o < lanes; ++o) {
      const bool flip = int4 && !spec.has_zero && (signs >> o & 1);
      const uint16_t s = static_cast<uint16_t>(scale | (flip ? 0x8000 : 0));
      const size_t at = static_cast<size_t>(g * kTile + o) * 2;
      std::memcpy(tile + at, &s, 2);
      if (spec.has_zero) std::memcpy(tile + area + at, &offset, 2);
    }
  }
  for (size_t at = area * (spec.has_zero ? 2 : 1); at < spec.tile_bytes(); at += 8) {
    const uint64_t word = random.next();
    std::memcpy(tile + at, &word, 8);
  }
}

void fill_dense(std::byte* tile, const WeightSpec& spec, Random& random, float std, int lanes) {
  const float step = std * 1.7320508f / 32768.0f;  // uniform over [-sqrt(3) std, sqrt(3) std)
  for (int i = 0; i < spec.k; ++i) {
    for (int quad = 0; quad < kQuads; ++quad) {
      const uint64_t word = random.next();
      F4 v{};
      for (int j = 0; j < 4; ++j) {
        const int16_t drawn = static_cast<int16_t>(word >> (16 * j));
        v[j] = quad * 4 + j < lanes ? static_cast<float>(drawn) * step : 0.0f;
      }
      if (spec.format == WeightFormat::f32) {
        std::memcpy(tile, &v, sizeof(v));
        tile += sizeof(v);
      } else {
        const H4 half = spec.format == WeightFormat::f16 ? to_f16(v) : to_bf16(v);
        std::memcpy(tile, &half, sizeof(half));
        tile += sizeof(half);
      }
    }
  }
}

}  // namespace

void pack_tiles(std::byte* matrix, const WeightSpec& spec, const void* source, DType dtype,
                int tile_begin, int tile_end) {
  check_spec(spec);
  require(!spec.has_zero, "packing makes symmetric weights; this spec asks for offsets");
  TileReader reader(source, dtype, spec.n, spec.k);
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    std::byte* out = matrix + spec.tile_bytes() * static_cast<size_t>(tile);
    if (dtype == DType::coded) {
      require(is_quantized(spec.format), "codes cannot be packed as ", format_name(spec.format));
      pack_coded(out, spec, source, tile);
    } else if (is_quantized(spec.format)) {
      pack_quantized(out, spec, reader, tile);
    } else {
      pack_dense(out, spec, reader, tile);
    }
  }
}

void unpack_row(float* out, const WeightSpec& spec, const std::byte* matrix, int row) {
  const size_t lane = static_cast<size_t>(row % kTile);
  const std::byte* tile = matrix + spec.tile_bytes() * static_cast<size_t>(row / kTile);
  const size_t area = spec.scale_bytes();
  const std::byte* codes = tile + area * (spec.has_zero ? 2 : 1);
  for (int i = 0; i < spec.k; ++i) {
    const size_t at = static_cast<size_t>(i) * kTile + lane;
    if (spec.format == WeightFormat::f32) {
      std::memcpy(out + i, tile + at * 4, 4);
    } else if (spec.format == WeightFormat::f16) {
      out[i] = half_at(tile + at * 2);
    } else if (spec.format == WeightFormat::bf16) {
      out[i] = bf16_at(tile + at * 2);
    } else {
      const bool int4 = spec.format == WeightFormat::int4;
      const int step = int4 ? 8 : 4;
      const size_t pair = 2 * lane + static_cast<size_t>(i & 1);
      const int word = word_at(codes + static_cast<size_t>(i / step) * 64 + pair * 2);
      const size_t s = (static_cast<size_t>(i / spec.group) * kTile + lane) * 2;
      const float scale = half_at(tile + s);
      const int part = i % step / 2;
      if (!int4) {
        out[i] = scale * static_cast<float>(static_cast<int8_t>(word >> (8 * part)));
      } else if (spec.has_zero) {
        out[i] = scale * static_cast<float>(word >> (4 * part) & 15) - half_at(tile + area + s);
      } else {
        out[i] = scale * static_cast<float>((word >> (4 * part) & 15) - 8);
      }
    }
  }
}

void unpack(float* out, const WeightSpec& spec, const std::byte* matrix) {
  for (int row = 0; row < spec.n; ++row)
    unpack_row(out + static_cast<int64_t>(row) * spec.k, spec, matrix, row);
}

void fill_random(std::byte* matrix, const WeightSpec& spec, uint64_t seed, float std,
                 int tile_begin, int tile_end) {
  check_spec(spec);
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    Random random(seed, tile);
    std::byte* out = matrix + spec.tile_bytes() * static_cast<size_t>(tile);
    const int lanes = std::min(kTile, spec.n - tile * kTile);
    if (is_quantized(spec.format)) {
      fill_quantized(out, spec, random, std, lanes);
    } else {
      fill_dense(out, spec, random, std, lanes);
    }
  }
}

}  // namespace qwen_moe::cpu
