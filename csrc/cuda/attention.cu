// Decode attention over paged KV: one token per row, in two kernels.
//
// `attend` gives every (row, KV head) a few blocks, each of which visits splits of the timeline
// page by page with a running maximum and leaves unnormalised sums; `combine` merges the splits of
// a row in order and applies the output gate. How a timeline is split depends on its own length
// alone, so the bits of a row do not depend on the batch, nor on how many blocks share the splits.
// What a block does with one page is in attention_page.cuh.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/attention_page.cuh"
#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kMaxSplits = 64;          // of a row; combine holds two per lane
constexpr int kBlocksPerSm = 4;         // wanted of attend; two fit at a time
constexpr int kPartial = kHeadDim + 4;  // floats of a split: sum of p * v, maximum, sum of p, pad

// The splits of a timeline: short ones get a block per page, long ones at most 64.
struct Splits {
  int pages, pages_per_split, count;
};
__host__ __device__ constexpr Splits splits_of(int length) {
  int pages = (length + kPageTokens - 1) / kPageTokens;
  int per_split = pages <= 32 ? 1 : pages <= 128 ? 2 : (pages + kMaxSplits - 1) / kMaxSplits;
  return {pages, per_split, (pages + per_split - 1) / per_split};
}

// The most splits that a timeline of up to `length` tokens has.
int most_splits(int length) {
  int pages = (length + kPageTokens - 1) / kPageTokens;
  return pages <= 64 ? std::min(pages, 32) : std::min((pages + 1) / 2, kMaxSplits);
}

struct StepParams {
  const float* proj;
  int64_t proj_stride;
  bf16* core;
  int64_t core_stride;
  std::byte* kv;
  int64_t page_stride;
  const int32_t *position, *slot, *pages;
  int64_t pages_stride;
  const float *q_norm, *k_norm, *inverse_frequency;
  float* partial;  // [rows, heads, most_splits, kPartial]
  int heads, kv_heads, half_rotary, most_splits;
  float eps;

  __device__ float* split(int row, int head, int split) const {
    return partial + ((static_cast<int64_t>(row) * heads + head) * most_splits + split) * kPartial;
  }
};

