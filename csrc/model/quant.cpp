#include "model/quant.h"

namespace qwen_moe {
namespace {

constexpr size_t kAlign = 64;

size_t round_up(size_t value) { return (value + kAlign - 1) / kAlign * kAlign; }

}  // namespace

std::string_view format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::f32: return "f32";
    case WeightFormat::f16: return "f16";
    case WeightFormat::bf16: return "bf16";
    case WeightFormat::int8: return "int8";
    case WeightFormat::int4: return "int4";
  }
  return "?";
}

WeightFormat dense_format(DType dtype) {
  switch (dtype) {
    case DType::f32: return WeightFormat::f32;
    case DType::f16: return WeightFormat::f16;
    case DType::bf16: return WeightFormat::bf16;
    case DType::i32:
    case DType::coded: break;
  }
  throw InvalidArgument(concat("weights cannot be of dtype ", dtype_name(dtype),
                               "; expected float32, float16 or bfloat16"));
}

size_t WeightSpec::scale_bytes() const {
  if (!is_quantized(format)) return 0;
  return round_up(static_cast<size_t>(k / group) * kTile * sizeof(uint16_t));
}

size_t WeightSpec::tile_bytes() const {
  const size_t elements = static_cast<size_t>(k) * kTile;
  switch (format) {
    case WeightFormat::f32: return elements * 4;
    case WeightFormat::f16:
    case WeightFormat::bf16: return elements * 2;
    case WeightFormat::int8: return scale_bytes() + elements;
    case WeightFormat::int4: return scale_bytes() * (has_zero ? 2 : 1) + elements / 2;
  }
  return 0;
}

int group_for(int k, int most) {
  for (int group : {128, 64, 32})
    if (group <= most && k > 0 && k % group == 0) return group;
  return 0;
}

Recipe parse_recipe(std::string_view name) {
  for (Recipe recipe : {Recipe::none, Recipe::int8, Recipe::int4, Recipe::int4_all})
    if (name == recipe_name(recipe)) return recipe;
  throw InvalidArgument(
      concat("quantization '", name, "' is not one of none, int8, int4, int4-all"));
}

std::string_view recipe_name(Recipe recipe) {
  switch (recipe) {
    case Recipe::none: return "none";
    case Recipe::int8: return "int8";
    case Recipe::int4: return "int4";
    case Recipe::int4_all: return "int4-all";
  }
  return "?";
}

WeightFormat choose_format(Recipe recipe, WeightRole role, WeightFormat dense) {
  if (role == WeightRole::embedding || role == WeightRole::exact) return dense;
  switch (recipe) {
    case Recipe::none: return dense;
    case Recipe::int8: return WeightFormat::int8;
    case Recipe::int4_all: return WeightFormat::int4;
    case Recipe::int4: {
      // These see every token and are small, so they keep the finer format.
      const bool fine = role == WeightRole::out_proj || role == WeightRole::shared_expert;
      return fine ? WeightFormat::int8 : WeightFormat::int4;
    }
  }
  return dense;
}

}  // namespace qwen_moe
