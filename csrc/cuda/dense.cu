// Projections: RMSNorm or bf16 rows in, weight tiles streamed through the tensor cores, and what
// each phase does with a finished output.
#include "cuda/dense.h"

#include <algorithm>
#include <cmath>

#include "cuda/norm.cuh"
#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kMaxInputs = 8192;     // 8 rows of them fit shared memory
constexpr size_t kOwnShared = 1536;  // bytes of shared memory beside what a launch asks for
constexpr int kRowsFused = 8;        // more rows than that are normed by a kernel of their own

// What a finished output needs besides its sum, read early where that hides its latency.
struct Extra {
  int slot = 0;
  float a = 0;                   // the residual, or what the conv window adds to an output
  float b = 0, c = 0, last = 0;  // the window's newer half, and the tap of this token
};

__device__ __forceinline__ Extra extra_of(const ProjectArgs& args, int segment, int row, int n) {
  Extra extra;
  if (args.epilogue == Epilogue::residual) {
    extra.a = load_cg(args.out + row * args.out_stride + n);
  } else if (args.epilogue == Epilogue::logits) {
    extra.slot = load_cg(args.slot + row);
  } else if (args.epilogue == Epilogue::conv && segment == 0) {
    // The causal conv over the window, oldest first.
    const float* taps = args.conv1d + n;
    float tap[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) tap[i] = __ldg(taps + i * args.n);
    extra.last = __ldg(taps + 3 * args.n);
    extra.slot = load_cg(args.slot + row);
    const float* window = args.state.at(extra.slot) + n;
    extra.a = load_cg(window);
    extra.b = load_cg(window + args.n);
    extra.c = load_cg(window + 2 * args.n);
    extra.a = fmaf(tap[2], extra.c, fmaf(tap[1], extra.b, tap[0] * extra.a));
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
      *out = silu(fmaf(extra.last, sum, extra.a));
      if (extra.slot == 0) return;
      float* window = args.state.at(extra.slot);
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
      if (extra.slot != 0) args.state.at(extra.slot)[n] = sum;
      return;
  }
}

// bf16 rows into shared memory, one after the other `pitch` bytes apart; all threads.
__device__ __forceinline__ void load_rows(std::byte* to, int pitch, const bf16* from,
                                          int64_t stride, int rows, int k) {
  int vectors = k / 8;  // of 16 bytes in a row
  for (int row = 0; row < rows; ++row)
    for (int at = static_cast<int>(threadIdx.x); at < vectors; at += kThreads)
      copy_async_16(to + row * pitch + at * 16, from + row * stride + at * 8);
  copy_async_commit();
  copy_async_wait<0>();
}

// Outputs of a flush that a thread finishes, at most.
constexpr int flush_rounds(int row_tiles) { return row_tiles == 4 ? 4 : 2; }

