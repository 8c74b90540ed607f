// The kernels for processors with AVX2, FMA and F16C: vectors of 8 floats.
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace qwen_moe::cpu {
namespace {

using F = __m256;
using I = __m256i;
constexpr int kW = 8;                    // floats in a vector
constexpr int kDenseRows = 3;            // rows that share one read of a dense tile
constexpr int kQuantRows = 4;            // rows that share one expansion of a quantized tile
constexpr int kMmRows = 6, kMmVecs = 2;  // register block of matmul
constexpr int kDotRows = 2;              // by 4 columns, register block of matmul_bt
constexpr int kStateVecs = 4;            // columns of a recurrent state held at once
constexpr std::string_view kName = "avx2";

alignas(32) constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i lanes(int n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
}

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load_n(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline void store_n(float* p, F v, int n) { _mm256_maskstore_ps(p, lanes(n), v); }
inline F keep_n(F v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(lanes(n))); }
inline F fill_n(F v, float rest, int n) {
  return _mm256_blendv_ps(set1(rest), v, _mm256_castsi256_ps(lanes(n)));
}
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }  // b when either is NaN
inline F max(F a, F b) { return _mm256_max_ps(a, b); }  // b when either is NaN
inline F negate_abs(F a) { return _mm256_or_ps(a, set1(-0.0f)); }
inline F select_negative(F x, F if_negative, F otherwise) {
  return _mm256_blendv_ps(otherwise, if_negative, x);
}
// The larger one; NaN when either is.
inline F max_nan(F a, F b) {
  return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline F round_even(F a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for n in [-252, 254]: two factors, so that only the last product can leave the range.
inline F times_exp2(F a, F n) {
  const I whole = _mm256_cvtps_epi32(n);
  const I half = _mm256_srai_epi32(whole, 1);
  const I bias = _mm256_set1_epi32(127);
  const I one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const I two = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return mul(mul(a, _mm256_castsi256_ps(one)), _mm256_castsi256_ps(two));
}

inline __m128 fold(F v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

inline F load_f16(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline F load_bf16(const void* p) {
  const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store_words(uint16_t* p, I v) {  // the low 16 bits of every lane, already below 2^16
  const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
inline void store_bf16(uint16_t* p, F v) {
  const I bits = _mm256_castps_si256(v);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const I quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  store_words(p, _mm256_blendv_epi8(rounded, quiet, nan));
}

// Integers: 16 lanes of 16 bits, or 8 of 32.
inline I izero() { return _mm256_setzero_si256(); }
inline I iset1(int32_t v) { return _mm256_set1_epi32(v); }
inline I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
inline I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I load_raw(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <int kNibble>
inline I nibble(I v) {
  const I shifted = kNibble == 0 ? v : _mm256_srli_epi16(v, kNibble * 4);
  return kNibble == 3 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16(15));
}
inline I low_byte(I v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
inline I high_byte(I v) { return _mm256_srai_epi16(v, 8); }
inline I pair(const int16_t* p) {  // two consecutive values in every 32-bit lane
  int32_t both;
  __builtin_memcpy(&both, p, sizeof(both));
  return _mm256_set1_epi32(both);
}
inline I dot2(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline I abs_bits(F v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
inline I imax(I a, I b) { return _mm256_max_epi32(a, b); }
inline void istore(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline I round_to_int(F v) { return _mm256_cvtps_epi32(v); }
inline void store_i16(int16_t* p, I v) {
  const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
}

inline I iadd64(I a, I b) { return _mm256_add_epi64(a, b); }

}  // namespace
}  // namespace qwen_moe::cpu

#include "cpu/kernels_impl.h"

namespace qwen_moe::cpu {
const Kernels& kernels_avx2() { return kTable; }
}  // namespace qwen_moe::cpu
#endif
