// Weight formats, the packed layout they share, and the recipes that choose a format per tensor.
//
// A weight is `count` matrices (experts; 1 for a plain projection) of n output features by k input
// features. Each matrix is cut into tiles of 16 output features (the last one padded with zeros),
// and every tile is one contiguous run of bytes:
//
//   f32, f16, bf16   [k][16] elements
//   int8             [k / group][16] f16 scales, padded to 64 bytes; then k/4 vectors of 64 bytes.
//                    As 32 lanes of 16 bits, lane 2*o + p of vector t holds output o of the tile:
//                    low byte k = 4t + p, high byte k = 4t + 2 + p.           w = scale * q
//   int4             [k / group][16] f16 scales, then with has_zero [k / group][16] f16 offsets,
//                    each padded to 64 bytes; then k/8 vectors of 64 bytes. Lane 2*o + p of vector
//                    t holds in its nibble j (lowest first) q of k = 8t + 2j + p, unsigned.
//                    w = scale * (q - 8), or with has_zero w = scale * q - offset
//
// So one 64-byte load, shifts and masks give vectors of 16 outputs by 2 consecutive k, which is
// what 16-bit multiply-add instructions consume, with no shuffle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/tensor.h"

namespace qwen_moe {

inline constexpr int kTile = 16;  // output features in a tile

enum class WeightFormat { f32, f16, bf16, int8, int4 };

std::string_view format_name(WeightFormat format);
inline bool is_quantized(WeightFormat f) {
  return f == WeightFormat::int8 || f == WeightFormat::int4;
}
WeightFormat dense_format(DType dtype);  // the format that keeps a checkpoint dtype exactly

struct WeightSpec {
  WeightFormat format = WeightFormat::bf16;
  int n = 0;              // output features
  int k = 0;              // input features
  int count = 1;          // matrices (experts)
  int group = 0;          // input features per scale; 0 when dense
  bool has_zero = false;  // int4 with an offset per group

  int tiles() const { return (n + kTile - 1) / kTile; }
  size_t scale_bytes() const;  // of one tile; the same for offsets; 0 when dense
  size_t tile_bytes() const;   // a multiple of 64 when k is a multiple of 2 (f32: always)
  size_t matrix_bytes() const { return tile_bytes() * static_cast<size_t>(tiles()); }
  size_t bytes() const { return matrix_bytes() * static_cast<size_t>(count); }
  bool operator==(const WeightSpec&) const = default;
};

// The largest of 128, 64, 32 that is at most `most` and divides k; 0 when there is none.
int group_for(int k, int most = 128);

// What a tensor is to the recipe.
enum class WeightRole {
  embedding,
  in_proj,
  attention_in,
  out_proj,
  experts,
  shared_expert,
  lm_head,
  exact
};

enum class Recipe { none, int8, int4, int4_all };
Recipe parse_recipe(std::string_view name);  // "none", "int8", "int4", "int4-all"
std::string_view recipe_name(Recipe recipe);

// Format of a tensor of this role; `dense` is what the checkpoint holds it in.
WeightFormat choose_format(Recipe recipe, WeightRole role, WeightFormat dense);

}  // namespace qwen_moe
