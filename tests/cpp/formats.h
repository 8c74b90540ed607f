// Plain, slow versions of number formats, for the tests of kernels and packing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/pack.h"

namespace qwen_moe::cpu {

using Floats = std::vector<float>;
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();

inline Floats random_floats(size_t n, uint32_t seed, float std = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, std);
  Floats values(n);
  for (float& v : values) v = normal(engine);
  return values;
}

inline uint16_t bf16_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (std::isnan(v)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  const uint32_t rest = bits & 0xffff, high = bits >> 16;
  return static_cast<uint16_t>(high + (rest > 0x8000 || (rest == 0x8000 && (high & 1))));
}

inline float bf16_value(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline float f16_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? kNan : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

// The finite f16 nearest to v; ties to even.
inline uint16_t f16_of(float v) {
  uint16_t low = 0, high = 0x7bff;
  const float size = std::fabs(v);
  while (high - low > 1) {
    const uint16_t mid = static_cast<uint16_t>((low + high) / 2);
    (f16_value(mid) <= size ? low : high) = mid;
  }
  const double down = double{size} - f16_value(low), up = double{f16_value(high)} - size;
  const uint16_t best = up < down || (up == down && !(high & 1)) ? high : low;
  return static_cast<uint16_t>(best | (std::signbit(v) ? 0x8000 : 0));
}

inline std::vector<std::byte> random_weight(const WeightSpec& spec, uint64_t seed = 7) {
  std::vector<std::byte> weight(spec.matrix_bytes());
  fill_random(weight.data(), spec, seed, 0.05f, 0, spec.tiles());
  return weight;
}

inline std::string label(const WeightSpec& s) {
  return concat(format_name(s.format), " n ", s.n, " k ", s.k, " group ", s.group,
                s.has_zero ? " zero" : "");
}

}  // namespace qwen_moe::cpu
