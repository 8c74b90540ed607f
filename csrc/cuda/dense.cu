// Projections: fp16 rows in, weight tiles streamed through the tensor cores, and what
// each phase does with a finished output.
#include "cuda/dense.h"

#include <algorithm>
#include <cmath>

#include "cuda/logits.cuh"
#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kMaxInputs = 8192;     // 8 rows of them fit shared memory
constexpr size_t kOwnShared = 1536;  // bytes of shared memory beside what a launch asks for
constexpr int kFewRows = 8;          // more rows than that take project_wide

constexpr int kRowThreads = 1024;  // of a row that is looked at value by value

constexpr int kRounds = 2;  // outputs of a flush that a thread finishes, at most

// Up to 8 rows a block. Grid (blocks, row blocks). Shared memory: activations [rows][pitch],
// partial sums [flush_tiles] [kWarps][rows][kPartialPitch], rings [kWarps][kStages][kStageBytes].
template <bool kOneRow, int kStages>
__global__ __launch_bounds__(kThreads, 2) void project(const __grid_constant__ ProjectArgs args) {
  constexpr int kTurns = kOneRow ? 1 : kRounds;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ Tile items[kMaxItems];
  __shared__ float scales[kFewRows];
  int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int first_row = kOneRow ? 0 : static_cast<int>(blockIdx.y) * args.rows_per_block;
  int rows = kOneRow ? 1 : min(args.rows_per_block, args.rows - first_row);
  int pitch = activation_pitch(args.k), partial_floats = kWarps * rows * kPartialPitch;
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(shared + rows * pitch);
  std::byte* ring =
      shared + rows * pitch + args.flush_tiles * partial_floats * 4 + warp * kStages * kStageBytes;
  UnitRange slice = slice_units(args.k, warp, kWarps);

  int only_slot = kOneRow ? slot_of(args, 0) : 0;  // on its way while the tiles are listed
  const TileList list(args, args.items != nullptr, items, static_cast<int>(blockIdx.x),
                      static_cast<int>(gridDim.x));
  int count = list.count;
  if (args.items) __syncthreads();

  TileCopy copy;
  uint32_t ring_address = shared_address(ring) + lane * 16;
  int next = slice.begin == slice.end ? count : 0;
  auto feed = [&]<Way kWay>(WayOf<kWay>, int stage) {
    if (next < count) {
      if (copy.left == 0) copy.open<kWay>(list.tile(next), slice, lane);
      copy.next_chunk<kWay>(ring_address + stage * kStageBytes, lane);
      next += copy.left == 0;
    }
    copy_async_commit();
  };
  // What the outputs of a flush need is asked for ahead of its tiles, and that of the first flush
  // ahead of the predecessor's end. A thread's outputs of a flush have the same place in a tile.
  Extra extra[kTurns];
  int own_output = thread % 16;
  auto load_extra = [&](int begin) {
    int most = min(args.flush_tiles, count - begin) * rows;
#pragma unroll
    for (int r = 0; r < kTurns; ++r) {
      int at = thread / 16 + r * (kThreads / 16);
      if (at >= most) break;
      TileList::Place place = list.place(begin + at / rows);
      int row = first_row + at % rows, slot = kOneRow ? only_slot : slot_of(args, row);
      extra[r] =
          extra_of(args, args.epilogue, place.segment, row, place.tile * 16 + own_output, slot);
      if (!kOneRow && args.epilogue == Epilogue::conv) extra[r].settle();  // registers are short
    }
  };
  // The kernels of one row start so early that the residual stream may still be written.
  bool late_extra = kOneRow && args.epilogue == Epilogue::residual;
  if (!late_extra) load_extra(0);  // before the weights, which it would queue behind
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) feed(WayOf<Way::any>{}, i);
  if (kOneRow) launch_dependents();
  zero_ends(activations, args.k, rows);

  // Columns of the products beyond the last row take the last row again; nobody reads them.
  uint32_t mine = held_address(activations + min(lane / 4, rows - 1) * pitch + lane % 4 * 16);
  auto rows_of = [&](int, int unit, int half) {
    return load_shared_16(mine + unit * 128 + half * 64);
  };

  wait_for_predecessor();
  load_slice<kOneRow>(activations, pitch, args.input + first_row * args.input_stride,
                      args.input_stride, rows, slice, lane);
  RowSquares squares;
  if (args.squares && warp < rows)
    squares.load(args.squares + (first_row + warp) * (args.k / 16), args.k, lane);
  // A unit beyond a slice meets scales of 0, but it must be finite.
  if (args.k % (2 * kUnit) != 0)
    __syncthreads();
  else
    __syncwarp();
  // Not while this block's warps wait for their rows: it takes issue slots.
  if (!kOneRow) launch_dependents();

  int stage = 0;
  for (int begin = 0; begin < count; begin += args.flush_tiles) {
    int tiles = min(args.flush_tiles, count - begin);
    if (begin > 0 || late_extra) load_extra(begin);
    if (begin > 0) __syncthreads();  // `partial` has been read
    with_way(kOneRow ? list.way : Way::any, [&]<Way kWay>(WayOf<kWay> way) {
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        TileSum<1, kOneRow> sum;
        sum.clear();
        Tile tile{};
        if (kWay == Way::any) tile = list.tile(begin + i);
        add_tile<kStages, kWay>(
            sum, tile.unit_shift, tile.group_shift, slice, ring, stage, lane,
            [&](int s) { feed(way, s); }, rows_of);
        sum.store(partial + i * partial_floats + warp * rows * kPartialPitch, rows, lane);
      }
    });
    if (begin == 0 && warp < rows) {
      float scale = kInputScale;
      if (args.squares) scale *= squares.scale(args.inverse_k, args.eps);
      if (lane == 0) scales[warp] = scale;
      if (lane == 0 && args.row_scale && blockIdx.x == 0) args.row_scale[first_row + warp] = scale;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kTurns; ++r) {
      int at = thread / 16 + r * (kThreads / 16);
      if (at >= tiles * rows) break;
      int i = at / rows, row = at - i * rows;
      const float* from = partial + i * partial_floats;
      if (kOneRow && args.epilogue == Epilogue::conv) extra[r].settle();
      finish_sums(args, args.epilogue, list.place(begin + i), first_row, rows, row, own_output,
                  from, from - partial_floats, scales[row], extra[r]);
    }
  }
}

