// Projections: RMSNorm or bf16 rows in, weight tiles streamed through the tensor cores, and what
// each phase does with a finished output.
#include "cuda/dense.h"

#include <algorithm>
#include <cmath>

#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kThreads = 32 * kSlices;
constexpr int kNormVectors = 4;   // float4s of a row that one thread holds: k <= 4096
constexpr int kMaxInputs = 8192;  // 8 rows of them fit shared memory
constexpr int kRowsFused = 8;     // more rows than that are normed by a kernel of their own

// Sum of squares of a thread's part of a row, in the order that every kernel shares.
__device__ __forceinline__ float squares(float sum, const float4& x) {
  return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}
__device__ __forceinline__ float rms_scale(const float* warp_sums, int k, float eps) {
  float sum = warp_sums[0];
#pragma unroll
  for (int w = 1; w < kSlices; ++w) sum += warp_sums[w];
  return rsqrtf(sum / static_cast<float>(k) + eps);
}
__device__ __forceinline__ uint2 normed_values(const float4& x, float scale, const float4& w) {
  return {pack_bf16(x.x * scale * w.x, x.y * scale * w.y),
          pack_bf16(x.z * scale * w.z, x.w * scale * w.w)};
}

// One block per row: what the projection kernel does itself for a few rows.
__global__ __launch_bounds__(kThreads) void norm_rows(bf16* out, const float* hidden,
                                                      const float* norm, int k, float eps) {
  __shared__ float warp_sums[kSlices];
  int thread = static_cast<int>(threadIdx.x);
  int64_t row = static_cast<int64_t>(blockIdx.x) * k;
  float4 weight[kNormVectors], x[kNormVectors];
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (int at = v * 4 * kThreads + thread * 4; at < k)
      weight[v] = *reinterpret_cast<const float4*>(norm + at);
  wait_for_predecessor();
  launch_dependents();
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (int at = v * 4 * kThreads + thread * 4; at < k) {
      x[v] = load_cg(reinterpret_cast<const float4*>(hidden + row + at));
      sum = squares(sum, x[v]);
    }
  sum = warp_sum(sum);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  __syncthreads();
  float scale = rms_scale(warp_sums, k, eps);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (int at = v * 4 * kThreads + thread * 4; at < k)
      *reinterpret_cast<uint2*>(out + row + at) = normed_values(x[v], scale, weight[v]);
}

struct Item {
  int segment, tile;
};

__device__ __forceinline__ Item item_of(const ProjectArgs& args, int index) {
  if (args.items == nullptr) {
    int first =
        static_cast<int>(static_cast<int64_t>(blockIdx.x) * args.segment[0].tiles / gridDim.x);
    return {0, first + index};
  }
  int item = args.items[static_cast<int>(blockIdx.x) * args.items_per_block + index];
  return {item >> 24, item & 0xffffff};
}

__device__ __forceinline__ int item_count(const ProjectArgs& args) {
  if (args.items == nullptr) {
    int64_t tiles = args.segment[0].tiles, block = blockIdx.x, blocks = gridDim.x;
    return static_cast<int>((block + 1) * tiles / blocks - block * tiles / blocks);
  }
  int count = 0;
  while (count < args.items_per_block &&
         args.items[static_cast<int>(blockIdx.x) * args.items_per_block + count] >= 0)
    ++count;
  return count;
}

// What a finished output needs besides its sum, read early where that hides its latency.
struct Extra {
  float a = 0, b = 0, c = 0;  // the conv window, or the residual
};

__device__ __forceinline__ Extra extra_of(const ProjectArgs& args, int segment, int row, int n) {
  Extra extra;
  if (args.epilogue == Epilogue::residual) {
    extra.a = load_cg(args.out + row * args.out_stride + n);
  } else if (args.epilogue == Epilogue::conv && segment == 0) {
    const float* window = args.state.at(args.slot[row]);
    extra.a = load_cg(window + n);
    extra.b = load_cg(window + args.n + n);
    extra.c = load_cg(window + 2 * args.n + n);
  }
  return extra;
}

