// A GPU's memory as a home for weights. Both devices hold the same codes and scales: matrices are
// packed here as a host packs them, codes that a checkpoint has and vectors by the host's home. A
// kernel then puts the codes where the kernels of this device expect them.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/lanes.h"
#include "cuda/pack.h"
#include "cuda/runtime.h"
#include "cuda/tile.cuh"
#include "engine/backend.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kThreads = 256;

// A tile as runs of 16 bytes: first the scales, then the codes.
struct TileRuns {
  int scales = 0, total = 0;
};

TileRuns runs_of(const WeightSpec& spec) {
  return {static_cast<int>(spec.scale_bytes() / 16), static_cast<int>(spec.tile_bytes() / 16)};
}

// The 16 bytes of codes at `run` of a tile in device order; `from` are its codes in host order.
template <WeightFormat kFormat>
__device__ uint4 reordered(const std::byte* from, int run) {
  const int lane = run % 32, q = lane / 4, t = lane % 4;
  uint32_t word[4];
  if constexpr (kFormat == WeightFormat::int4) {
    // A host word holds 8 inputs of one output: inputs 0, 2, 4, 6 in its low half, 1, 3, 5, 7
    // above.
    const auto* vectors = reinterpret_cast<const uint32_t*>(from);  // [k / 8][16]
    for (int j = 0; j < 2; ++j) {
      const uint32_t* at = vectors + (run / 32 * 8 + j * 4 + t) * kTile + q;
      const uint32_t row = at[0], row8 = at[8];
      for (int h = 0; h < 2; ++h) {
        auto take = [h](uint32_t from_word, int pair, int high) {
          return from_word >> ((h * 2 + pair) * 4 + high * 16) & 15u;
        };
        uint32_t out = 0;
        for (int high = 0; high < 2; ++high)
          out |= (take(row, 0, high) | take(row8, 0, high) << 4 | take(row, 1, high) << 8 |
                  take(row8, 1, high) << 12)
                 << (16 * high);
        word[2 * j + h] = out;
      }
    }
  } else if constexpr (kFormat == WeightFormat::int8) {
    // A host word holds inputs 0, 2, 1, 3 of one output.
    const auto* vectors = reinterpret_cast<const uint32_t*>(from);  // [k / 4][16]
    for (int h = 0; h < 2; ++h) {
      const uint32_t* at = vectors + (run / 32 * 8 + t * 2 + h) * kTile + q;
      const uint32_t row = at[0], row8 = at[8];
      word[2 * h] = __byte_perm(row, row8, 0x6420) ^ 0x80808080u;
      word[2 * h + 1] = __byte_perm(row, row8, 0x7531) ^ 0x80808080u;
    }
  } else {
    const auto* elements = reinterpret_cast<const uint16_t*>(from);  // [k][16]
    const int s = run / 32 % 4, k0 = run / 128 * kUnit + s / 2 * 32 + t * 8 + s % 2 * 4;
    for (int p = 0; p < 4; ++p) {
      const uint16_t* at = elements + (k0 + p / 2 * 2) * kTile + q + p % 2 * 8;
      word[p] = at[0] | static_cast<uint32_t>(at[kTile]) << 16;
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// One block a tile; both sides hold whole tiles one after the other.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads) reorder(uint4* to, const uint4* from, TileRuns runs) {
  const int64_t base = static_cast<int64_t>(blockIdx.x) * runs.total;
  const auto* codes = reinterpret_cast<const std::byte*>(from + base + runs.scales);
  for (int i = static_cast<int>(threadIdx.x); i < runs.total; i += kThreads)
    to[base + i] = i < runs.scales ? from[base + i] : reordered<kFormat>(codes, i - runs.scales);
}

__device__ uint64_t mix(uint64_t z) {  // the output function of splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct RandomFill {
  TileRuns runs;
  uint64_t seed = 0;
  int n = 0, tiles = 0, groups = 0;
  uint16_t scale = 0;    // f16
  bool flip = false;     // give scales random signs
  float dense_step = 0;  // of the 16-bit integers that dense weights are drawn as
};

// Eight f16 scales: those of outputs 0 to 7 or 8 to 15 of a group.
__device__ uint4 random_scales(const RandomFill& f, int run, int lanes, uint64_t bits) {
  uint32_t word[4] = {};
  for (int i = 0; i < 8; ++i) {
    const int o = run % 2 * 8 + i;
    if (o >= lanes || run / 2 >= f.groups) continue;  // no such output, or past the last group
    const uint32_t sign = f.flip && (bits >> i & 1) ? 0x8000u : 0u;
    word[i / 2] |= (f.scale | sign) << (i % 2 * 16);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Eight bf16 weights; the words alternate between outputs q and q + 8.
__device__ uint4 random_dense(const RandomFill& f, int run, int lanes, uint64_t low,
                              uint64_t high) {
  const int q = run % 32 / 4;
  uint32_t word[4];
  for (int p = 0; p < 4; ++p) {
    const auto drawn = static_cast<uint32_t>((p < 2 ? low : high) >> (p % 2 * 32));
    auto value = [&](uint32_t half) {
      const float x = static_cast<float>(static_cast<int16_t>(half)) * f.dense_step;
      return (__float_as_uint(x) + 0x8000u) >> 16;
    };
    word[p] = q + p % 2 * 8 < lanes ? value(drawn & 0xffffu) | value(drawn >> 16) << 16 : 0u;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// One block a tile. Every run draws from a counter, so that any number of threads write the same.
template <bool kDense>
__global__ void __launch_bounds__(kThreads) fill(uint4* to, RandomFill f) {
  const int tile = static_cast<int>(blockIdx.x) % f.tiles;
  const uint64_t matrix = blockIdx.x / static_cast<unsigned>(f.tiles);
  const int lanes = min(kTile, f.n - tile * kTile);
  const uint64_t state =
      mix(f.seed + matrix) ^ mix(static_cast<uint64_t>(tile) + 0x632be59bd9b4e019u);
  uint4* out = to + static_cast<int64_t>(blockIdx.x) * f.runs.total;
  for (int i = static_cast<int>(threadIdx.x); i < f.runs.total; i += kThreads) {
    const uint64_t counter = state + static_cast<uint64_t>(2 * i + 1) * 0x9e3779b97f4a7c15u;
    const uint64_t low = mix(counter), high = mix(counter + 0x9e3779b97f4a7c15u);
    if (i < f.runs.scales) {
      out[i] = random_scales(f, i, lanes, low);
    } else if (kDense) {
      out[i] = random_dense(f, i, lanes, low, high);
    } else {
      out[i] = make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                          static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
    }
  }
}

// Tensors of several threads travel at once.
class CudaWeightHome : public WeightHome {
 public:
  CudaWeightHome(int device, std::shared_ptr<WeightHome> host)
      : device_(device_properties(device).device), host_(std::move(host)) {}

  std::string name() const override { return concat("cuda:", device_); }

  std::shared_ptr<std::byte> allocate(size_t bytes) override {
    DeviceGuard guard(device_);
    auto* data = static_cast<std::byte*>(DeviceMemory::allocate(bytes));
    // The last user may be a static that outlives the driver: nothing here may throw.
    return {data, [device = device_](std::byte* p) {
              int before = 0;
              if (cudaGetDevice(&before) != cudaSuccess) return;
              cudaSetDevice(device);
              cudaFree(p);
              cudaSetDevice(before);
            }};
  }

  void pack(std::byte* to, const TensorSlot& slot, const WeightSource& source,
            int64_t first) override {
    if (slot.kind != TensorKind::matrix) {
      // Packing may transpose, so a part of a vector would not be a part of what is stored.
      const int64_t end = first + source.shape().at(0);
      require(first == 0 && end == slot.shape[0], slot.fqn, ": entries ", first, " to ", end,
              " came; ", name(), " takes all ", slot.shape[0], " of a vector at once");
      std::vector<std::byte> packed(slot.bytes());
      host_->pack(packed.data(), slot, source, 0);
      return upload(to, packed.data(), packed.size());
    }
    check_supported(slot);
    pack_matrices(to, slot, source, first);
  }

  void copy_packed(std::byte* to, const TensorSlot& slot, const PackedSource& from,
                   size_t bytes) override {
    if (slot.kind != TensorKind::matrix) {
      std::vector<std::byte> packed(bytes);
      from(packed.data(), bytes);
      return upload(to, packed.data(), bytes);
    }
    check_supported(slot);
    DeviceGuard guard(device_);
    Lanes::Loan lane(lanes_);
    const size_t tile_bytes = slot.spec.tile_bytes();
    const size_t step = kChunk / tile_bytes * tile_bytes;
    for (size_t at = 0; at < bytes; at += step) {
      const size_t take = std::min(step, bytes - at);
      std::byte* buffer = (*lane).turn();
      (*lane).fill([&] { from(buffer, take); });
      (*lane).send((*lane).tiles(), take);
      deliver(*lane, to + at, slot.spec, take / tile_bytes);
    }
    (*lane).wait();
  }

  void fill_random(std::byte* to, const TensorSlot& slot, uint64_t seed) override {
    if (slot.kind != TensorKind::matrix) {
      std::vector<std::byte> packed(slot.bytes());
      host_->fill_random(packed.data(), slot, seed);
      return upload(to, packed.data(), packed.size());
    }
    check_supported(slot);
    DeviceGuard guard(device_);
    const Stream stream;
    const WeightSpec& spec = slot.spec;
    // The same deviations as on the host: unit-variance inputs give outputs of about unit variance.
    const float std =
        slot.role == WeightRole::embedding ? 1.0f : 1.0f / std::sqrt(static_cast<float>(spec.k));
    RandomFill f{.runs = runs_of(spec), .seed = seed, .n = spec.n, .tiles = spec.tiles()};
    const auto blocks = static_cast<unsigned>(spec.tiles() * spec.count);
    auto* out = reinterpret_cast<uint4*>(to);
    if (is_quantized(spec.format)) {
      // Codes are uniform. Those of int4 have a mean of -0.5, which random signs take away.
      const bool int4 = spec.format == WeightFormat::int4;
      f.groups = spec.k / spec.group;
      f.scale = __half_as_ushort(__float2half_rn(std / (int4 ? 4.637f : 73.9f)));
      f.flip = int4;
      fill<false><<<blocks, kThreads, 0, stream>>>(out, f);
    } else {
      f.dense_step = std * 1.7320508f / 32768.0f;  // uniform over [-sqrt(3) std, sqrt(3) std)
      fill<true><<<blocks, kThreads, 0, stream>>>(out, f);
    }
    QWEN_MOE_CUDA(cudaGetLastError());
    stream.synchronize();
  }

  void settle() override {
    DeviceGuard guard(device_);
    lanes_.clear();
  }

 protected:
  WeightHome& host() const { return *host_; }

  // Packs whole experts, or rows from the first of a tile to the last of one.
  void pack_matrices(std::byte* to, const TensorSlot& slot, const WeightSource& source,
                     int64_t first) {
    DeviceGuard guard(device_);
    Lanes::Loan loan(lanes_);
    Lane& lane = *loan;
    const WeightSpec& spec = slot.spec;
    QWEN_MOE_CUDA(cudaMemsetAsync(lane.bad(), 0, sizeof(int), lane.stream));
    if (slot.shape.size() == 3) {
      pack_experts(lane, to, slot, source, first);
    } else {
      const int64_t end = first + source.shape().at(0);
      require(first % kTile == 0 && (end % kTile == 0 || end == spec.n), slot.fqn, ": rows ", first,
              " to ", end, " are not whole tiles of ", kTile);
      pack_rows(lane, to + static_cast<size_t>(first / kTile) * spec.tile_bytes(), slot, source, 0,
                source.shape().at(0));
    }
    // Into pinned memory, as a copy elsewhere would go through the driver's own buffers.
    auto* bad = reinterpret_cast<int*>(lane.turn());
    QWEN_MOE_CUDA(
        cudaMemcpyAsync(bad, lane.bad(), sizeof(int), cudaMemcpyDeviceToHost, lane.stream));
    lane.wait();
    if (*bad) refuse(slot, source, first);
  }

  // Takes tiles in host order from the lane to where they stay.
  virtual void deliver(Lane& lane, std::byte* to, const WeightSpec& spec, size_t tiles) {
    const auto blocks = static_cast<unsigned>(tiles);
    const auto* from = reinterpret_cast<const uint4*>(lane.tiles());
    auto* out = reinterpret_cast<uint4*>(to);
    auto launch = [&](auto* kernel) {
      kernel<<<blocks, kThreads, 0, lane.stream>>>(out, from, runs_of(spec));
      QWEN_MOE_CUDA(cudaGetLastError());
    };
    switch (spec.format) {
      case WeightFormat::int4: return launch(&reorder<WeightFormat::int4>);
      case WeightFormat::int8: return launch(&reorder<WeightFormat::int8>);
      default: return launch(&reorder<WeightFormat::bf16>);
    }
  }

 private:
  // The host's packing of the same weights says what is wrong with them.
  void refuse(const TensorSlot& slot, const WeightSource& source, int64_t first) const {
    TensorSlot piece = slot;
    piece.shape[0] = source.shape().at(0);
    (slot.shape.size() == 3 ? piece.spec.count : piece.spec.n) = static_cast<int>(piece.shape[0]);
    if (first > 0) piece.fqn = concat(slot.fqn, ", from entry ", first);
    std::vector<std::byte> packed(piece.bytes());
    host_->pack(packed.data(), piece, source, 0);
    throw Format(concat(piece.fqn, ": ", name(), " could not pack its weights"));
  }

  void check_supported(const TensorSlot& slot) const {
    const WeightSpec& spec = slot.spec;
    require<Format>(spec.format == WeightFormat::bf16 || is_quantized(spec.format), slot.fqn, ": ",
                    name(), " holds matrices as bf16, int8 or int4, not ",
                    format_name(spec.format));
    require<Format>(!spec.has_zero, slot.fqn, ": ", name(),
                    " takes symmetric int4 weights; these have an offset per group");
    require<Format>(spec.k > 0 && spec.k % kUnit == 0, slot.fqn, ": ", spec.k,
                    " input features; the kernels of ", name(), " need a multiple of ", kUnit);
    require<Format>(!is_quantized(spec.format) || spec.group == kUnit || spec.group == 2 * kUnit,
                    slot.fqn, ": groups of ", spec.group, " weights share a scale; the kernels of ",
                    name(), " take ", kUnit, " or ", 2 * kUnit);
    require<Format>(!is_quantized(spec.format) || spec.k % spec.group == 0, slot.fqn,
                    ": groups of ", spec.group, " do not divide ", spec.k, " input features");
    require<Format>(spec.tile_bytes() <= kChunk, slot.fqn, ": ", spec.k,
                    " input features make a tile larger than ", kChunk, " bytes");
  }

  void pack_experts(Lane& lane, std::byte* to, const TensorSlot& slot, const WeightSource& source,
                    int64_t first) {
    const WeightSpec& spec = slot.spec;
    const size_t entry =
        static_cast<size_t>(spec.n) * static_cast<size_t>(spec.k) * dtype_size(source.dtype());
    to += static_cast<size_t>(first) * spec.matrix_bytes();
    const auto fit = static_cast<int64_t>(kChunk / room(spec, source.dtype(), spec.n));
    for (int64_t i = 0, count = source.shape().at(0); i < count;) {
      const int64_t take = std::min(std::max<int64_t>(fit, 1), count - i);
      const size_t at = static_cast<size_t>(i) * entry;
      TensorSlot piece = slot;
      piece.fqn = concat(slot.fqn, ", from expert ", first + i);
      if (fit == 0) {  // one expert is larger than a chunk
        piece.shape = {spec.n, spec.k};
        piece.spec.count = 1;
        pack_rows(lane, to, piece, source, at, spec.n);
      } else {
        piece.shape[0] = piece.spec.count = static_cast<int>(take);
        pack_piece(lane, to, piece, source, at);
      }
      i += take;
      to += static_cast<size_t>(take) * spec.matrix_bytes();
    }
  }

  // Rows of one matrix, from the first of a tile; they begin at byte `at` of the source.
  void pack_rows(Lane& lane, std::byte* to, const TensorSlot& slot, const WeightSource& source,
                 size_t at, int64_t rows) {
    const WeightSpec& spec = slot.spec;
    const int64_t step = static_cast<int64_t>(kChunk / room(spec, source.dtype(), kTile)) * kTile;
    require<Format>(step > 0, slot.fqn, ": ", spec.k, " input features make 16 rows larger than ",
                    kChunk, " bytes, which is as much as ", name(), " takes");
    for (int64_t row = 0; row < rows; row += step) {
      TensorSlot piece = slot;
      piece.shape[0] = piece.spec.n = static_cast<int>(std::min(step, rows - row));
      if (row > 0) piece.fqn = concat(slot.fqn, ", from row ", row, " of the piece");
      const size_t skip =
          static_cast<size_t>(row) * static_cast<size_t>(spec.k) * dtype_size(source.dtype());
      pack_piece(lane, to + static_cast<size_t>(row / kTile) * spec.tile_bytes(), piece, source,
                 at + skip);
    }
  }

  // Bytes of `rows` in the larger of the forms that they have on their way.
  static size_t room(const WeightSpec& spec, DType dtype, int rows) {
    const size_t packed = static_cast<size_t>((rows + kTile - 1) / kTile) * spec.tile_bytes();
    if (!packs_on_device(spec, dtype)) return packed;
    return std::max(packed,
                    static_cast<size_t>(rows) * static_cast<size_t>(spec.k) * dtype_size(dtype));
  }

  // Packs a whole small tensor, which begins at byte `at` of the source, and starts it on its way.
  void pack_piece(Lane& lane, std::byte* to, const TensorSlot& piece, const WeightSource& source,
                  size_t at) {
    const WeightSpec& spec = piece.spec;
    std::byte* buffer = lane.turn();
    if (packs_on_device(spec, source.dtype())) {
      const size_t bytes =
          static_cast<size_t>(num_elements(piece.shape)) * dtype_size(source.dtype());
      lane.fill([&] { source.copy(buffer, at, bytes); });
      lane.send(lane.rows(), bytes);
      pack_on_device(lane.tiles(), spec, lane.rows(), source.dtype(), lane.bad(), lane.stream);
    } else {
      lane.fill([&] { host_->pack(buffer, piece, source.part(at, piece.shape), 0); });
      lane.send(lane.tiles(), spec.bytes());
    }
    deliver(lane, to, spec, static_cast<size_t>(spec.tiles()) * static_cast<size_t>(spec.count));
  }

  void upload(std::byte* to, const std::byte* from, size_t bytes) {
    DeviceGuard guard(device_);
    Lanes::Loan lane(lanes_);
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, (*lane).stream));
    (*lane).stream.synchronize();
  }

  int device_;
  std::shared_ptr<WeightHome> host_;
  Lanes lanes_;
};

// The host's home, which lets a GPU pack matrices.
class CudaPacker : public CudaWeightHome {
 public:
  using CudaWeightHome::CudaWeightHome;

  std::string name() const override { return host().name(); }
  std::shared_ptr<std::byte> allocate(size_t bytes) override { return host().allocate(bytes); }

  void pack(std::byte* to, const TensorSlot& slot, const WeightSource& source,
            int64_t first) override {
    if (slot.kind == TensorKind::matrix && packs_on_device(slot.spec, source.dtype()))
      pack_matrices(to, slot, source, first);
    else
      host().pack(to, slot, source, first);
  }
  void copy_packed(std::byte* to, const TensorSlot& slot, const PackedSource& from,
                   size_t bytes) override {
    host().copy_packed(to, slot, from, bytes);
  }
  void fill_random(std::byte* to, const TensorSlot& slot, uint64_t seed) override {
    host().fill_random(to, slot, seed);
  }

 private:
  void deliver(Lane& lane, std::byte* to, const WeightSpec& spec, size_t tiles) override {
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, lane.tiles(), tiles * spec.tile_bytes(),
                                  cudaMemcpyDeviceToHost, lane.stream));
  }
};

}  // namespace
}  // namespace qwen_moe::cuda

namespace qwen_moe {

std::shared_ptr<WeightHome> make_cuda_weight_home(int device, std::shared_ptr<WeightHome> host) {
  return std::make_shared<cuda::CudaWeightHome>(device, std::move(host));
}

std::shared_ptr<WeightHome> make_cuda_packer(int device, std::shared_ptr<WeightHome> host) {
  return std::make_shared<cuda::CudaPacker>(device, std::move(host));
}

LoadingTimes cuda_loading_times() {
  const auto seconds = [](const std::atomic<int64_t>& sum) {
    return static_cast<double>(sum) * 1e-9;
  };
  const cuda::LaneTimes& times = cuda::lane_times;
  return {seconds(times.making), seconds(times.filling), seconds(times.waiting)};
}

size_t cuda_pinned_bytes() { return cuda::PinnedMemory::taken(); }

}  // namespace qwen_moe
