// Logits of more than 8 rows.
//
// The head has so many tiles that a warp takes whole ones: it adds their slices up in registers, in
// the order of the other projections, and nothing passes between warps.
#pragma once

#include "cuda/project_wide.cuh"

namespace qwen_moe::cuda {

// Grid (blocks, row blocks). Shared memory: activations [rows][pitch].
template <int kTiles>
__global__ __launch_bounds__(kWideThreads,
                             1) void project_logits(const __grid_constant__ ProjectArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ int slots[8 * kTiles];
  __shared__ float scales[8 * kTiles];
  const Matrix& m = args.segment[0];
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  int first_row = static_cast<int>(blockIdx.y) * args.rows_per_block;
  int rows = min(args.rows_per_block, args.rows - first_row), pitch = activation_pitch(args.k);
  // A round of all warps of all blocks; the last, that not all have a tile of, is shared evenly.
  int first_tile = thread / 32 * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  int round = kWideThreads / 32 * static_cast<int>(gridDim.x);

  TileCopy copy;
  HeldChunk chunk;
  int next = first_tile, next_slice = 0;
  auto find_next = [&] {
    chunk.next_bytes = 0;
    while (copy.left == 0) {
      if (next_slice == 0) {
        if (next >= m.tiles) return;
        copy.open(Tile(m, m.data + next * m.tile_bytes), {0, 0}, lane);
      }
      UnitRange slice = slice_units(args.k, next_slice, kWarps);
      copy.left = slice.end - slice.begin;
      if (++next_slice == kWarps) {
        next_slice = 0;
        next += round;
      }
    }
    copy.next_chunk(chunk, lane);
  };
  find_next();
  chunk.used(0, kChunkBytes / 512);  // all of it is free
  zero_ends(shared, args.k, rows);
  if (thread < rows) slots[thread] = slot_of(args, first_row + thread);
  wait_for_predecessor();
  launch_dependents();
  load_wide_rows(args, shared, pitch, first_row, rows, scales);
  uint32_t mine[kTiles];
  find_rows<kTiles>(mine, shared, pitch, rows, lane);

  int unit_shift = unit_shift_of(m.format), step = kChunkBytes >> unit_shift;
#pragma unroll 1
  for (int tile = first_tile; tile < m.tiles; tile += round) {
    float total[kTiles][4];
#pragma unroll 1
    for (int s = 0; s < kWarps; ++s) {
      UnitRange slice = slice_units(args.k, s, kWarps);
      TileSum<kTiles> sum;
      sum.clear();
#pragma unroll 1
      for (int unit = slice.begin; unit < slice.end; unit += step) {
        chunk.two_scales = chunk.next_scales;
        find_next();
        sum.add(unit_shift, m.group_shift, chunk, min(step, slice.end - unit), lane,
                [&](int i, int u, int half) {
                  return load_shared_16(mine[i] + (unit + u) * 128 + half * 64);
                });
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          total[i][j] = s == 0 ? sum.total[i][j] : __fadd_rn(total[i][j], sum.total[i][j]);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int row = 8 * i + 2 * (lane % 4) + j % 2, n = tile * 16 + lane / 4 + j / 2 * 8;
        if (row < rows && n < m.n && slots[row] != 0)
          args.state.at(slots[row])[n] = __fmul_rn(scales[row], total[i][j]);
      }
  }
}

}  // namespace qwen_moe::cuda
