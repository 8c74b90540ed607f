// The kernels for processors with AVX-512 (F, BW, DQ, VL, VNNI): vectors of 16 floats.
#include "cpu/kernels.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics of GCC 12 read a deliberately undefined register (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace qwen_moe::cpu {
namespace {

using F = __m512;
using I = __m512i;
constexpr int kW = 16;                   // floats in a vector
constexpr int kDenseRows = 8;            // rows that share one read of a dense tile
constexpr int kQuantRows = 8;            // rows that share one expansion of a quantized tile
constexpr int kMmRows = 6, kMmVecs = 4;  // register block of matmul
constexpr int kDotRows = 4;              // by 4 columns, register block of matmul_bt
constexpr int kStateVecs = 8;            // columns of a recurrent state held at once
constexpr std::string_view kName = "avx512";

inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
inline F keep_n(F v, int n) { return _mm512_maskz_mov_ps(lanes(n), v); }
inline F fill_n(F v, float rest, int n) { return _mm512_mask_mov_ps(set1(rest), lanes(n), v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }  // b when either is NaN
inline F max(F a, F b) { return _mm512_max_ps(a, b); }  // b when either is NaN
inline F negate_abs(F a) { return _mm512_or_ps(a, set1(-0.0f)); }
inline F select_negative(F x, F if_negative, F otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_movepi32_mask(_mm512_castps_si512(x)), if_negative);
}
// The larger one; NaN when either is.
inline F max_nan(F a, F b) {
  return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
inline F round_even(F a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F times_exp2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, rounded once

inline __m128 fold(F v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline F load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline F load_bf16(const void* p) {
  const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_bf16(uint16_t* p, F v) {
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const I quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

// Integers: 32 lanes of 16 bits, or 16 of 32.
inline I izero() { return _mm512_setzero_si512(); }
inline I iset1(int32_t v) { return _mm512_set1_epi32(v); }
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I load_raw(const void* p) { return _mm512_loadu_si512(p); }
template <int kNibble>
inline I nibble(I v) {
  const I shifted = kNibble == 0 ? v : _mm512_srli_epi16(v, kNibble * 4);
  return kNibble == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15));
}
inline I low_byte(I v) { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); }
inline I high_byte(I v) { return _mm512_srai_epi16(v, 8); }
inline I pair(const int16_t* p) {  // two consecutive values in every 32-bit lane
  int32_t both;
  __builtin_memcpy(&both, p, sizeof(both));
  return _mm512_set1_epi32(both);
}
inline I dot2(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline I abs_bits(F v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}
inline I imax(I a, I b) { return _mm512_max_epi32(a, b); }
inline void istore(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
inline I round_to_int(F v) { return _mm512_cvtps_epi32(v); }
inline void store_i16(int16_t* p, I v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}

inline I iadd64(I a, I b) { return _mm512_add_epi64(a, b); }

}  // namespace
}  // namespace qwen_moe::cpu

#include "cpu/kernels_impl.h"

namespace qwen_moe::cpu {
const Kernels& kernels_avx512() { return kTable; }
}  // namespace qwen_moe::cpu
#endif