// What the phase before leaves, for rows that come from elsewhere: another shard, or a prompt. Grid
// (rows).
__global__ void weigh_rows(Weighed to, const float* hidden, int k) {
  wait_for_predecessor();
  launch_dependents();
  int row = static_cast<int>(blockIdx.x);
  for (int n = static_cast<int>(threadIdx.x); n < k; n += static_cast<int>(blockDim.x))
    weigh_value(to, row, k, n, load_cg(hidden + static_cast<int64_t>(row) * k + n), to.norm[n]);
}

// hidden[row] = the embedding of the row's token. Grid (rows).
__global__ void embed_rows(float* hidden, Matrix embed_tokens, const int32_t* token, Weighed next) {
  wait_for_predecessor();
  launch_dependents();
  int row = static_cast<int>(blockIdx.x), id = load_cg(token + row), k = embed_tokens.k;
  const std::byte* tile = embed_tokens.data + id / 16 * embed_tokens.tile_bytes;
  for (int n = static_cast<int>(threadIdx.x); n < k; n += static_cast<int>(blockDim.x)) {
    float x = __bfloat162float(
        *reinterpret_cast<const bf16*>(tile + code_place(WeightFormat::bf16, id % 16, n).byte));
    hidden[static_cast<int64_t>(row) * k + n] = x;
    if (next.norm) weigh_value(next, row, k, n, x, next.norm[n]);
  }
}

template <bool kOneRow, int kStages>
struct Project {};

using WideKernel = void (*)(ProjectArgs);

template <int kTiles>
WideKernel wide_kernel(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::conv: return project_wide<kTiles, Epilogue::conv>;
    case Epilogue::plain: return project_wide<kTiles, Epilogue::plain>;
    case Epilogue::residual: return project_wide<kTiles, Epilogue::residual>;
    case Epilogue::router: return project_wide<kTiles, Epilogue::router>;
    case Epilogue::logits: return project_logits<kTiles>;
  }
  return nullptr;
}

