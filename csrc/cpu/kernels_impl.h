// The table of kernels over the vector operations that the including file defines before this line
// (kernels_avx512.cpp, kernels_avx2.cpp, kernels_portable.cpp). Everything here is in an unnamed
// namespace and uses no inline functions of the standard library: the linker may keep any one copy
// of such a function, and must not keep one that needs AVX-512.
#pragma once

#include "cpu/gemm_impl.h"
#include "cpu/math_impl.h"
#include "cpu/matmul_impl.h"

namespace qwen_moe::cpu {
namespace {

constexpr Kernels kTable = {
    .name = kName,
    .gemm = gemm,
    .quantize_rows = quantize_rows,
    .matmul = matmul,
    .matmul_bt = matmul_bt,
    .matmul_at = matmul_at,
    .matmul_bf16 = matmul_bf16,
    .matmul_bt_bf16 = matmul_bt_bf16,
    .dot = dot,
    .axpy = axpy,
    .scale = scale,
    .add = add_to,
    .max = max_of,
    .exp_sum = exp_sum,
    .rms_norm = rms_norm,
    .gated_rms_norm = gated_rms_norm,
    .l2_norm = l2_norm,
    .silu_mul = silu_mul,
    .sigmoid_mul = sigmoid_mul,
    .conv_silu = conv_silu,
    .gated_delta_step = gated_delta_step,
    .bf16_to_f32 = bf16_to_f32,
    .f32_to_bf16 = f32_to_bf16,
    .f16_to_f32 = f16_to_f32,
    .read_bytes = read_bytes,
};

}  // namespace
}  // namespace qwen_moe::cpu
