// Arguments of the projection kernel: up to four matrices that read the same rows.
#pragma once

#include "cuda/stream.cuh"
#include "model/ops.h"

namespace qwen_moe::cuda {

inline constexpr int kMaxItems = 64;  // tiles of a block that a schedule may list

enum class Epilogue { conv, plain, residual, router, logits };

struct ProjectArgs {
  Matrix segment[4];
  int k = 0, rows = 0, rows_per_block = 0;
  Epilogue epilogue = Epilogue::plain;

  // Tiles of a block: items[block * items_stride] = how many, then segment << 14 | tile of each;
  // without items, an even share of segment 0.
  const int32_t* items = nullptr;
  int items_stride = 0;
  int flush_tiles = 0;  // tiles whose partial sums shared memory holds

  // Input: RMSNorm of hidden, or rows of bf16.
  const float* hidden = nullptr;  // [rows, k]
  const float* norm = nullptr;    // [k] 1 + w
  float inverse_k = 0, eps = 0;
  const bf16* input = nullptr;  // [rows, input_stride]
  int64_t input_stride = 0;
  bf16* normed = nullptr;  // [rows, k], written when given with `hidden`

  // Output.
  float* out = nullptr;  // [rows, out_stride]; segment s begins at column offset[s]
  int64_t out_stride = 0;
  int offset[4] = {0, 0, 0, 0};
  const int32_t* slot = nullptr;  // [rows]
  SlotArray state{};              // conv_state [3, conv_dim], or logits [vocab]
  const float* conv1d = nullptr;  // [4, conv_dim]
  int n = 0;                      // conv_dim, or shared_intermediate
  float* shared_scale = nullptr;  // [rows]
  bf16* shared = nullptr;         // [rows, n]
};

}  // namespace qwen_moe::cuda