// Grid (blocks, row blocks). Shared memory: activations [rows][pitch], partial sums [flush_tiles]
// [kWarps][rows][kPartialPitch], rings [kWarps][kStages][kStageBytes].
// kRowTiles 0 is one row, known to be one.
template <int kRowTiles, int kStages>
__global__ __launch_bounds__(kThreads, kRowTiles <= 1 ? 2 : 1) void project(
    const __grid_constant__ ProjectArgs args) {
  constexpr bool kOneRow = kRowTiles == 0;
  constexpr int kTiles = kOneRow ? 1 : kRowTiles;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ Tile items[kMaxItems];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int first_row = kOneRow ? 0 : static_cast<int>(blockIdx.y) * args.rows_per_block;
  int rows = kOneRow ? 1 : min(args.rows_per_block, args.rows - first_row);
  int pitch = activation_pitch(args.k), partial_floats = kWarps * rows * kPartialPitch;
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(shared + rows * pitch);
  std::byte* ring =
      shared + rows * pitch + args.flush_tiles * partial_floats * 4 + warp * kStages * kStageBytes;
  UnitRange slice = slice_units(args.k, warp, kWarps);

  int first_tile = 0, count = 0;
  uint32_t held_items = held_address(items);
  if (args.items) {
    const int32_t* from = args.items + static_cast<int>(blockIdx.x) * args.items_stride;
    if (thread < args.items_stride - 1) {
      int item = __ldg(from + 1 + thread);
      const Matrix& m = args.segment[max(item, 0) >> 14];
      if (item >= 0) items[thread] = Tile(m, m.data + (item & 0x3fff) * m.tile_bytes, item);
    }
    count = __ldg(from);
    __syncthreads();
  } else {
    int64_t tiles = args.segment[0].tiles, block = blockIdx.x, blocks = gridDim.x;
    first_tile = static_cast<int>(block * tiles / blocks);
    count = static_cast<int>((block + 1) * tiles / blocks) - first_tile;
  }
  auto tile_at = [&](int i) {
    if (args.items) {
      uint4 item = load_shared_16(held_items + static_cast<uint32_t>(i) * sizeof(Tile));
      return *reinterpret_cast<const Tile*>(&item);
    }
    const Matrix& m = args.segment[0];
    return Tile(m, m.data + (first_tile + i) * m.tile_bytes);
  };
  struct Place {
    int segment, tile;
  };
  auto place_of = [&](int i) {
    if (!args.items) return Place{0, first_tile + i};
    return Place{items[i].place >> 14, items[i].place & 0x3fff};
  };

  TileCopy copy;
  uint32_t ring_address = shared_address(ring) + lane * 16;
  int next = slice.begin == slice.end ? count : 0;
  auto feed = [&](int stage) {
    if (next < count) {
      if (copy.left == 0) copy.open(tile_at(next), slice, lane);
      copy.next_chunk(ring_address + stage * kStageBytes, lane);
      next += copy.left == 0;
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) feed(i);
  zero_ends(activations, args.k, rows);

  // What the outputs of a flush need is asked for ahead of its tiles, and that of the first flush
  // ahead of the predecessor's end. A thread's outputs of a flush have the same place in a tile.
  constexpr int kRounds = flush_rounds(kTiles);
  Extra extra[kRounds];
  int own_output = thread % 16;
  auto load_extra = [&](int begin) {
    int most = min(args.flush_tiles, count - begin) * rows;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      int at = thread / 16 + r * (kThreads / 16);
      if (at >= most) break;
      Place item = place_of(begin + at / rows);
      extra[r] = extra_of(args, item.segment, first_row + at % rows, item.tile * 16 + own_output);
    }
  };
  load_extra(0);

  if (args.input != nullptr) {
    wait_for_predecessor();
    launch_dependents();
    load_rows(activations, pitch, args.input + first_row * args.input_stride, args.input_stride,
              rows, args.k);
  } else {
    float4 weight[kNormVectors] = {};
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v)
      if (int at = v * 4 * kThreads + thread * 4; at < args.k)
        weight[v] = *reinterpret_cast<const float4*>(args.norm + at);
    wait_for_predecessor();
    launch_dependents();
    if constexpr (kOneRow) {
      norm_block<1, kNormVectors>(activations, pitch, args, first_row, 1, weight);
    } else {
      // As many rows at once as registers hold; more than 8 come normed.
      constexpr int kFew = kTiles == 1 ? 4 : 1, kMany = kTiles == 1 ? 8 : 1;
      if (rows > kFew && args.k <= kNormVectors / 2 * 4 * kThreads) {
        norm_block<kMany, kNormVectors / 2>(activations, pitch, args, first_row, rows, weight);
      } else {
#pragma unroll 1
        for (int row = 0; row < rows; row += kFew) {
          if (row > 0) __syncthreads();  // the sums have been read
          norm_block<kFew, kNormVectors>(activations + row * pitch, pitch, args, first_row + row,
                                         rows - row, weight);
        }
      }
    }
  }
  __syncthreads();

  // Columns of the products beyond the last row take the last row again; nobody reads them.
  uint32_t mine[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    mine[i] = held_address(activations + min(8 * i + lane / 4, rows - 1) * pitch + lane % 4 * 16);
  auto rows_of = [&](int i, int unit, int half) {
    return load_shared_16(mine[i] + unit * 128 + half * 64);
  };
  int stage = 0;
  for (int begin = 0; begin < count; begin += args.flush_tiles) {
    int tiles = min(args.flush_tiles, count - begin);
    if (begin > 0) {
      load_extra(begin);
      __syncthreads();  // `partial` has been read
    }
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      TileSum<kTiles> sum;
      sum.clear();
      Tile tile = tile_at(begin + i);
      add_tile<kTiles, kStages>(sum, tile.unit_shift, tile.group_shift, slice, ring, stage, lane,
                                feed, rows_of);
      sum.store(partial + i * partial_floats + warp * rows * kPartialPitch, rows, lane);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      int at = thread / 16 + r * (kThreads / 16);
      if (at >= tiles * rows) break;
      int i = at / rows, row = at - i * rows;
      Place item = place_of(begin + i);
      if (args.epilogue == Epilogue::router && item.segment == 2) continue;  // by its up tile
      int n = item.tile * 16 + own_output;
      if (n >= args.segment[item.segment].n) continue;  // padding of the last tile
      const float* from = partial + i * partial_floats;
      float result = sum_slices(from, rows, row, own_output), gate = 0;
      if (args.epilogue == Epilogue::router && item.segment == 3)
        gate = sum_slices(from - partial_floats, rows, row, own_output);
      finish_output(args, item.segment, first_row + row, n, result, gate, extra[r]);
    }
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

template <int kTiles, int kStages>
struct Project {};

// Tiles of a flush: an even number, so that a gate tile and its up tile stay together.
int flush_tiles_of(int row_tiles, int rows, int most) {
  return std::min(most, std::clamp(flush_rounds(row_tiles) * kThreads / (16 * rows) / 2 * 2, 2, 8));
}

size_t shared_bytes(int rows, int k, int flush_tiles, int stages) {
  return static_cast<size_t>(rows) * activation_pitch(k) +
         static_cast<size_t>(flush_tiles * kWarps * rows * kPartialPitch * 4) +
         static_cast<size_t>(kWarps * stages * kStageBytes);
}

}  // namespace

