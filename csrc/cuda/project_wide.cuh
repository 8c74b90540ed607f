// Projections of more than 8 rows.
//
// Shared memory goes to the inputs of as many rows as it holds, so weights come through registers:
// a lane asks for its share of a chunk where it has used that of the chunk before. Two groups of
// warps take the tiles of a block in turn, so that one sums products while the other finishes
// outputs.
#pragma once

#include "cuda/project.cuh"

namespace qwen_moe::cuda {

inline constexpr int kGroups = 2;
inline constexpr int kWideThreads = kGroups * kThreads;

// Two sets of partial sums a group: a second tile of a flush has its own, else they take turns.
inline size_t wide_shared_bytes(int rows, int k) {
  return static_cast<size_t>(rows) * static_cast<size_t>(activation_pitch(k)) +
         static_cast<size_t>(kGroups * 2 * kWarps * rows * kPartialPitch * 4);
}

// Grid (blocks, row blocks). Shared memory: activations [rows][pitch], partial sums [kGroups][2]
// [kWarps][rows][kPartialPitch].
template <int kTiles>
__global__ __launch_bounds__(kWideThreads,
                             1) void project_wide(const __grid_constant__ ProjectArgs args) {
  constexpr int kRounds = 8 * kTiles * 16 / kThreads;  // outputs of a tile that a thread finishes
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ Tile items[kMaxItems];
  __shared__ int slots[8 * kTiles];
  __shared__ float scales[8 * kTiles];
  int group = static_cast<int>(threadIdx.x) / kThreads;
  int thread = static_cast<int>(threadIdx.x) % kThreads, warp = thread / 32, lane = thread % 32;
  int first_row = static_cast<int>(blockIdx.y) * args.rows_per_block;
  int rows = min(args.rows_per_block, args.rows - first_row);
  int pitch = activation_pitch(args.k), tile_floats = kWarps * rows * kPartialPitch;
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(shared + rows * pitch) + group * 2 * tile_floats;
  UnitRange slice = slice_units(args.k, warp, kWarps);
  const TileList list(args, items, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  int count = list.count, flush = args.flush_tiles;
  if (thread < rows) slots[thread] = slot_of(args, first_row + thread);
  __syncthreads();

  TileCopy copy;
  HeldChunk chunk;
  int next = slice.begin == slice.end ? count : group * flush;
  auto find_next = [&] {
    chunk.next_bytes = 0;
    if (next >= count) return;
    if (copy.left == 0) copy.open(list.tile(next), slice, lane);
    copy.next_chunk(chunk, lane);
    if (copy.left == 0 && (++next & (flush - 1)) == 0) next += (kGroups - 1) * flush;
  };
  find_next();
  chunk.used(0, kChunkBytes / 512);  // all of it is free
  zero_ends(activations, args.k, rows);

  // What outputs of a tile need is brought into L2 ahead of it, and asked for at its end: registers
  // are short.
  int own_row = thread / 16, own_output = thread % 16;
  auto for_outputs = [&](int tile, const auto& visit) {
    TileList::Place place = list.place(tile);
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (int row = own_row + r * 16; row < rows)
        visit(r, row, place, place.tile * 16 + own_output);
  };
  auto prefetch = [&](int tile) {
    for_outputs(tile, [&](int, int row, TileList::Place place, int n) {
      prefetch_extra(args, place.segment, n, slots[row]);
    });
  };
  if (group < count) prefetch(group);
  wait_for_predecessor();
  launch_dependents();
  load_rows<kWideThreads>(activations, pitch, args.input + first_row * args.input_stride,
                          args.input_stride, rows, args.k);
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kGroups * kWarps) {
    float scale = 1.0f;
    if (args.squares) {
      RowSquares squares;
      squares.load(args.squares + (first_row + row) * (args.k / 16), args.k, lane);
      scale = squares.scale(args.inverse_k, args.eps);
    }
    if (lane == 0) scales[row] = scale;
    if (lane == 0 && args.row_scale && blockIdx.x == 0) args.row_scale[first_row + row] = scale;
  }
  __syncthreads();

  // Columns of the products beyond the last row take the last row again; nobody reads them.
  uint32_t mine[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    mine[i] = held_address(activations + min(8 * i + lane / 4, rows - 1) * pitch + lane % 4 * 16);
  int set = 0;
#pragma unroll 1
  for (int begin = group * flush; begin < count; begin += kGroups * flush) {
    int tiles = min(flush, count - begin);
    if (begin >= kGroups * flush) prefetch(begin);
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      TileSum<kTiles> sum;
      sum.clear();
      Tile tile = list.tile(begin + t);
      int step = kChunkBytes >> tile.unit_shift;
#pragma unroll 1
      for (int unit = slice.begin; unit < slice.end; unit += step) {
        chunk.two_scales = chunk.next_scales;
        find_next();
        sum.add(tile.unit_shift, tile.group_shift, chunk, min(step, slice.end - unit), lane,
                [&](int i, int u, int half) {
                  return load_shared_16(mine[i] + (unit + u) * 128 + half * 64);
                });
      }
      sum.store(partial + (set ^ t) * tile_floats + warp * rows * kPartialPitch, rows, lane);
    }
    Extra extra[kRounds];  // outputs of pairs of tiles need nothing
    if (flush == 1)
      for_outputs(begin, [&](int r, int row, TileList::Place place, int n) {
        extra[r] = extra_of(args, place.segment, first_row + row, n, slots[row]);
      });
    group_barrier(1 + group, kThreads);
    const float* from = partial + set * tile_floats;
    for (int t = 0; t < tiles; ++t)
      for_outputs(begin + t, [&](int r, int row, TileList::Place place, int) {
        if (args.epilogue == Epilogue::conv) extra[r].settle();
        finish_sums(args, place, first_row, rows, row, own_output, from + t * tile_floats, from,
                    scales[row], extra[r]);
      });
    if (flush == 1)
      set ^= 1;  // written again only after the next barrier
    else
      group_barrier(1 + group, kThreads);
  }
}

}  // namespace qwen_moe::cuda
