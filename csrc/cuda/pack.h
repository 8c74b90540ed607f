// Packing on the GPU: what cpu/pack.h makes of a matrix, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "base/tensor.h"
#include "model/quant.h"

namespace qwen_moe::cuda {

// Whether `pack_on_device` makes such tiles of such weights.
bool packs_on_device(const WeightSpec& spec, DType dtype);

// Packs `spec.count` matrices into tiles in host order. All pointers are of the device: `rows`
// [count, n, k] of `dtype`, `to` takes spec.bytes(). `bad` becomes 1 where the host would throw: a
// weight is not finite or does not fit bf16, or its scale does not fit f16.
void pack_on_device(std::byte* to, const WeightSpec& spec, const void* rows, DType dtype, int* bad,
                    cudaStream_t stream);

}  // namespace qwen_moe::cuda