// Tiles of a flush: an even number, so that a gate tile and its up tile stay together.
int flush_tiles_of(int rows, int most) {
  return std::min(most, std::clamp(kRounds * kThreads / (16 * rows) / 2 * 2, 2, 8));
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
  require(c_.hidden_size <= 16 * kMostSquares, "hidden_size must be at most ", 16 * kMostSquares,
          " on CUDA, got ", c_.hidden_size);
  auto limit = static_cast<size_t>(device_.shared_bytes);
  allow_shared(project<true, 4>, limit - kOwnShared);
  allow_shared(project<false, 3>, limit - kOwnShared);
  allow_shared(project<false, 2>, limit - kOwnShared);
  for (Epilogue epilogue :
       {Epilogue::conv, Epilogue::plain, Epilogue::residual, Epilogue::router, Epilogue::logits}) {
    allow_shared(wide_kernel<2>(epilogue), limit - kOwnShared);
    allow_shared(wide_kernel<4>(epilogue), limit - kOwnShared);
  }
  auto rows = static_cast<size_t>(max_rows_), hidden = static_cast<size_t>(c_.hidden_size);
  weighed_ = DeviceBuffer<Input>(rows * hidden);
  squares_ = DeviceBuffer<float>(rows * hidden / 16);
  row_scale_ = DeviceBuffer<float>(rows);
}

Weighed CudaOps::weigh(const float* hidden, const float* norm) {
  weighed_for_ = {norm ? hidden : nullptr, norm};
  return {weighed_.data(), squares_.data(), norm};
}

void CudaOps::take_normed(ProjectArgs& args, const float* hidden, const float* norm) {
  if (weighed_for_ != std::pair{hidden, norm})
    launch_(weigh_rows, dim3(static_cast<unsigned>(args.rows)), kRowThreads, 0, weigh(hidden, norm),
            hidden, c_.hidden_size);
  args.k = c_.hidden_size;
  args.input = weighed_.data();
  args.input_stride = args.k;
  args.squares = squares_.data();
  args.inverse_k = 1.0f / static_cast<float>(args.k);  // a division is slow, and waited for
  args.eps = static_cast<float>(c_.rms_norm_eps);
}

int CudaOps::share_tiles(ProjectArgs& args, std::span<const WeightView* const> views, bool pairs,
                         int blocks) {
  if (views.empty()) return std::min(blocks, args.segment[0].tiles);
  const Schedule& known = schedule(views, pairs, blocks);
  args.items = known.items.data();
  args.items_stride = known.items_stride;
  return known.blocks;
}

// All multiprocessors at once: row blocks run side by side, each with its share of them, so that a
// block loads its rows once, and weights that one row block reads are in L2 for the others.
template <int kTiles>
bool CudaOps::project_wide_rows(ProjectArgs& args, std::span<const WeightView* const> views,
                                bool pairs) {
  int row_blocks = (args.rows + 8 * kTiles - 1) / (8 * kTiles);
  args.rows_per_block = (args.rows + row_blocks - 1) / row_blocks;
  auto limit = static_cast<size_t>(device_.shared_bytes) - kOwnShared;
  bool logits = args.epilogue == Epilogue::logits;
  size_t bytes = wide_shared_bytes<kTiles>(args.rows_per_block, args.k, !logits);
  if (bytes > limit) return false;
  int tiles = 0;
  for (const WeightView* view : views) tiles += view->spec.tiles();
  // A list of tiles is at most kMaxItems long, and lists are balanced by bytes only.
  int blocks = std::max(device_.sms / row_blocks, std::min(device_.sms, tiles * 2 / kMaxItems));
  dim3 grid(static_cast<unsigned>(logits ? blocks : share_tiles(args, views, pairs, blocks)),
            static_cast<unsigned>(row_blocks));
  launch_(wide_kernel<kTiles>(args.epilogue), grid, kWideThreads, bytes, args);
  return true;
}

