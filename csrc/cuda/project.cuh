// What the two projection kernels share: the tiles of a block, the rows, and what each phase does
// with a finished output.
#pragma once

#include "cuda/norm.cuh"

namespace qwen_moe::cuda {

// The tiles of a block: listed in shared memory, or an even share of segment 0. Kernels that know
// which, and their epilogue, when they are compiled spare themselves the questions.
struct TileList {
  struct Place {
    int segment, tile;
  };
  const ProjectArgs& args;
  bool listed;
  const Tile* items;  // [kMaxItems] of the block
  uint32_t held;      // their address
  int first = 0, count = 0;
  Way way;  // of all of them

  // All threads of a block; a barrier is to follow.
  __device__ __forceinline__ TileList(const ProjectArgs& args, bool listed, Tile* items, int block,
                                      int blocks)
      : args(args), listed(listed), items(items), held(held_address(items)) {
    int thread = static_cast<int>(threadIdx.x);
    if (listed) {
      const int32_t* from = args.items + block * args.items_stride;
      if (thread < args.items_stride - 1) {
        int item = __ldg(from + 1 + thread);
        const Matrix& m = args.segment[max(item, 0) >> 14];
        if (item >= 0) items[thread] = Tile(m, m.data + (item & 0x3fff) * m.tile_bytes, item);
      }
      int head = __ldg(from);
      count = head & 0xffff;
      way = static_cast<Way>(head >> 16);
    } else {
      auto tiles = static_cast<unsigned>(args.segment[0].tiles), of = static_cast<unsigned>(blocks);
      first = static_cast<int>(static_cast<unsigned>(block) * tiles / of);
      count = static_cast<int>(static_cast<unsigned>(block + 1) * tiles / of) - first;
      way = args.way;
    }
  }
  __device__ __forceinline__ Tile tile(int i) const {
    if (listed) {
      uint4 item = load_shared_16(held + static_cast<uint32_t>(i) * sizeof(Tile));
      return *reinterpret_cast<const Tile*>(&item);
    }
    const Matrix& m = args.segment[0];
    return Tile(m, m.data + (first + i) * m.tile_bytes);
  }
  __device__ __forceinline__ Place place(int i) const {
    if (!listed) return Place{0, first + i};
    return Place{items[i].place >> 14, items[i].place & 0x3fff};
  }
};

// What a finished output needs besides its sum, read early where that hides its latency.
struct Extra {
  int slot = 0;
  float a = 0, b = 0, c = 0;  // the residual and its next norm; or the conv window, oldest first
  float tap[4] = {};

  // The causal conv without this token, into `a`: waits for what was asked for.
  __device__ __forceinline__ void settle() { a = fmaf(tap[2], c, fmaf(tap[1], b, tap[0] * a)); }
};

__device__ __forceinline__ Extra extra_of(const ProjectArgs& args, Epilogue epilogue, int segment,
                                          int row, int n, int slot) {
  Extra extra;
  extra.slot = slot;
  if (epilogue == Epilogue::residual) {
    extra.a = load_cg(args.out + row * args.out_stride + n);
    if (args.next.norm) extra.b = __ldg(args.next.norm + n);
  } else if (epilogue == Epilogue::conv && segment == 0) {
    const float *taps = args.conv1d + n, *window = args.state.at(slot) + n;
#pragma unroll
    for (int i = 0; i < 4; ++i) extra.tap[i] = __ldg(taps + i * args.n);
    extra.a = load_cg(window);
    extra.b = load_cg(window + args.n);
    extra.c = load_cg(window + 2 * args.n);
  }
  return extra;
}

// Brings into L2 what `extra_of` will ask for and is not there yet.
__device__ __forceinline__ void prefetch_extra(const ProjectArgs& args, Epilogue epilogue,
                                               int segment, int n, int slot) {
  if (epilogue != Epilogue::conv || segment != 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    prefetch_l2(args.conv1d + i * args.n + n);
    if (i < 3) prefetch_l2(args.state.at(slot) + i * args.n + n);
  }
}

__device__ __forceinline__ int slot_of(const ProjectArgs& args, int row) {
  return args.slot == nullptr ? 0 : load_cg(args.slot + row);
}

// `extra` is settled; `before` is the sum of the tile before this one in the block: the gate of an
// up tile.
__device__ __forceinline__ void finish_output(const ProjectArgs& args, Epilogue epilogue,
                                              int segment, int row, int n, float sum, float before,
                                              const Extra& extra) {
  float* out = args.out + row * args.out_stride + args.offset[segment] + n;
  switch (epilogue) {
    case Epilogue::plain: *out = sum; return;
    case Epilogue::residual: {
      float x = extra.a + sum;
      *out = x;
      if (args.next.norm) weigh_value(args.next, row, args.segment[0].n, n, x, extra.b);
      return;
    }
    case Epilogue::conv: {
      if (segment != 0) {
        *out = sum;
        return;
      }
      *out = silu(fmaf(extra.tap[3], sum, extra.a));
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
        args.shared[static_cast<int64_t>(row) * args.n + n] = input_of(silu(before) * sum);
      return;
    case Epilogue::logits:
      if (extra.slot != 0) args.state.at(extra.slot)[n] = sum;
      return;
  }
}

// Finishes one output of a tile from the partial sums of its slices, of `rows` rows each; those of
// the tile before it in the list are at `before`. `scale` is the row's.
__device__ __forceinline__ void finish_sums(const ProjectArgs& args, Epilogue epilogue,
                                            TileList::Place place, int first_row, int rows, int row,
                                            int output, const float* partial, const float* before,
                                            float scale, const Extra& extra) {
  int n = place.tile * 16 + output;
  if (epilogue == Epilogue::router && place.segment == 2) return;  // by its up tile
  if (n >= args.segment[place.segment].n) return;                  // padding of the last tile
  float sum = __fmul_rn(scale, sum_slices(partial, rows, row, output)), gate = 0;
  if (epilogue == Epilogue::router && place.segment == 3)
    gate = __fmul_rn(scale, sum_slices(before, rows, row, output));
  finish_output(args, epilogue, place.segment, first_row + row, n, sum, gate, extra);
}

// The slice of up to 8 rows that a warp alone reads, into shared memory: through registers, since
// waiting for copies would wait for the weights asked for before them as well.
template <bool kOneRow>
__device__ __forceinline__ void load_slice(std::byte* to, int pitch, const Input* from,
                                           int64_t stride, int rows, UnitRange slice, int lane) {
  constexpr int kAtOnce = kOneRow ? 2 : 8;  // vectors of 16 bytes: of the row, or of as many rows
  int end = slice.end * 8;
  const auto* in = reinterpret_cast<const uint4*>(from);
#pragma unroll 1
  for (int v = slice.begin * 8 + lane; v < end; v += kOneRow ? 32 * kAtOnce : 32) {
    uint4 x[kAtOnce];
    auto at = [&](int i) { return kOneRow ? v + i * 32 : v; };
    auto there = [&](int i) { return kOneRow ? at(i) < end : i < rows; };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (there(i)) x[i] = load_cg(in + (kOneRow ? 0 : i * (stride / 8)) + at(i));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (there(i)) *reinterpret_cast<uint4*>(to + (kOneRow ? 0 : i * pitch) + at(i) * 16) = x[i];
  }
}

}  // namespace qwen_moe::cuda