// `before` is the sum of the tile before this one in the block: the gate of an up tile.
__device__ __forceinline__ void finish_output(const ProjectArgs& args, int segment, int row, int n,
                                              float sum, float before, const Extra& extra) {
  float* out = args.out + row * args.out_stride + args.offset[segment] + n;
  switch (args.epilogue) {
    case Epilogue::plain: *out = sum; return;
    case Epilogue::residual: *out = extra.a + sum; return;
    case Epilogue::conv: {
      if (segment != 0) {
        *out = sum;
        return;
      }
      // The causal conv over the window and this token, oldest first, and the window's advance.
      const float* taps = args.conv1d + n;
      float y = taps[0] * extra.a;
      y = fmaf(taps[args.n], extra.b, y);
      y = fmaf(taps[2 * args.n], extra.c, y);
      *out = silu(fmaf(taps[3 * args.n], sum, y));
      int slot = args.slot[row];
      if (slot == 0) return;
      float* window = args.state.at(slot);
      window[n] = extra.b;
      window[args.n + n] = extra.c;
      window[2 * args.n + n] = sum;
      return;
    }
    case Epilogue::router:
      if (segment == 0) *out = sum;
      if (segment == 1) args.shared_scale[row] = sum;
      if (segment == 3)
        args.shared[static_cast<int64_t>(row) * args.n + n] = __float2bfloat16(silu(before) * sum);
      return;
    case Epilogue::logits:
      if (args.slot[row] != 0) args.state.at(args.slot[row])[n] = sum;
      return;
  }
}

// Grid (blocks, row blocks). Shared memory: activations [rows][pitch], partial sums
// [flush_tiles][slices][rows][kPartialPitch], rings [slices][kStages][kStageBytes].
template <int kTiles, int kStages>
__global__ __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1) void project(
    const __grid_constant__ ProjectArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ float warp_sums[8][kSlices];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int first_row = static_cast<int>(blockIdx.y) * args.rows_per_block;
  int rows = min(args.rows_per_block, args.rows - first_row);
  int pitch = activation_pitch(args.k);
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(shared + rows * pitch);
  std::byte* ring = shared + rows * pitch + args.flush_tiles * kSlices * rows * kPartialPitch * 4 +
                    warp * kStages * kStageBytes;
  int count = item_count(args);
  UnitRange slice = slice_units(args.k, warp, kSlices);

  // The chunks of this warp, tile after tile.
  struct Cursor {
    int index, unit;
  };
  auto advance = [&](Cursor& c, int units) {
    c.unit += units;
    if (c.unit >= slice.end) c = {c.index + 1, slice.begin};
  };
  Cursor producer{slice.begin == slice.end ? count : 0, slice.begin};
  int produced = 0;
  auto produce = [&] {
    if (producer.index < count) {
      Item item = item_of(args, producer.index);
      const Matrix& m = args.segment[item.segment];
      int units = min(chunk_units(m.format), slice.end - producer.unit);
      copy_chunk(ring + produced * kStageBytes, m, m.data + item.tile * m.tile_bytes, producer.unit,
                 units, lane);
      produced = produced + 1 == kStages ? 0 : produced + 1;
      advance(producer, units);
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) produce();

  // The element of the first flush that this thread finishes.
  Extra early;
  int early_tile = thread / (16 * rows), early_row = first_row + thread / 16 % rows;
  bool has_early = early_tile < min(count, args.flush_tiles);
  int early_segment = 0, early_n = 0;
  if (has_early) {
    Item item = item_of(args, early_tile);
    early_segment = item.segment;
    early_n = item.tile * 16 + thread % 16;
    early = extra_of(args, early_segment, early_row, early_n);
  }

  if (args.input != nullptr) {
    wait_for_predecessor();
    launch_dependents();
    int vectors = args.k / 8;  // of 16 bytes in a row
    for (int base = 0; base < rows * vectors; base += kThreads * 4) {
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (int at = base + i * kThreads + thread; at < rows * vectors)
          x[i] = load_cg(reinterpret_cast<const uint4*>(args.input + (first_row + at / vectors) *
                                                                         args.input_stride) +
                         at % vectors);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (int at = base + i * kThreads + thread; at < rows * vectors)
          *reinterpret_cast<uint4*>(activations + at / vectors * pitch + at % vectors * 16) = x[i];
    }
  } else {
    float4 weight[kNormVectors];
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v)
      if (int at = v * 4 * kThreads + thread * 4; at < args.k)
        weight[v] = *reinterpret_cast<const float4*>(args.norm + at);
    wait_for_predecessor();
    launch_dependents();
    for (int row = 0; row < rows; row += 2) {  // two at a time hide each other's latency
      float4 x[2][kNormVectors];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + r >= rows) break;
        const float* from = args.hidden + static_cast<int64_t>(first_row + row + r) * args.k;
        float sum = 0;
#pragma unroll
        for (int v = 0; v < kNormVectors; ++v)
          if (int at = v * 4 * kThreads + thread * 4; at < args.k)
            x[r][v] = load_cg(reinterpret_cast<const float4*>(from + at));
#pragma unroll
        for (int v = 0; v < kNormVectors; ++v)
          if (int at = v * 4 * kThreads + thread * 4; at < args.k) sum = squares(sum, x[r][v]);
        sum = warp_sum(sum);
        if (lane == 0) warp_sums[row + r][warp] = sum;
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + r >= rows) break;
        float scale = rms_scale(warp_sums[row + r], args.k, args.eps);
        bool write = args.normed != nullptr && (row + r) % gridDim.x == blockIdx.x;
#pragma unroll
        for (int v = 0; v < kNormVectors; ++v)
          if (int at = v * 4 * kThreads + thread * 4; at < args.k) {
            uint2 values = normed_values(x[r][v], scale, weight[v]);
            *reinterpret_cast<uint2*>(activations + (row + r) * pitch + at * 2) = values;
            if (write)
              *reinterpret_cast<uint2*>(
                  args.normed + static_cast<int64_t>(first_row + row + r) * args.k + at) = values;
          }
      }
    }
  }
  __syncthreads();

  const std::byte* mine = activations + lane / 4 * pitch + lane % 4 * 16;
  auto rows_of = [&](int i, int unit, int half) {
    uint4 b{0, 0, 0, 0};
    if (8 * i + lane / 4 < rows)
      b = *reinterpret_cast<const uint4*>(mine + 8 * i * pitch + unit * 128 + half * 64);
    return b;
  };

  int consumed = 0;
  for (int begin = 0; begin < count; begin += args.flush_tiles) {
    int tiles = min(args.flush_tiles, count - begin);
    for (int i = 0; i < tiles; ++i) {
      Item item = item_of(args, begin + i);
      const Matrix& m = args.segment[item.segment];
      TileSum<kTiles> sum;
      sum.clear();
      int step = chunk_units(m.format);
      for (int unit = slice.begin; unit < slice.end; unit += step) {
        copy_async_wait<kStages - 2>();
        __syncwarp();
        // The stage that the next chunk goes to was read by this warp one chunk ago.
        produce();
        sum.add(m, ring + consumed * kStageBytes, unit, min(step, slice.end - unit), lane, rows_of);
        consumed = consumed + 1 == kStages ? 0 : consumed + 1;
        __syncwarp();
      }
      sum.store(m, partial + (i * kSlices + warp) * rows * kPartialPitch, rows, lane);
    }
    __syncthreads();
    for (int at = thread; at < tiles * rows * 16; at += kThreads) {
      int i = at / (16 * rows), row = at / 16 % rows, output = at % 16;
      Item item = item_of(args, begin + i);
      if (args.epilogue == Epilogue::router && item.segment == 2) continue;  // done by its up tile
      int n = item.tile * 16 + output;
      if (n >= args.segment[item.segment].n) continue;  // padding of the last tile
      const float* sums = partial + i * kSlices * rows * kPartialPitch;
      float sum = sum_slices(sums, rows, row, output);
      float before = 0;
      if (args.epilogue == Epilogue::router && item.segment == 3)
        before = sum_slices(sums - kSlices * rows * kPartialPitch, rows, row, output);
      bool is_early = begin == 0 && at == thread;
      finish_output(args, item.segment, first_row + row, n, sum, before,
                    is_early ? early : extra_of(args, item.segment, first_row + row, n));
    }
    __syncthreads();
  }
}