// Block (x, KV head, row) takes splits x, x + gridDim.x, ... of the row, for the 1 to 8 * kTiles
// query heads of the KV head. K and V of a page have a shared tile each; the next page's K is
// loaded once the scores are there, its V once the products are.
template <int kTiles>
__global__ void __launch_bounds__(kThreads, 2) attend(const StepParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& s = *reinterpret_cast<AttentionShared<kTiles>*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int row = blockIdx.z, kv_head = blockIdx.y, group = p.heads / p.kv_heads;
  const int stride = gridDim.x;
  int split = blockIdx.x;

  const int position = load_cg(p.position + row), slot = load_cg(p.slot + row);
  const Splits splits = splits_of(position + 1);
  if (slot == 0 || split >= splits.count) {
    wait_for_predecessor();
    launch_dependents();
    return;
  }
  const int32_t* pages = p.pages + row * p.pages_stride;
  const int last_page = splits.pages - 1, place = position % kPageTokens;
  auto keys_of = [&](int number) {
    return reinterpret_cast<bf16*>(p.kv + number * p.page_stride) +
           static_cast<int64_t>(kv_head) * kPageTokens * kHeadDim;
  };
  const int64_t to_values = static_cast<int64_t>(p.kv_heads) * kPageTokens * kHeadDim;
  auto old_tokens = [&](int page) { return page == last_page ? place : kPageTokens; };

  // Earlier tokens were written by earlier steps, so they can be loaded before the wait.
  int page = split * splits.pages_per_split;
  const bf16* first_keys = keys_of(load_cg(pages + page));
  load_page<false>(s.keys, first_keys, old_tokens(page));
  load_page<true>(s.values, first_keys + to_values, old_tokens(page));
  const bool appends = (splits.count - 1) % stride == split;  // the last page is this block's
  bf16* append_to =
      appends ? keys_of(load_cg(pages + last_page)) + static_cast<int64_t>(place) * kHeadDim
              : nullptr;
  if (static_cast<int>(threadIdx.x) < p.half_rotary) {
    float angle = __fmul_rn(static_cast<float>(position), p.inverse_frequency[threadIdx.x]);
    sincosf(angle, &s.sin[threadIdx.x], &s.cos[threadIdx.x]);
  }
  HeadPart weight, new_weight{};
  weight.load(p.q_norm);
  if (appends && warp == 0) new_weight.load(p.k_norm);
  __syncthreads();  // the angles are there

  wait_for_predecessor();
  launch_dependents();

  // Query heads, one warp each; then warp 0 takes the new key and warp 1 the new value. All loads
  // come first.
  const float* proj = p.proj + row * p.proj_stride;
  HeadPart query[kTiles], added{};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int g = n * kTile + warp;
    if (g < group) query[n].load(proj + static_cast<int64_t>(kv_head * group + g) * 2 * kHeadDim);
  }
  if (appends && warp < 2)
    added.load(proj + (static_cast<int64_t>(2 * p.heads) + warp * p.kv_heads + kv_head) * kHeadDim);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n * kTile + warp < group) {
      norm_and_rotate(query[n], weight, p.eps, p.half_rotary, s.cos, s.sin, s.normed[warp]);
#pragma unroll
      for (float4& x : query[n].x) x = {x.x * kScale, x.y * kScale, x.z * kScale, x.w * kScale};
    } else {
      query[n] = {};
    }
    query[n].store_bf16(s.query[n * kTile + warp]);
  }
  if (appends && warp == 0) {
    norm_and_rotate(added, new_weight, p.eps, p.half_rotary, s.cos, s.sin, s.normed[warp]);
    added.store_bf16(s.new_key);
    added.store_bf16(append_to);
  } else if (appends && warp == 1) {
    added.store_bf16(s.new_value);
    added.store_bf16(append_to + to_values);
  }
  __syncthreads();  // queries and the new token are there; `normed` becomes `softmax`

  // Of head n * 8 + warp: running maximum and sum of p. Of dimensions 32 warp .. 32 warp + 31 of
  // all heads: sum of p * v, as mma holds it.
  float top[kTiles], sum[kTiles], out[2][kTiles][4];
  auto reset = [&] {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      top[n] = -INFINITY;
      sum[n] = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) out[0][n][e] = out[1][n][e] = 0;
    }
  };
  reset();

  while (true) {
    const bool ends_split = page == last_page || page + 1 == (split + 1) * splits.pages_per_split;
    const int next_split = ends_split ? split + stride : split;
    const int next = ends_split ? next_split * splits.pages_per_split : page + 1;
    const bool more = next_split < splits.count;
    const bf16* next_keys = more ? keys_of(load_cg(pages + next)) : nullptr;

    copy_async_wait<1>();  // K; V may still be on its way
    if (page == last_page && warp == 0)
      *reinterpret_cast<uint4*>(&s.keys[place][lane * 8]) =
          *reinterpret_cast<const uint4*>(&s.new_key[lane * 8]);
    __syncthreads();

    score_page(s);
    __syncthreads();  // K has been read, too
    if (more)
      load_page<false>(s.keys, next_keys, old_tokens(next));
    else
      copy_async_commit();  // so that the groups keep their count

    softmax_page(s, page == last_page ? place + 1 : kPageTokens, top, sum);
    copy_async_wait<1>();  // V; the next K may still be on its way
    if (page == last_page && warp == 0)
      *reinterpret_cast<uint4*>(&s.values[place][lane * 8]) =
          *reinterpret_cast<const uint4*>(&s.new_value[lane * 8]);
    __syncthreads();

    add_values(s, out);

    if (ends_split) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int g = n * kTile + 2 * t + e % 2;
          if (g >= group) continue;
          float* to = p.split(row, kv_head * group + g, split) + warp * 32 + q + e / 2 * 8;
          to[0] = out[0][n][e];
          to[16] = out[1][n][e];
        }
        const int g = n * kTile + warp;
        if (g < group && lane == 0)
          *reinterpret_cast<float2*>(p.split(row, kv_head * group + g, split) + kHeadDim) = {
              top[n], sum[n]};
      }
      reset();
    }
    if (!more) break;
    __syncthreads();  // V has been read
    load_page<true>(s.values, next_keys + to_values, old_tokens(next));
    split = next_split;
    page = next;
  }
}

// Block (head, row), a thread per dimension: merges the row's splits, divides, and gates.
__global__ void __launch_bounds__(kHeadDim) combine(const StepParams p) {
  const int head = blockIdx.x, row = blockIdx.y, lane = threadIdx.x % 32;
  const int slot = load_cg(p.slot + row);
  const int splits = splits_of(load_cg(p.position + row) + 1).count;
  bf16* core = p.core + row * p.core_stride + head * kHeadDim + threadIdx.x;
  wait_for_predecessor();
  launch_dependents();
  if (slot == 0) {
    *core = __float2bfloat16_rn(0.0f);
    return;
  }

  // Every warp weighs all splits for itself: a lane holds splits lane and lane + 32.
  float top[2] = {-INFINITY, -INFINITY}, sums[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int split = 32 * i + lane;
    if (split >= splits) continue;
    float2 loaded = __ldcg(reinterpret_cast<const float2*>(p.split(row, head, split) + kHeadDim));
    top[i] = loaded.x;
    sums[i] = loaded.y;
  }
  const float gate = load_cg(p.proj + row * p.proj_stride +
                             static_cast<int64_t>(2 * head + 1) * kHeadDim + threadIdx.x);
  constexpr int kBatch = 8;  // loads in flight
  float part[kBatch];
  auto load_parts = [&](int first) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      part[j] = first + j < splits ? load_cg(p.split(row, head, first + j) + threadIdx.x) : 0.0f;
  };
  load_parts(0);
  const float highest = warp_max(fmaxf(top[0], top[1]));
  const float weight[2] = {__expf(top[0] - highest), __expf(top[1] - highest)};
  float total = 0, sum = 0;
  for (int first = 0; first < splits; first += kBatch) {
    const bool second = first >= 32;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float w = __shfl_sync(0xffffffffu, second ? weight[1] : weight[0], (first + j) % 32);
      total += w * part[j];
      sum += w * __shfl_sync(0xffffffffu, second ? sums[1] : sums[0], (first + j) % 32);
    }
    if (first + kBatch < splits) load_parts(first + kBatch);
  }
  *core = __float2bfloat16_rn(total / sum * sigmoid(gate));
}

}  // namespace

