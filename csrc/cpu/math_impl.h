// Element-wise functions, reductions and norms. See kernels_impl.h for how this file is compiled.
//
// Reductions keep four vectors of partial sums and fold them in one fixed order, so the result
// depends only on the values and their number.
#pragma once

#include "cpu/kernels.h"

namespace qwen_moe::cpu {
namespace {

constexpr int kPrefetch = 8192;  // bytes ahead of what a loop over much memory reads

// Into L2 only: the few buffers that L1 misses wait in stay free for the loads of the loop itself.
inline void prefetch_ahead(const std::byte* p) { __builtin_prefetch(p + kPrefetch, 0, 2); }

typedef float Quad __attribute__((vector_size(16)));

inline float sum_lanes(F v) {
  const Quad four = static_cast<Quad>(fold(v));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The four sums of the lanes of a, b, c, d, each bit for bit as sum_lanes gives it.
inline Quad sum_lanes4(F a, F b, F c, F d) {
  const Quad qa = static_cast<Quad>(fold(a)), qb = static_cast<Quad>(fold(b));
  const Quad qc = static_cast<Quad>(fold(c)), qd = static_cast<Quad>(fold(d));
  const Quad ab =
      __builtin_shufflevector(qa, qb, 0, 4, 1, 5) + __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
  const Quad cd =
      __builtin_shufflevector(qc, qd, 0, 4, 1, 5) + __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Applies op(index, lanes) to every vector of n elements; the last may be short.
template <class Op>
inline void for_vectors(int n, const Op& op) {
  int i = 0;
  for (; i + kW <= n; i += kW) op(i, kW);
  if (i < n) op(i, n - i);
}

inline F load_some(const float* p, int lanes) { return lanes == kW ? load(p) : load_n(p, lanes); }
inline void store_some(float* p, F v, int lanes) {
  lanes == kW ? store(p, v) : store_n(p, v, lanes);
}

float dot(const float* a, const float* b, int n) {
  F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + kW), load(b + i + kW), s1);
    s2 = fma(load(a + i + 2 * kW), load(b + i + 2 * kW), s2);
    s3 = fma(load(a + i + 3 * kW), load(b + i + 3 * kW), s3);
  }
  for (; i + kW <= n; i += kW) s0 = fma(load(a + i), load(b + i), s0);
  if (i < n) s1 = fma(load_n(a + i, n - i), load_n(b + i, n - i), s1);
  return sum_lanes(add(add(s0, s1), add(s2, s3)));
}

void axpy(float* y, float a, const float* x, int n) {
  const F factor = set1(a);
  for_vectors(n, [&](int i, int lanes) {
    store_some(y + i, fma(factor, load_some(x + i, lanes), load_some(y + i, lanes)), lanes);
  });
}

void scale(float* y, float a, int n) {
  const F factor = set1(a);
  for_vectors(
      n, [&](int i, int lanes) { store_some(y + i, mul(factor, load_some(y + i, lanes)), lanes); });
}

void add_to(float* y, const float* x, int n) {
  for_vectors(n, [&](int i, int lanes) {
    store_some(y + i, add(load_some(y + i, lanes), load_some(x + i, lanes)), lanes);
  });
}

// -inf when n is 0; NaN when any element is.
float max_of(const float* x, int n) {
  const float lowest = -__builtin_inff();
  F best = set1(lowest);
  for_vectors(n, [&](int i, int lanes) {
    const F v = load_some(x + i, lanes);
    best = max_nan(best, lanes == kW ? v : fill_n(v, lowest, lanes));
  });
  float all[kW];
  store(all, best);
  float result = all[0];
  for (int i = 1; i < kW; ++i)
    if (all[i] > result || all[i] != all[i]) result = all[i];
  for (int i = 0; i < kW; ++i)
    if (all[i] != all[i]) return all[i];
  return result;
}

// e^x to about 1 ulp over the whole range, denormal results included; NaN stays NaN.
inline F exp_of(F x) {
  // Beyond these the result is 0 or infinity anyway. The order of operands keeps NaN.
  x = min(set1(89.0f), max(set1(-105.0f), x));
  const F n = round_even(mul(x, set1(1.44269504088896341f)));
  // ln 2 in two parts, the first short enough for n * part to be exact.
  F r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), r);
  return times_exp2(add(p, set1(1.0f)), n);
}

// 1 / (1 + e^-x) through e^-|x|, which cannot overflow and keeps small results exact.
inline F sigmoid_of(F x) {
  const F e = exp_of(negate_abs(x));
  return div(select_negative(x, e, set1(1.0f)), add(set1(1.0f), e));
}

inline F silu_of(F x) { return mul(x, sigmoid_of(x)); }

float exp_sum(float* x, float shift, int n) {
  const F minus = set1(shift);
  F total[2] = {zero(), zero()};
  int i = 0;
  for (; i + 2 * kW <= n; i += 2 * kW) {
    for (int j = 0; j < 2; ++j) {
      const F e = exp_of(sub(load(x + i + j * kW), minus));
      store(x + i + j * kW, e);
      total[j] = add(total[j], e);
    }
  }
  for (; i < n; i += kW) {
    const int lanes = n - i < kW ? n - i : kW;
    F e = exp_of(sub(load_some(x + i, lanes), minus));
    store_some(x + i, e, lanes);
    if (lanes < kW) e = keep_n(e, lanes);
    total[0] = add(total[0], e);
  }
  return sum_lanes(add(total[0], total[1]));
}

