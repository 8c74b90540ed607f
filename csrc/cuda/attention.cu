// Decode attention over paged KV: one token per row, in two kernels.
//
// A block of `attend` visits splits of a row's timeline page by page with a running maximum and
// leaves unnormalised sums; `combine` merges the splits of a row in order and applies the output
// gate. Which splits a block takes is in attention_splits.cuh, what it does with one page in
// attention_page.cuh.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cuda/attention_merge.cuh"

namespace qwen_moe::cuda {
namespace {

constexpr int kBlocksPerSm = 2;  // of attend, at a time

// A block takes its share of a row's splits, for the 1 to 8 * kTiles query heads of a KV head. K
// and V of a page have a shared tile each; the next page's K is loaded once the scores are there,
// its V once the products are.
template <int kTiles>
__global__ void __launch_bounds__(kThreads, 2) attend(const StepParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& s = *reinterpret_cast<AttentionShared<kTiles>*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int group = p.heads / p.kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) % p.kv_heads;
  Share share{0, static_cast<int>(blockIdx.x) / p.kv_heads,
              static_cast<int>(gridDim.x) / p.kv_heads, 0};
  if (p.rows == 1) {  // its share is found at once, and spares it a kernel
    share.position = load_cg(p.position);
    if (load_cg(p.slot) == 0 || share.first >= Splits(share.position + 1).count) share.row = -1;
  } else {
    const int4 from = __ldcg(reinterpret_cast<const int4*>(p.shares) + blockIdx.x);
    share = {from.x, from.y, from.z, from.w};
  }
  const auto [row, first_split, stride, position] = share;
  if (row < 0) {
    if (blockIdx.x == 0) wait_for_predecessor();  // one has to, so that no kernel overtakes it
    return;
  }
  const Splits splits(position + 1);
  const int32_t* pages = p.pages + row * p.pages_stride;
  const int last_page = splits.pages - 1, place = position % kPageTokens;
  auto keys_of = [&](int number) {
    return reinterpret_cast<bf16*>(p.kv + number * p.page_stride) +
           static_cast<int64_t>(kv_head) * kPageTokens * kHeadDim;
  };
  const int64_t to_values = static_cast<int64_t>(p.kv_heads) * kPageTokens * kHeadDim;
  auto old_tokens = [&](int page) { return page == last_page ? place : kPageTokens; };

  // The pages of this block, one after the other. The number of a page is asked for two pages
  // ahead, so that no load waits for another.
  struct Visit {
    int split, page;
  };
  auto after = [&](Visit v) {
    const bool same = v.page + 1 < splits.first_page(v.split + 1);
    return same ? Visit{v.split, v.page + 1}
                : Visit{v.split + stride, splits.first_page(v.split + stride)};
  };
  auto number_of = [&](Visit v) { return v.split < splits.count ? load_cg(pages + v.page) : 0; };

  // Earlier tokens were written by earlier steps, so they can be loaded before the wait.
  Visit here{first_split, splits.first_page(first_split)};
  const bf16* first_keys = keys_of(number_of(here));
  load_page<false>(s.keys, first_keys, old_tokens(here.page));
  load_page<true>(s.values, first_keys + to_values, old_tokens(here.page));
  Visit next = after(here);
  int next_number = number_of(next);
  const bool appends = (splits.count - 1) % stride == first_split;  // the last page is this block's
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

  if (p.rows == 1) launch_dependents();
  wait_for_predecessor();
  if (p.rows > 1) launch_dependents();

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
    const bool more = next.split < splits.count, ends_split = next.split != here.split;
    const bf16* next_keys = keys_of(next_number);
    const Visit later = after(next);
    const int later_number = number_of(later);

    copy_async_wait<1>();  // K; V may still be on its way
    if (here.page == last_page && warp == 0)
      *reinterpret_cast<uint4*>(&s.keys[place][lane * 8]) =
          *reinterpret_cast<const uint4*>(&s.new_key[lane * 8]);
    __syncthreads();

    score_page(s);
    __syncthreads();  // K has been read, too
    if (more)
      load_page<false>(s.keys, next_keys, old_tokens(next.page));
    else
      copy_async_commit();  // so that the groups keep their count

