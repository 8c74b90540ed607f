// The inner loops of the CPU backend as a table of functions, one table per instruction set. The
// same source (kernels_impl.h) is compiled three times; kernels() picks the best one at run time.
//
// Every function works on one thread, allocates nothing, and treats each row alone: the bits of a
// row never depend on how many rows came with it. Pointers need no alignment unless said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "model/quant.h"

namespace qwen_moe::cpu {

// Rows of activations in the forms that the weight formats consume.
// Dense weights read `x`. Quantized weights read `q`: block fixed point with 16 bits and one scale
// per `group` values (relative error below 2^-15 of the block's largest value, finer than bf16), so
// that products are summed exactly in 32-bit integers and only block sums meet floating point.
struct Activations {
  const float* x = nullptr;      // [rows, k]
  const int16_t* q = nullptr;    // [rows, k]
  const float* scale = nullptr;  // [rows, k / group]
  const int32_t* sum = nullptr;  // [rows, k / group] sum of q over the block
};

struct GemmArgs {
  float* out;               // [rows, n] with row stride out_stride; written, not added to
  int64_t out_stride;       // in elements
  const std::byte* weight;  // one matrix in the packed layout of model/quant.h
  const WeightSpec* spec;
  Activations in;            // row r of `out` comes from row row_index[r] of `in`
  const int32_t* row_index;  // [rows], or null for 0, 1, 2, ...
  int rows;
  int tile_begin,
      tile_end;  // tiles of 16 outputs to compute; the padding of the last is not written
};

struct Kernels {
  std::string_view name;  // "portable", "avx2", "avx512"

  void (*gemm)(const GemmArgs& args);

  // x [rows, k] -> q [rows, k], scale and sum [rows, k / group]. Round to nearest even.
  void (*quantize_rows)(int16_t* q, float* scale, int32_t* sum, const float* x, int rows, int k,
                        int group);

  // Row-major small matrix products in fp32. C [m, n] = A [m, k] B [k, n]; with `accumulate` C +=
  // ...
  void (*matmul)(float* c, const float* a, const float* b, int m, int n, int k, int64_t ldc,
                 int64_t lda, int64_t ldb, bool accumulate);
  // C [m, n] = A [m, k] B[n, k]^T
  void (*matmul_bt)(float* c, const float* a, const float* b, int m, int n, int k, int64_t ldc,
                    int64_t lda, int64_t ldb, bool accumulate);
  // C [m, n] = A [k, m]^T B [k, n]
  void (*matmul_at)(float* c, const float* a, const float* b, int m, int n, int k, int64_t ldc,
                    int64_t lda, int64_t ldb, bool accumulate);

  // As matmul and matmul_bt with B in bf16, bit for bit what widening it first gives. Its rows have
  // a multiple of 16 elements. `next`, where it is not null, is another B of the same shape, which
  // is fetched into L2 meanwhile.
  void (*matmul_bf16)(float* c, const float* a, const uint16_t* b, int m, int n, int k, int64_t ldc,
                      int64_t lda, int64_t ldb, bool accumulate, const uint16_t* next);
  void (*matmul_bt_bf16)(float* c, const float* a, const uint16_t* b, int m, int n, int k,
                         int64_t ldc, int64_t lda, int64_t ldb, bool accumulate,
                         const uint16_t* next);

  float (*dot)(const float* a, const float* b, int n);
  void (*axpy)(float* y, float a, const float* x, int n);  // y += a * x
  void (*scale)(float* y, float a, int n);                 // y *= a
  void (*add)(float* y, const float* x, int n);            // y += x
  float (*max)(const float* x, int n);
  float (*exp_sum)(float* x, float shift, int n);  // x = exp(x - shift); returns the sum

  // out = x * rsqrt(mean(x^2) + eps) * weight      (weight already holds 1 + w where the model
  // wants that)
  void (*rms_norm)(float* out, const float* x, const float* weight, int n, float eps);
  // out = x * rsqrt(mean(x^2) + eps) * weight * silu(z)
  void (*gated_rms_norm)(float* out, const float* x, const float* weight, const float* z, int n,
                         float eps);
  // out = x * rsqrt(sum(x^2) + eps) * factor
  void (*l2_norm)(float* out, const float* x, float factor, int n, float eps);
  void (*silu_mul)(float* out, const float* gate, const float* up, int n);    // silu(gate) * up
  void (*sigmoid_mul)(float* out, const float* x, const float* gate, int n);  // x * sigmoid(gate)
  // out[c] = silu(sum_j taps[j][c] * weight[j * channels + c]), j = 0 is the oldest
  void (*conv_silu)(float* out, const float* const* taps, const float* weight, int kernel,
                    int channels);

  // One token of the gated delta rule on one head, one pass over the state [dk, dv]:
  //   S *= decay; delta = beta * (v - S^T k); S += k delta^T; out = S^T q
  void (*gated_delta_step)(float* state, float* out, const float* q, const float* k, const float* v,
                           float decay, float beta, int dk, int dv);

  void (*bf16_to_f32)(float* out, const uint16_t* x, int64_t n);
  void (*f32_to_bf16)(uint16_t* out, const float* x, int64_t n);  // round to nearest even
  void (*f16_to_f32)(float* out, const uint16_t* x, int64_t n);
  uint64_t (*read_bytes)(const std::byte* data,
                         size_t n);  // plain wide read, for the bandwidth ceiling
};

// The table for this processor, or the one asked for by name; throws InvalidArgument when the
// processor lacks it. Chosen once, on first use; QWEN_MOE_ISA in the environment overrides it.
const Kernels& kernels();
const Kernels* kernels_named(std::string_view name);  // null when this processor lacks it

}  // namespace qwen_moe::cpu