void rms_norm(float* out, const float* x, const float* weight, int n, float eps) {
  const float mean = dot(x, x, n) / static_cast<float>(n);
  const F factor = set1(1.0f / __builtin_sqrtf(mean + eps));
  for_vectors(n, [&](int i, int lanes) {
    const F v = mul(load_some(x + i, lanes), factor);
    store_some(out + i, mul(v, load_some(weight + i, lanes)), lanes);
  });
}

void gated_rms_norm(float* out, const float* x, const float* weight, const float* z, int n,
                    float eps) {
  const float mean = dot(x, x, n) / static_cast<float>(n);
  const F factor = set1(1.0f / __builtin_sqrtf(mean + eps));
  for_vectors(n, [&](int i, int lanes) {
    const F v = mul(mul(load_some(x + i, lanes), factor), load_some(weight + i, lanes));
    store_some(out + i, mul(v, silu_of(load_some(z + i, lanes))), lanes);
  });
}

void l2_norm(float* out, const float* x, float factor, int n, float eps) {
  const F total = set1(factor / __builtin_sqrtf(dot(x, x, n) + eps));
  for_vectors(n, [&](int i, int lanes) {
    store_some(out + i, mul(load_some(x + i, lanes), total), lanes);
  });
}

void silu_mul(float* out, const float* gate, const float* up, int n) {
  for_vectors(n, [&](int i, int lanes) {
    const F g = silu_of(load_some(gate + i, lanes));
    store_some(out + i, mul(g, load_some(up + i, lanes)), lanes);
  });
}

void sigmoid_mul(float* out, const float* x, const float* gate, int n) {
  for_vectors(n, [&](int i, int lanes) {
    const F g = sigmoid_of(load_some(gate + i, lanes));
    store_some(out + i, mul(load_some(x + i, lanes), g), lanes);
  });
}

void conv_silu(float* out, const float* const* taps, const float* weight, int kernel,
               int channels) {
  for_vectors(channels, [&](int i, int lanes) {
    F total = zero();
    for (int j = 0; j < kernel; ++j) {
      const F w = load_some(weight + static_cast<int64_t>(j) * channels + i, lanes);
      total = fma(load_some(taps[j] + i, lanes), w, total);
    }
    store_some(out + i, silu_of(total), lanes);
  });
}

void quantize_rows(int16_t* q, float* scales, int32_t* sums, const float* x, int rows, int k,
                   int group) {
  const int64_t blocks = static_cast<int64_t>(rows) * (k / group);
  for (int64_t b = 0; b < blocks; ++b, x += group, q += group) {
    // As integers the bits of |x| order like the values, with infinity and NaN on top.
    I top = izero();
    for (int i = 0; i < group; i += kW) top = imax(top, abs_bits(load(x + i)));
    int32_t all[kW], largest = 0;
    istore(all, top);
    for (int i = 0; i < kW; ++i) largest = all[i] > largest ? all[i] : largest;
    float bound;
    __builtin_memcpy(&bound, &largest, sizeof(bound));
    float inverse = 32767.0f / bound;
    scales[b] = bound / 32767.0f;
    if (largest >= 0x7f800000) {  // not finite: every product of this block must say so
      scales[b] = __builtin_nanf("");
      inverse = 0.0f;
    } else if (bound < 0x1p-100f) {  // 1 / scale could overflow; nothing of this size matters
      scales[b] = 0.0f;
      inverse = 0.0f;
    }
    const F factor = set1(inverse);
    I sum = izero();
    for (int i = 0; i < group; i += kW) {
      I v = izero();
      if (inverse != 0.0f) v = round_to_int(mul(load(x + i), factor));
      store_i16(q + i, v);
      sum = iadd(sum, v);
    }
    istore(all, sum);
    int32_t total = 0;
    for (int i = 0; i < kW; ++i) total += all[i];
    sums[b] = total;
  }
}

void bf16_to_f32(float* out, const uint16_t* x, int64_t n) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store(out + i, load_bf16(x + i));
  for (; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    __builtin_memcpy(out + i, &bits, sizeof(bits));
  }
}

void f32_to_bf16(uint16_t* out, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store_bf16(out + i, load(x + i));
  if (i < n) {
    uint16_t last[kW];
    store_bf16(last, load_n(x + i, static_cast<int>(n - i)));
    for (int j = 0; i < n; ++i, ++j) out[i] = last[j];
  }
}

void f16_to_f32(float* out, const uint16_t* x, int64_t n) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store(out + i, load_f16(x + i));
  if (i < n) {
    uint16_t last[kW] = {};
    for (int64_t j = i; j < n; ++j) last[j - i] = x[j];
    store_n(out + i, load_f16(last), static_cast<int>(n - i));
  }
}

// The sum of the data as 64-bit words (the rest as single bytes), so that no read can be left out.
uint64_t read_bytes(const std::byte* data, size_t n) {
  constexpr size_t kBytes = kW * 4;
  I sum[4] = {izero(), izero(), izero(), izero()};
  size_t i = 0;
  for (; i + 4 * kBytes <= n; i += 4 * kBytes) {
    for (size_t j = 0; j < 4 * kBytes; j += 64) prefetch_ahead(data + i + j);
    for (size_t j = 0; j < 4; ++j) sum[j] = iadd64(sum[j], load_raw(data + i + j * kBytes));
  }
  uint64_t words[kW / 2], total = 0;
  const I all = iadd64(iadd64(sum[0], sum[1]), iadd64(sum[2], sum[3]));
  istore(reinterpret_cast<int32_t*>(words), all);
  for (int j = 0; j < kW / 2; ++j) total += words[j];
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, data + i, sizeof(word));
    total += word;
  }
  for (; i < n; ++i) total += static_cast<uint64_t>(data[i]);
  return total;
}

}  // namespace
}  // namespace qwen_moe::cpu
