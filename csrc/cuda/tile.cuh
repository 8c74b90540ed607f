// The device form of a weight tile: the bytes of model/quant.h (same sizes, same scales), with the
// codes in the order in which mma fragments take them.
//
// A tile holds 16 outputs by k inputs: [k / group][16] f16 scales padded to 64 bytes (quantized
// formats), then units of 64 inputs. Lane l of a warp, with q = l / 4 and t = l % 4, holds of step
// s (0 to 3) of a unit the inputs k0 .. k0 + 3, k0 = 32 (s / 2) + 8 t + 4 (s % 2), of the outputs q
// and q + 8:
//   a0 = (q; k0, k0 + 1)   a1 = (q + 8; k0, k0 + 1)   a2 = (q; k0 + 2, k0 + 3)   a3 = (q + 8; ...)
// so that the same lane's activations of steps 2j and 2j + 1 are 8 consecutive inputs of a row.
//   bf16  [k / 64][4 steps][32 lanes][a0 a1 a2 a3]
//   int8  [k / 64][2][32 lanes][16]: bytes of steps 2j and 2j + 1, each a0.lo a0.hi a1.lo .. a3.hi,
//         as code + 128
//   int4  [k / 64][32 lanes][4 words]: word s, nibble p = a_p.lo, nibble p + 4 = a_p.hi
#pragma once

#include <cstdint>

#include "model/quant.h"

namespace qwen_moe::cuda {

inline constexpr int kUnit = 64;  // inputs

__host__ __device__ constexpr int unit_bytes(WeightFormat format) {
  return format == WeightFormat::int4 ? 512 : format == WeightFormat::int8 ? 1024 : 2048;
}

// Where weight (output o of the tile, input k) lies: the byte of the tile's codes that holds it
// (for bf16 the first of two), and for int4 whether it is the high nibble.
struct CodePlace {
  int64_t byte;
  bool high_nibble;
};

__host__ __device__ constexpr CodePlace code_place(WeightFormat format, int o, int k) {
  int unit = k / kUnit, in = k % kUnit;
  int j = in / 32, t = in % 32 / 8, r = in % 8;  // r: 4 (s % 2) + 0..3
  int s = 2 * j + r / 4, p = o / 8 + (r % 4 / 2) * 2, high = r % 2;
  int lane = o % 8 * 4 + t;
  int64_t base = static_cast<int64_t>(unit) * unit_bytes(format);
  if (format == WeightFormat::int4) {
    int nibble = p + 4 * high;
    return {base + lane * 16 + s * 4 + nibble / 2, nibble % 2 == 1};
  }
  if (format == WeightFormat::int8)
    return {base + j * 512 + lane * 16 + r / 4 * 8 + p * 2 + high, false};
  return {base + s * 512 + lane * 16 + p * 4 + high * 2, false};
}

}  // namespace qwen_moe::cuda
