// Element types, shapes and non-owning views. Nothing here allocates element storage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace qwen_moe {

// `coded` is a weight that is quantized already: its int16 code, then the f16 scale of its group.
enum class DType { f32, f16, bf16, i32, coded };

inline std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::i32: return "int32";
    case DType::coded: return "coded";
  }
  return "?";
}

inline DType parse_dtype(std::string_view name) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32, DType::coded})
    if (name == dtype_name(dtype)) return dtype;
  throw InvalidArgument(
      concat("dtype '", name, "' is not one of float32, float16, bfloat16, int32, coded"));
}

inline size_t dtype_size(DType dtype) {
  return dtype == DType::f16 || dtype == DType::bf16 ? 2 : 4;
}

using Shape = std::vector<int64_t>;

inline int64_t num_elements(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Pointer, element type and shape; contiguous, row-major; never owns.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;

  size_t bytes() const { return static_cast<size_t>(num_elements(shape)) * dtype_size(dtype); }
};

}  // namespace qwen_moe