    softmax_page(s, here.page == last_page ? place + 1 : kPageTokens, top, sum);
    copy_async_wait<1>();  // V; the next K may still be on its way
    if (here.page == last_page && warp == 0)
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
          float* to = p.split(row, kv_head * group + g, here.split) + warp * 32 + q + e / 2 * 8;
          to[0] = out[0][n][e];
          to[16] = out[1][n][e];
        }
        const int g = n * kTile + warp;
        if (g < group && lane == 0)
          *reinterpret_cast<float2*>(p.split(row, kv_head * group + g, here.split) + kHeadDim) = {
              top[n], sum[n]};
      }
      reset();
    }
    if (!more) break;
    __syncthreads();  // V has been read
    load_page<true>(s.values, next_keys + to_values, old_tokens(next.page));
    here = next;
    next = later;
    next_number = later_number;
  }
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
      static_cast<size_t>(Splits(max_context_).count) * kPartial);
  // As the CPU backend computes them, so that the angles agree in every bit.
  std::vector<float> frequency(static_cast<size_t>(rotary / 2));
  for (int i = 0; i < rotary / 2; ++i) frequency[static_cast<size_t>(i)] = c_.inverse_frequency(i);
  attention_shares_ = DeviceBuffer<Share>(attention_blocks(max_rows_));
  inverse_frequency_ = DeviceBuffer<float>(frequency.size());
  QWEN_MOE_CUDA(cudaMemcpy(inverse_frequency_.data(), frequency.data(), inverse_frequency_.bytes(),
                           cudaMemcpyHostToDevice));
  // The copy of pageable memory may end after the call, and the steps' stream would not wait for
  // it.
  QWEN_MOE_CUDA(cudaStreamSynchronize(nullptr));
}

// As many blocks of attend as fit at a time, but at least one for every row and KV head.
unsigned CudaOps::attention_blocks(int rows) const {
  const int pairs = rows * c_.num_key_value_heads;
  return static_cast<unsigned>(
      std::clamp(kBlocksPerSm * device_.sms, pairs, pairs * Splits(max_context_).count));
}

bool CudaOps::share_pages_out(const StepRows& rows) {
  if (pages_shared_out_ || rows.rows == 1) return false;
  pages_shared_out_ = true;
  const unsigned blocks = attention_blocks(rows.rows);
  StepParams p{};
  p.position = rows.position;
  p.slot = rows.slot;
  p.rows = rows.rows;
  p.kv_heads = c_.num_key_value_heads;
  p.shares = attention_shares_.data();
  launch_(share_pages, dim3(1), kThreads, 0, p, static_cast<int>(blocks));
  return true;
}

void CudaOps::attention_step(const AttentionArgs<float, Input>& args) {
  const int rows = args.rows.rows;
  require(rows >= 1 && rows <= max_rows_, "a step has 1 to ", max_rows_, " rows, got ", rows);
  require(args.kv.dtype == DType::bf16, "the CUDA kernels keep KV in ", dtype_name(DType::bf16),
          ", got ", dtype_name(args.kv.dtype));
  // Where no in_proj came before, attend may not read ahead of what was just launched.
  if (share_pages_out(args.rows)) launch_.ordinary = 1;
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  require(aligned(args.proj) && args.proj_stride % 4 == 0 && aligned(args.kv.data) &&
              args.kv.page_stride % 16 == 0 && aligned(args.layer.q_norm) &&
              aligned(args.layer.k_norm),
          "rows of proj, KV pages, q_norm and k_norm must begin on multiples of 16 bytes");
  const unsigned blocks = attention_blocks(rows);
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
               .shares = attention_shares_.data(),
               .partial = attention_partial_.data(),
               .rows = rows,
               .heads = c_.num_attention_heads,
               .kv_heads = c_.num_key_value_heads,
               .half_rotary = c_.rotary_dim() / 2,
               .most_splits = Splits(max_context_).count,
               .eps = static_cast<float>(c_.rms_norm_eps)};
  if (p.heads / p.kv_heads <= kTile)
    launch_(attend<1>, dim3(blocks), kThreads, sizeof(AttentionShared<1>), p);
  else
    launch_(attend<2>, dim3(blocks), kThreads, sizeof(AttentionShared<2>), p);
  // The fewer heads, the more threads there are to spare for long timelines.
  const int heads = rows * p.heads;
  auto merge = [&]<int kGroups>(std::integral_constant<int, kGroups>) {
    using M = Merge<kGroups>;
    const int blocks = (heads + M::kHeads - 1) / M::kHeads * M::kParts;
    launch_(combine<kGroups>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, p);
  };
  if (4 * heads <= device_.sms)
    merge(std::integral_constant<int, 16>{});
  else if (heads <= device_.sms)
    merge(std::integral_constant<int, 4>{});
  else
    merge(std::integral_constant<int, 1>{});
}

}  // namespace qwen_moe::cuda