void CudaOps::reserve_attention() {
  require(c_.head_dim == kHeadDim, "head_dim must be ", kHeadDim, " for the CUDA kernels, got ",
          c_.head_dim);
  const int group = c_.num_attention_heads / c_.num_key_value_heads;
  require(group >= 1 && group <= 2 * kTile && c_.num_attention_heads % c_.num_key_value_heads == 0,
          "num_attention_heads / num_key_value_heads must be a whole number from 1 to ", 2 * kTile,
          " for the CUDA kernels, got ", c_.num_attention_heads, " / ", c_.num_key_value_heads);
  const int rotary = c_.rotary_dim();
  require(rotary <= kHeadDim && rotary % 2 == 0, "head_dim * partial_rotary_factor must be even ",
          "and at most ", kHeadDim, " for the CUDA kernels, got ", rotary);
  const size_t shared = std::max(sizeof(AttentionShared<1>), sizeof(AttentionShared<2>));
  require<Device>(static_cast<size_t>(device_.shared_bytes) >= shared, "attention needs ", shared,
                  " bytes of shared memory in a block, cuda:", device_.device, " has ",
                  device_.shared_bytes);
  allow_shared(attend<1>, sizeof(AttentionShared<1>));
  allow_shared(attend<2>, sizeof(AttentionShared<2>));

  attention_partial_ = DeviceBuffer<float>(
      static_cast<size_t>(max_rows_) * static_cast<size_t>(c_.num_attention_heads) *
      static_cast<size_t>(most_splits(max_context_)) * kPartial);
  // As the CPU backend computes them, so that the angles agree in every bit.
  std::vector<float> frequency(static_cast<size_t>(rotary / 2));
  for (int i = 0; i < rotary / 2; ++i) frequency[static_cast<size_t>(i)] = c_.inverse_frequency(i);
  inverse_frequency_ = DeviceBuffer<float>(frequency.size());
  QWEN_MOE_CUDA(cudaMemcpy(inverse_frequency_.data(), frequency.data(), inverse_frequency_.bytes(),
                           cudaMemcpyHostToDevice));
  // The copy of pageable memory may end after the call, and the steps' stream would not wait for
  // it.
  QWEN_MOE_CUDA(cudaStreamSynchronize(nullptr));
}

void CudaOps::attention_step(const AttentionArgs<float, bf16>& args) {
  const int rows = args.rows.rows;
  require(rows >= 1 && rows <= max_rows_, "a step has 1 to ", max_rows_, " rows, got ", rows);
  require(args.kv.dtype == DType::bf16, "the CUDA kernels keep KV in ", dtype_name(DType::bf16),
          ", got ", dtype_name(args.kv.dtype));
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  require(aligned(args.proj) && args.proj_stride % 4 == 0 && aligned(args.kv.data) &&
              args.kv.page_stride % 16 == 0 && aligned(args.layer.q_norm) &&
              aligned(args.layer.k_norm),
          "rows of proj, KV pages, q_norm and k_norm must begin on multiples of 16 bytes");
  StepParams p{.proj = args.proj,
               .proj_stride = args.proj_stride,
               .core = args.core,
               .core_stride = args.core_stride,
               .kv = args.kv.data,
               .page_stride = args.kv.page_stride,
               .position = args.rows.position,
               .slot = args.rows.slot,
               .pages = args.rows.pages,
               .pages_stride = args.rows.pages_stride,
               .q_norm = args.layer.q_norm,
               .k_norm = args.layer.k_norm,
               .inverse_frequency = inverse_frequency_.data(),
               .partial = attention_partial_.data(),
               .heads = c_.num_attention_heads,
               .kv_heads = c_.num_key_value_heads,
               .half_rotary = c_.rotary_dim() / 2,
               .most_splits = most_splits(max_context_),
               .eps = static_cast<float>(c_.rms_norm_eps)};
  // Many rows keep the device busy with fewer blocks each: most would find no split left, and a
  // block that only starts and ends still takes its turn.
  const int wanted = kBlocksPerSm * device_.sms, pairs = rows * p.kv_heads;
  const int blocks = std::clamp((wanted + pairs - 1) / pairs, 1, p.most_splits);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.kv_heads),
                  static_cast<unsigned>(rows));
  if (p.heads / p.kv_heads <= kTile)
    launch_(attend<1>, grid, kThreads, sizeof(AttentionShared<1>), p);
  else
    launch_(attend<2>, grid, kThreads, sizeof(AttentionShared<2>), p);
  launch_(combine, dim3(static_cast<unsigned>(p.heads), static_cast<unsigned>(rows)), kHeadDim, 0,
          p);
}

}  // namespace qwen_moe::cuda