// hidden[row] = the embedding of the row's token. Grid (rows).
__global__ void embed_rows(float* hidden, Matrix embed_tokens, const int32_t* token) {
  wait_for_predecessor();
  launch_dependents();
  int row = static_cast<int>(blockIdx.x), id = load_cg(token + row);
  const std::byte* tile = embed_tokens.data + id / 16 * embed_tokens.tile_bytes;
  for (int at = static_cast<int>(threadIdx.x) * 2; at < embed_tokens.k;
       at += static_cast<int>(blockDim.x) * 2) {
    auto pair = *reinterpret_cast<const __nv_bfloat162*>(
        tile + code_place(WeightFormat::bf16, id % 16, at).byte);
    *reinterpret_cast<float2*>(hidden + static_cast<int64_t>(row) * embed_tokens.k + at) =
        __bfloat1622float2(pair);
  }
}

size_t shared_bytes(int rows, int k, int flush_tiles, int stages) {
  return static_cast<size_t>(rows) * activation_pitch(k) +
         static_cast<size_t>(flush_tiles) * kSlices * rows * kPartialPitch * 4 +
         static_cast<size_t>(kSlices) * stages * kStageBytes;
}

template <int kTiles, int kStages>
void launch_project(const Launcher& launch, ProjectArgs& args, int blocks, int flush_tiles) {
  int per = std::min(args.rows, 8 * kTiles);
  args.rows_per_block = per;
  args.flush_tiles = flush_tiles;
  launch(project<kTiles, kStages>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((args.rows + per - 1) / per)),
         kThreads, shared_bytes(per, args.k, flush_tiles, kStages), args);
}

}  // namespace

