// Arguments of the projection kernel: up to four matrices that read the same rows.
#pragma once

#include "cuda/runtime.h"
#include "cuda/stream.cuh"
#include "model/ops.h"

namespace qwen_moe::cuda {

inline constexpr int kMaxItems = 64;  // tiles of a block that a schedule may list

inline constexpr int kMostSquares = 256;  // partial sums of squares of a row: hidden_size / 16

// What a phase that makes the residual stream leaves for the RMSNorm behind it (norm.cuh).
struct Weighed {
  Input* rows = nullptr;        // [rows, hidden] norm * hidden
  float* squares = nullptr;     // [rows, hidden / 16]
  const float* norm = nullptr;  // [hidden] 1 + w; null: nothing is left
};

// So much shared memory that a multiprocessor has one block of a kernel, but another kernel's
// beside it: the few blocks of a step's phase would else come to be two here and none there.
inline size_t alone_shared(const DeviceProperties& device) {
  return static_cast<size_t>(device.shared_bytes) / 2 + 1;
}

enum class Epilogue { conv, plain, residual, router, logits };

struct ProjectArgs {
  Matrix segment[4];
  int k = 0, rows = 0, rows_per_block = 0;
  Epilogue epilogue = Epilogue::plain;

  // Tiles of a block: items[block * items_stride] = what they have in common << 16 | how many, then
  // segment << 14 | tile of each; without items, an even share of segment 0.
  const int32_t* items = nullptr;
  Way way = Way::any;  // of segment 0
  int items_stride = 0;
  int flush_tiles = 0;  // tiles whose partial sums shared memory holds

  const Input* input = nullptr;  // [rows, input_stride]
  int64_t input_stride = 0;
  // Of rows that await their norm: sums are multiplied by 1 / rms, which is written when asked for.
  const float* squares = nullptr;  // [rows, k / 16]
  float inverse_k = 0, eps = 0;
  float* row_scale = nullptr;  // [rows]

  // Output.
  float* out = nullptr;  // [rows, out_stride]; segment s begins at column offset[s]
  int64_t out_stride = 0;
  int offset[4] = {0, 0, 0, 0};
  const int32_t* slot = nullptr;  // [rows]
  SlotArray state{};              // conv_state [3, conv_dim], or logits [vocab]
  const float* conv1d = nullptr;  // [4, conv_dim]
  int n = 0;                      // conv_dim, or shared_intermediate
  float* shared_scale = nullptr;  // [rows]
  Input* shared = nullptr;        // [rows, n]
  Weighed next{};                 // of the residual stream
};

}  // namespace qwen_moe::cuda