void CudaOps::reserve_dense() {
  for (int k : {c_.hidden_size, c_.value_dim(), c_.attention_dim()})
    require(k % kUnit == 0 && k <= kMaxInputs,
            "the CUDA kernels take input sizes that are multiples of ", kUnit, " up to ",
            kMaxInputs, "; this model has a matrix with ", k);
  require(c_.hidden_size <= 4 * kNormVectors * kThreads, "hidden_size must be at most ",
          4 * kNormVectors * kThreads, " on CUDA, got ", c_.hidden_size);
  auto limit = static_cast<size_t>(device_.shared_bytes);
  allow_shared(project<0, 4>, limit - kOwnShared);
  allow_shared(project<1, 3>, limit - kOwnShared);
  allow_shared(project<1, 2>, limit - kOwnShared);
  allow_shared(project<2, 3>, limit - kOwnShared);
  allow_shared(project<4, 3>, limit - kOwnShared);
  if (max_rows_ > kRowsFused)
    normed_ =
        DeviceBuffer<bf16>(static_cast<size_t>(max_rows_) * static_cast<size_t>(c_.hidden_size));
}

void CudaOps::project_rows(ProjectArgs& args, const Schedule* schedule) {
  int blocks = schedule ? schedule->blocks : std::min(device_.sms, args.segment[0].tiles);
  if (schedule) {
    args.items = schedule->items.data();
    args.items_stride = schedule->items_stride;
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
  // As many rows a block as shared memory holds: each row block streams the weights again. With at
  // most half of it two blocks share a multiprocessor, and the next kernel starts early.
  auto all = static_cast<size_t>(device_.shared_bytes) - kOwnShared, half = all / 2 - kOwnShared;
  if (args.epilogue == Epilogue::logits && args.rows <= kRowsFused) blocks = 2 * device_.sms;
  int most = schedule ? schedule->items_stride - 1 : (args.segment[0].tiles + blocks - 1) / blocks;
  auto launched = [&]<int kTiles, int kStages>(Project<kTiles, kStages>, size_t limit) {
    int rows = std::min(args.rows, std::max(8 * kTiles, 1)),
        flush = flush_tiles_of(kTiles, rows, most);
    size_t bytes = shared_bytes(rows, args.k, flush, kStages);
    if (bytes > limit) return false;
    args.rows_per_block = rows;
    args.flush_tiles = flush;
    dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((args.rows + rows - 1) / rows));
    launch_(project<kTiles, kStages>, grid, kThreads, bytes, args);
    return true;
  };
  bool done = args.rows > 16 && launched(Project<4, 3>{}, all);
  done = done || (args.rows > 8 && launched(Project<2, 3>{}, all));
  if (args.rows == 1) done = launched(Project<0, 4>{}, half);
  done = done || launched(Project<1, 3>{}, half) || launched(Project<1, 2>{}, half) ||
         launched(Project<1, 3>{}, all);
  require<Error>(done, "no projection kernel holds ", args.k, " inputs");
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
