// The splits of decode attention, which blocks of `attend` take which, and what both of its kernels
// are told.
//
// How a timeline is split depends on its own length alone, so the bits of a row do not depend on
// the batch, nor on how many blocks share the splits.
#pragma once

#include "cuda/attention_page.cuh"
#include "cuda/ops.h"
#include "engine/backend.h"

namespace qwen_moe::cuda {

constexpr int kMaxSplits = 128;         // of a row
constexpr int kShortPages = 32;         // of a timeline whose splits are single pages
constexpr int kPartial = kHeadDim + 4;  // floats of a split: sum of p * v, maximum, sum of p, pad

// The splits of a timeline: a page each of a short one, then two and more, as evenly as can be.
struct Splits {
  int pages, count, least, longer;  // of pages in a split; the first have one more

  __host__ __device__ explicit constexpr Splits(int length)
      : pages((length + kPageTokens - 1) / kPageTokens),
        count(pages <= kShortPages      ? pages
              : pages / 2 < kShortPages ? kShortPages
              : pages / 2 < kMaxSplits  ? pages / 2
                                        : kMaxSplits),
        least(pages / count),
        longer(pages % count) {}
  __host__ __device__ constexpr int first_page(int split) const {
    return least * split + (split < longer ? split : longer);
  }
};

struct StepParams {
  const float* proj;
  int64_t proj_stride;
  Input* core;
  int64_t core_stride;
  std::byte* kv;
  int64_t page_stride;
  const int32_t *position, *slot, *pages;
  int64_t pages_stride;
  const float *q_norm, *k_norm, *inverse_frequency;
  Share* shares;   // of every block, where there are several rows
  float* partial;  // [rows, heads, most_splits, kPartial]
  int rows, heads, kv_heads, half_rotary, most_splits;
  float eps;

  __device__ float* split(int row, int head, int split) const {
    return partial + ((static_cast<int64_t>(row) * heads + head) * most_splits + split) * kPartial;
  }
};

// Shares out the pages of all rows to `blocks` blocks of attend, as evenly as whole splits allow: a
// long timeline gets many blocks, so that the short ones beside it need not wait for it. Once a
// step, for all layers. One block.
__global__ void __launch_bounds__(kThreads) share_pages(const StepParams p, int blocks) {
  __shared__ int begin[kMaxRows], count[kMaxRows], position[kMaxRows];
  const int thread = threadIdx.x, lane = thread % 32;
  wait_for_predecessor();
  launch_dependents();
  if (thread < 32) {
    constexpr int kEach = kMaxRows / 32;  // rows of a lane: lane, lane + 32 and so on
    int pages[kEach], splits[kEach], own[kEach], all = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = 32 * i + lane;
      const bool counts = row < p.rows && load_cg(p.slot + row) != 0;
      position[row] = counts ? load_cg(p.position + row) : 0;
      const Splits of(position[row] + 1);
      pages[i] = counts ? of.pages : 0;
      splits[i] = of.count;
      all += pages[i];
    }
    all = __reduce_add_sync(0xffffffffu, all);
    int most = max((all * p.kv_heads + blocks - 1) / blocks, 1), wanted = 0;  // pages of a block
    do {
      wanted = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        own[i] = min(splits[i], (pages[i] + most - 1) / most);
        wanted += own[i];
      }
      wanted = __reduce_add_sync(0xffffffffu, wanted);
      ++most;
    } while (wanted * p.kv_heads > blocks);
    int before = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      int through = own[i];
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, through, offset);
        if (lane >= offset) through += below;
      }
      begin[32 * i + lane] = before + through - own[i];
      count[32 * i + lane] = own[i];
      before += __shfl_sync(0xffffffffu, through, 31);
    }
  }
  __syncthreads();
  for (int block = thread; block < blocks; block += kThreads) {
    // The last row that begins here or before: those without a share begin where the next does.
    const int index = block / p.kv_heads;
    int row = 0;
#pragma unroll
    for (int step = kMaxRows / 2; step > 0; step /= 2)
      if (begin[row + step] <= index) row += step;
    const int first = index - begin[row];
    Share share{-1, 0, 0, 0};
    if (first < count[row]) share = {row, first, count[row], position[row]};
    p.shares[block] = share;
  }
}

}  // namespace qwen_moe::cuda
