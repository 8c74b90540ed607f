// Between row-major weights and the packed layout of model/quant.h. Runs once, at load.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/tensor.h"
#include "model/quant.h"

namespace qwen_moe::cpu {

// Packs the tiles [tile_begin, tile_end) of one matrix. `source` is [n, k] row-major of `dtype`
// (f32, f16, bf16, or coded for a quantized format: its codes and scales then stay as they are, and
// Format is thrown where the scale changes within a group). Dense formats keep the values of a
// source of the same dtype exactly; otherwise they round to nearest even. int8: symmetric, scale =
// max|w| / 127 of the group. int4: symmetric, scale chosen per group among a few around max|w| / 7
// (and the value of largest magnitude at -8) to minimise the squared error. Scales are f16, and
// codes are computed against the rounded scale. Throws Format when a value is not finite or its
// scale does not fit f16.
void pack_tiles(std::byte* matrix, const WeightSpec& spec, const void* source, DType dtype,
                int tile_begin, int tile_end);

// The float value of every weight of one matrix: out [n, k] row-major.
void unpack(float* out, const WeightSpec& spec, const std::byte* matrix);

// One row (output feature) of one matrix as floats: out [k]. What an embedding look-up reads.
void unpack_row(float* out, const WeightSpec& spec, const std::byte* matrix, int row);

// Random weights of standard deviation about `std`, made directly in the packed layout, for timing
// real shapes without a checkpoint. Same seed, same bytes.
void fill_random(std::byte* matrix, const WeightSpec& spec, uint64_t seed, float std,
                 int tile_begin, int tile_end);

}  // namespace qwen_moe::cpu