void CudaOps::project_rows(ProjectArgs& args, std::span<const WeightView* const> views,
                           bool pairs) {
  if ((args.rows > 16 && project_wide_rows<4>(args, views, pairs)) ||
      (args.rows > kFewRows && project_wide_rows<2>(args, views, pairs)))
    return;
  // As many rows a block as shared memory holds: each row block streams the weights again. With at
  // most half of it two blocks share a multiprocessor, and the next kernel starts early.
  auto all = static_cast<size_t>(device_.shared_bytes) - kOwnShared, half = all / 2 - kOwnShared;
  bool twice = args.epilogue == Epilogue::logits && args.rows <= kFewRows;
  int blocks = share_tiles(args, views, pairs, (twice ? 2 : 1) * device_.sms);
  int most = views.empty() ? (args.segment[0].tiles + blocks - 1) / blocks : args.items_stride - 1;
  auto launched = [&]<bool kOneRow, int kStages>(Project<kOneRow, kStages>, size_t limit) {
    int rows = std::min(args.rows, kFewRows), flush = flush_tiles_of(rows, most);
    size_t bytes = shared_bytes(rows, args.k, flush, kStages);
    if (bytes > limit) return false;
    // Those that have a block for every multiprocessor.
    if (args.epilogue != Epilogue::router && args.epilogue != Epilogue::logits)
      bytes = std::max(bytes, alone_shared(device_));
    args.rows_per_block = rows;
    args.flush_tiles = flush;
    dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((args.rows + rows - 1) / rows));
    launch_(project<kOneRow, kStages>, grid, kThreads, bytes, args);
    return true;
  };
  bool done = (args.rows == 1 && launched(Project<true, 4>{}, half)) ||
              launched(Project<false, 3>{}, half) || launched(Project<false, 2>{}, half) ||
              launched(Project<false, 3>{}, all);
  require<Error>(done, "no projection kernel holds ", args.k, " inputs");
}

void CudaOps::embed(const EmbedArgs<float>& args) {
  launch_(embed_rows, dim3(static_cast<unsigned>(args.rows.rows)), kRowThreads, 0, args.hidden,
          Matrix(args.embed_tokens), args.rows.token, weigh(args.hidden, args.next_norm));
}

void CudaOps::norm_in_proj(const NormInProjArgs<float>& args) {
  const LayerWeights& w = args.layer;
  share_pages_out(args.rows);
  ProjectArgs p;
  p.rows = args.rows.rows;
  take_normed(p, args.hidden, w.input_layernorm);
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
    project_rows(p, views, false);
  } else {
    const WeightView* views[] = {&w.q_proj, &w.k_proj, &w.v_proj};
    for (int s = 0; s < 3; ++s) {
      p.segment[s] = Matrix(*views[s]);
      if (s) p.offset[s] = p.offset[s - 1] + views[s - 1]->spec.n;
    }
    project_rows(p, views, false);
  }
}

void CudaOps::out_proj_residual(const OutProjArgs<float, Input>& args) {
  ProjectArgs p;
  p.segment[0] = Matrix(args.weight);
  p.way = way_of(args.weight.spec, kWarps);
  p.k = args.weight.spec.k;
  p.rows = args.rows;
  p.epilogue = Epilogue::residual;
  p.input = args.core;
  p.input_stride = args.core_stride;
  p.out = args.hidden;
  p.out_stride = args.weight.spec.n;
  p.next = weigh(args.hidden, args.next_norm);
  project_rows(p, {}, false);
}

void CudaOps::norm_router_shared(const NormRouterSharedArgs<float, Input>& args) {
  const LayerWeights& w = args.layer;
  ProjectArgs p;
  const WeightView* views[] = {&w.gate, &w.shared_expert_gate, &w.shared_gate, &w.shared_up};
  for (int s = 0; s < 4; ++s) p.segment[s] = Matrix(*views[s]);
  p.rows = args.rows;
  take_normed(p, args.hidden, w.post_attention_layernorm);
  p.row_scale = row_scale_.data();
  p.epilogue = Epilogue::router;
  p.out = args.router;
  p.out_stride = c_.num_experts;
  p.shared_scale = args.shared_scale;
  p.shared = args.shared;
  p.n = c_.shared_expert_intermediate_size;
  project_rows(p, views, true);
}

void CudaOps::lm_head(const LmHeadArgs<float>& args) {
  ProjectArgs p;
  p.segment[0] = Matrix(args.lm_head);
  p.way = way_of(args.lm_head.spec, kWarps);
  p.rows = args.rows;
  take_normed(p, args.hidden, args.norm);
  p.epilogue = Epilogue::logits;
  p.slot = args.slot;
  p.state = args.logits;
  p.n = c_.vocab_size;
  project_rows(p, {}, false);
}

}  // namespace qwen_moe::cuda
