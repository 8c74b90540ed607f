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
template <int kTiles>
size_t wide_shared_bytes(int rows, int k, bool partial) {
  return static_cast<size_t>(rows) * static_cast<size_t>(activation_pitch(k)) +
         (partial ? static_cast<size_t>(kGroups * 2 * kWarps * 8 * kTiles * kPartialPitch * 4) : 0);
}

// Rows into shared memory, one after the other `pitch` bytes apart; all of a block's threads.
__device__ __forceinline__ void load_rows(std::byte* to, int pitch, const Input* from,
                                          int64_t stride, int rows, int k) {
  int vectors = k / 8;  // of 16 bytes in a row
  // Threads of a row: two short rows come side by side.
  int side = 2 * vectors <= kWideThreads ? kWideThreads / 2 : kWideThreads;
  int thread = static_cast<int>(threadIdx.x), second = thread >= side;
  for (int row = second; row < rows; row += kWideThreads == side ? 1 : 2)
    for (int at = thread - second * side; at < vectors; at += side)
      copy_async_16(to + row * pitch + at * 16, from + row * stride + at * 8);
  copy_async_commit();
  copy_async_wait<0>();
}

// The rows of a block into shared memory, and what their sums are multiplied by into `scales`. All
// threads.
__device__ __forceinline__ void load_wide_rows(const ProjectArgs& args, std::byte* activations,
                                               int pitch, int first_row, int rows, float* scales) {
  load_rows(activations, pitch, args.input + first_row * args.input_stride, args.input_stride, rows,
            args.k);
  int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kWideThreads / 32) {
    float scale = kInputScale;
    if (args.squares) {
      RowSquares squares;
      squares.load(args.squares + (first_row + row) * (args.k / 16), args.k, lane);
      scale *= squares.scale(args.inverse_k, args.eps);
    }
    if (lane == 0) scales[row] = scale;
    if (lane == 0 && args.row_scale && blockIdx.x == 0) args.row_scale[first_row + row] = scale;
  }
  __syncthreads();
}

// Where a lane reads its columns of the products; those beyond the last row take the last row
// again.
template <int kTiles>
__device__ __forceinline__ void find_rows(uint32_t (&mine)[kTiles], const std::byte* activations,
                                          int pitch, int rows, int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    mine[i] = held_address(activations + min(8 * i + lane / 4, rows - 1) * pitch + lane % 4 * 16);
}

// Grid (blocks, row blocks). Shared memory: activations [rows][pitch], partial sums [kGroups][2]
// [kWarps][8 * kTiles][kPartialPitch].
template <int kTiles, Epilogue kEpilogue>
__global__ __launch_bounds__(kWideThreads,
                             1) void project_wide(const __grid_constant__ ProjectArgs args) {
  constexpr int kRows = 8 * kTiles, kTileFloats = kWarps * kRows * kPartialPitch;
  constexpr int kRounds = kRows * 16 / kThreads;  // outputs of a tile that a thread finishes
  constexpr bool kListed = kEpilogue != Epilogue::residual;      // one matrix
  constexpr int kFlush = kEpilogue == Epilogue::router ? 2 : 1;  // tiles at once: gate and up
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ Tile items[kMaxItems];
  __shared__ int slots[kRows];
  __shared__ float scales[kRows];
  int group = static_cast<int>(threadIdx.x) / kThreads;
  int thread = static_cast<int>(threadIdx.x) % kThreads, warp = thread / 32, lane = thread % 32;
  int first_row = static_cast<int>(blockIdx.y) * args.rows_per_block;
  int rows = min(args.rows_per_block, args.rows - first_row);
  int pitch = activation_pitch(args.k);
  std::byte* activations = shared;
  auto* partial = reinterpret_cast<float*>(shared + rows * pitch) + group * 2 * kTileFloats;
  UnitRange slice = slice_units(args.k, warp, kWarps);
  const TileList list(args, kListed, items, static_cast<int>(blockIdx.x),
                      static_cast<int>(gridDim.x));
  int count = list.count;
  if (thread < rows) slots[thread] = slot_of(args, first_row + thread);
  __syncthreads();

  TileCopy copy;
  HeldChunk chunk;
  int next = slice.begin == slice.end ? count : group * kFlush;
  auto find_next = [&] {
    chunk.next_bytes = 0;
    if (next >= count) return;
    if (copy.left == 0) copy.open(list.tile(next), slice, lane);
    copy.next_chunk(chunk, lane);
    if (copy.left == 0 && (++next & (kFlush - 1)) == 0) next += (kGroups - 1) * kFlush;
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
      prefetch_extra(args, kEpilogue, place.segment, n, slots[row]);
    });
  };
  if (group < count) prefetch(group);
  wait_for_predecessor();
  launch_dependents();
  load_wide_rows(args, activations, pitch, first_row, rows, scales);
  uint32_t mine[kTiles];
  find_rows<kTiles>(mine, activations, pitch, rows, lane);
  int set = 0;
#pragma unroll 1
  for (int begin = group * kFlush; begin < count; begin += kGroups * kFlush) {
    int tiles = min(kFlush, count - begin);
    if (begin >= kGroups * kFlush) prefetch(begin);
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
      sum.store(partial + (set ^ t) * kTileFloats + warp * kRows * kPartialPitch, kRows, lane);
    }
    Extra extra[kRounds];  // outputs of pairs of tiles need nothing
    if (kFlush == 1)
      for_outputs(begin, [&](int r, int row, TileList::Place place, int n) {
        extra[r] = extra_of(args, kEpilogue, place.segment, first_row + row, n, slots[row]);
      });
    group_barrier(1 + group, kThreads);
    const float* from = partial + set * kTileFloats;
    for (int t = 0; t < tiles; ++t)
      for_outputs(begin + t, [&](int r, int row, TileList::Place place, int) {
        if (kEpilogue == Epilogue::conv) extra[r].settle();
        finish_sums(args, kEpilogue, place, first_row, kRows, row, own_output,
                    from + t * kTileFloats, from, scales[row], extra[r]);
      });
    if (kFlush == 1)
      set ^= 1;  // written again only after the next barrier
    else
      group_barrier(1 + group, kThreads);
  }
}

}  // namespace qwen_moe::cuda