// Which blocks take which tiles, balanced by bytes: the largest first, each to the least loaded.
// A gate tile and its up tile stay together, and before single tiles, so that they share a flush.
const CudaOps::Schedule& CudaOps::schedule(std::span<const WeightView* const> views, bool pairs) {
  std::vector<WeightSpec> key;
  for (const WeightView* view : views) key.push_back(view->spec);
  for (const Schedule& known : schedules_)
    if (known.specs == key) return known;

  struct Load {
    std::vector<int32_t> pairs, singles;
    size_t bytes = 0;
  };
  struct Work {
    int32_t item;
    size_t bytes;
    bool pair;
  };
  std::vector<Work> work;
  for (size_t s = 0; s < key.size(); ++s) {
    if (pairs && s == 3) break;
    bool pair = pairs && s == 2;
    for (int tile = 0; tile < key[s].tiles(); ++tile)
      work.push_back({static_cast<int32_t>(s << 24) | tile,
                      key[s].tile_bytes() + (pair ? key[s + 1].tile_bytes() : 0), pair});
  }
  std::stable_sort(work.begin(), work.end(),
                   [](const Work& a, const Work& b) { return a.bytes > b.bytes; });
  std::vector<Load> loads(
      static_cast<size_t>(std::min<int>(device_.sms, static_cast<int>(work.size()))));
  for (const Work& w : work) {
    Load& least = *std::min_element(loads.begin(), loads.end(),
                                    [](const Load& a, const Load& b) { return a.bytes < b.bytes; });
    least.bytes += w.bytes;
    if (w.pair) {
      least.pairs.push_back(w.item);
      least.pairs.push_back(w.item + (1 << 24));
    } else {
      least.singles.push_back(w.item);
    }
  }
  size_t most = 0;
  for (const Load& l : loads) most = std::max(most, l.pairs.size() + l.singles.size());
  std::vector<int32_t> items(loads.size() * most, -1);
  for (size_t b = 0; b < loads.size(); ++b) {
    auto at = std::copy(loads[b].pairs.begin(), loads[b].pairs.end(),
                        items.begin() + static_cast<std::ptrdiff_t>(b * most));
    std::copy(loads[b].singles.begin(), loads[b].singles.end(), at);
  }
  Schedule made{key, DeviceBuffer<int32_t>(items.size()), static_cast<int>(loads.size()),
                static_cast<int>(most)};
  QWEN_MOE_CUDA(cudaMemcpy(made.items.data(), items.data(), items.size() * 4, cudaMemcpyDefault));
  schedules_.push_back(std::move(made));
  return schedules_.back();
}

void CudaOps::reserve_dense() {
  for (int k : {c_.hidden_size, c_.value_dim(), c_.attention_dim()})
    require(k % kUnit == 0 && k <= kMaxInputs,
            "the CUDA kernels take input sizes that are multiples of ", kUnit, " up to ",
            kMaxInputs, "; this model has a matrix with ", k);
  require(c_.hidden_size <= 4 * kNormVectors * kThreads, "hidden_size must be at most ",
          4 * kNormVectors * kThreads, " on CUDA, got ", c_.hidden_size);
  auto limit = static_cast<size_t>(device_.shared_bytes);
  allow_shared(project<1, 6>, limit - 1024);
  allow_shared(project<1, 4>, limit - 1024);
  allow_shared(project<2, 4>, limit - 1024);
  allow_shared(project<4, 3>, limit - 1024);
  if (max_rows_ > kRowsFused)
    normed_ =
        DeviceBuffer<bf16>(static_cast<size_t>(max_rows_) * static_cast<size_t>(c_.hidden_size));
}

