// The kernels for any processor: vectors of 4 floats in the compiler's own vector types, which
// become SSE2, NEON or scalar code.
#include "cpu/kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace qwen_moe::cpu {
namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int16_t S8 __attribute__((vector_size(16)));
typedef uint16_t U8 __attribute__((vector_size(16)));
typedef uint16_t U4 __attribute__((vector_size(8)));
typedef int16_t S4 __attribute__((vector_size(8)));
typedef uint64_t L __attribute__((vector_size(16)));
constexpr int kW = 4;                    // floats in a vector
constexpr int kDenseRows = 1;            // rows that share one read of a dense tile
constexpr int kQuantRows = 2;            // rows that share one expansion of a quantized tile
constexpr int kMmRows = 4, kMmVecs = 2;  // register block of matmul
constexpr int kDotRows = 2;              // by 4 columns, register block of matmul_bt
constexpr int kStateVecs = 4;            // columns of a recurrent state held at once
constexpr std::string_view kName = "portable";

template <class T>
inline T load_as(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline F zero() { return F{}; }
inline F set1(float v) { return F{v, v, v, v}; }
inline F load(const float* p) { return load_as<F>(p); }
inline F load_n(const float* p, int n) {
  F v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store_n(float* p, F v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
inline F fill_n(F v, float rest, int n) {
  for (int i = n; i < kW; ++i) v[i] = rest;
  return v;
}
inline F keep_n(F v, int n) { return fill_n(v, 0.0f, n); }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }  // rounded twice
inline F min(F a, F b) { return a < b ? a : b; }   // b when either is NaN
inline F max(F a, F b) { return a > b ? a : b; }   // b when either is NaN
inline F negate_abs(F a) { return reinterpret_cast<F>(reinterpret_cast<U>(a) | 0x80000000u); }
inline F select_negative(F x, F if_negative, F otherwise) {
  return reinterpret_cast<I>(x) < 0 ? if_negative : otherwise;
}
inline F max_nan(F a, F b) { return a != a ? a : max(a, b); }  // NaN when either is
inline F round_even(F a) {  // for |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction
  const F magic = set1(12582912.0f);
  return (a + magic) - magic;
}
// a * 2^n for n in [-252, 254]: two factors, so that only the last product can leave the range.
inline F times_exp2(F a, F n) {
  const I whole = __builtin_convertvector(n, I);
  const I half = whole >> 1;
  return a * reinterpret_cast<F>((half + 127) << 23) *
         reinterpret_cast<F>((whole - half + 127) << 23);
}

inline F load_bf16(const void* p) {
  return reinterpret_cast<F>(__builtin_convertvector(load_as<U4>(p), U) << 16);
}
inline F load_f16(const void* p) {
  const U bits = __builtin_convertvector(load_as<U4>(p), U);
  const U sign = (bits & 0x8000u) << 16, body = (bits & 0x7fffu) << 13;
  // Put the exponent in place by a product, which also normalises what f16 holds as denormal.
  const F value = reinterpret_cast<F>(body) * set1(0x1p112f);
  const U special = reinterpret_cast<U>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<F>(reinterpret_cast<U>(value) | special | sign);
}
inline void store_bf16(uint16_t* p, F v) {
  const U bits = reinterpret_cast<U>(v);
  const U rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const U words = v != v ? (bits >> 16) | 0x40u : rounded;
  const U4 packed = __builtin_convertvector(words, U4);
  __builtin_memcpy(p, &packed, sizeof(packed));
}

// Integers: 8 lanes of 16 bits, or 4 of 32.
inline I izero() { return I{}; }
inline I iset1(int32_t v) { return I{v, v, v, v}; }
inline I iadd(I a, I b) { return a + b; }
inline I isub(I a, I b) { return a - b; }
inline F to_float(I a) { return __builtin_convertvector(a, F); }
inline I load_raw(const void* p) { return load_as<I>(p); }
template <int kNibble>
inline I nibble(I v) {
  return reinterpret_cast<I>((reinterpret_cast<U8>(v) >> (kNibble * 4)) & uint16_t{15});
}
inline I low_byte(I v) { return reinterpret_cast<I>((reinterpret_cast<S8>(v) << 8) >> 8); }
inline I high_byte(I v) { return reinterpret_cast<I>(reinterpret_cast<S8>(v) >> 8); }
inline I pair(const int16_t* p) { return iset1(load_as<int32_t>(p)); }  // two values in every lane
inline I dot2(I sum, I a, I b) {
#if defined(__SSE2__)
  return sum + reinterpret_cast<I>(
                   _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
inline I abs_bits(F v) { return reinterpret_cast<I>(v) & 0x7fffffff; }
inline I imax(I a, I b) { return a > b ? a : b; }
inline void istore(int32_t* p, I v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline I round_to_int(F v) { return __builtin_convertvector(round_even(v), I); }
inline void store_i16(int16_t* p, I v) {
  const S4 packed = __builtin_convertvector(v, S4);
  __builtin_memcpy(p, &packed, sizeof(packed));
}

inline I iadd64(I a, I b) {
  return reinterpret_cast<I>(reinterpret_cast<L>(a) + reinterpret_cast<L>(b));
}

inline F fold(F v) { return v; }

}  // namespace
}  // namespace qwen_moe::cpu

#include "cpu/kernels_impl.h"

namespace qwen_moe::cpu {
const Kernels& kernels_portable() { return kTable; }
}  // namespace qwen_moe::cpu