void CudaOps::project_rows(ProjectArgs& args, const Schedule* schedule) {
  int blocks = schedule ? schedule->blocks : std::min(device_.sms, args.segment[0].tiles);
  if (schedule) {
    args.items = schedule->items.data();
    args.items_per_block = schedule->items_per_block;
  }
  if (args.rows > kRowsFused && args.hidden != nullptr) {
    bf16* to = args.normed ? args.normed : normed_.data();
    launch_(norm_rows, dim3(static_cast<unsigned>(args.rows)), kThreads, 0, to, args.hidden,
            args.norm, args.k, args.eps);
    args.hidden = nullptr;
    args.normed = nullptr;
    args.input = to;
    args.input_stride = args.k;
  }
  // As many rows a block as shared memory holds: each row block streams the weights again.
  auto limit = static_cast<size_t>(device_.shared_bytes) - 1024;
  if (args.rows == 1 && shared_bytes(1, args.k, 8, 6) <= limit)
    launch_project<1, 6>(launch_, args, blocks, 8);
  else if (args.rows > 16 && shared_bytes(32, args.k, 2, 3) <= limit)
    launch_project<4, 3>(launch_, args, blocks, 2);
  else if (args.rows > 8 && shared_bytes(16, args.k, 2, 4) <= limit)
    launch_project<2, 4>(launch_, args, blocks, 2);
  else
    launch_project<1, 4>(launch_, args, blocks, args.rows > 4 && args.k > 4096 ? 2 : 4);
}

void CudaOps::embed(const EmbedArgs<float>& args) {
  launch_(embed_rows, dim3(static_cast<unsigned>(args.rows.rows)), 256, 0, args.hidden,
          Matrix(args.embed_tokens), args.rows.token);
}

void CudaOps::norm_in_proj(const NormInProjArgs<float>& args) {
  const LayerWeights& w = args.layer;
  ProjectArgs p;
  p.k = c_.hidden_size;
  p.rows = args.rows.rows;
  p.hidden = args.hidden;
  p.norm = w.input_layernorm;
  p.eps = static_cast<float>(c_.rms_norm_eps);
  p.out = args.proj;
  p.out_stride = args.proj_stride;
  if (w.type == LayerType::linear_attention) {
    const WeightView* views[] = {&w.in_proj_qkv, &w.in_proj_z, &w.in_proj_b, &w.in_proj_a};
    for (int s = 0; s < 4; ++s) {
      p.segment[s] = Matrix(*views[s]);
      if (s) p.offset[s] = p.offset[s - 1] + views[s - 1]->spec.n;
    }
    p.epilogue = Epilogue::conv;
    p.slot = args.rows.slot;
    p.state = args.conv_state;
    p.conv1d = w.conv1d;
    p.n = c_.conv_dim();
    project_rows(p, &schedule(views, false));
  } else {
    const WeightView* views[] = {&w.q_proj, &w.k_proj, &w.v_proj};
    for (int s = 0; s < 3; ++s) {
      p.segment[s] = Matrix(*views[s]);
      if (s) p.offset[s] = p.offset[s - 1] + views[s - 1]->spec.n;
    }
    project_rows(p, &schedule(views, false));
  }
}

void CudaOps::out_proj_residual(const OutProjArgs<float, bf16>& args) {
  ProjectArgs p;
  p.segment[0] = Matrix(args.weight);
  p.k = args.weight.spec.k;
  p.rows = args.rows;
  p.epilogue = Epilogue::residual;
  p.input = args.core;
  p.input_stride = args.core_stride;
  p.out = args.hidden;
  p.out_stride = args.weight.spec.n;
  project_rows(p, nullptr);
}

void CudaOps::norm_router_shared(const NormRouterSharedArgs<float, bf16>& args) {
  const LayerWeights& w = args.layer;
  ProjectArgs p;
  const WeightView* views[] = {&w.gate, &w.shared_expert_gate, &w.shared_gate, &w.shared_up};
  for (int s = 0; s < 4; ++s) p.segment[s] = Matrix(*views[s]);
  p.k = c_.hidden_size;
  p.rows = args.rows;
  p.epilogue = Epilogue::router;
  p.hidden = args.hidden;
  p.norm = w.post_attention_layernorm;
  p.eps = static_cast<float>(c_.rms_norm_eps);
  p.normed = args.normed;
  p.out = args.router;
  p.out_stride = c_.num_experts;
  p.shared_scale = args.shared_scale;
  p.shared = args.shared;
  p.n = c_.shared_expert_intermediate_size;
  project_rows(p, &schedule(views, true));
}

void CudaOps::lm_head(const LmHeadArgs<float>& args) {
  ProjectArgs p;
  p.segment[0] = Matrix(args.lm_head);
  p.k = c_.hidden_size;
  p.rows = args.rows;
  p.epilogue = Epilogue::logits;
  p.hidden = args.hidden;
  p.norm = args.norm;
  p.eps = static_cast<float>(c_.rms_norm_eps);
  p.slot = args.slot;
  p.state = args.logits;
  p.n = c_.vocab_size;
  project_rows(p, nullptr);
}

}  // namespace qwen_moe::cuda
