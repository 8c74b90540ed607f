// Host memory as a home for weights: packs tensors tile by tile on the thread pool.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"
#include "engine/backend.h"

namespace qwen_moe::cpu {
namespace {

class CpuWeightHome : public WeightHome {
 public:
  explicit CpuWeightHome(int threads) : pool_(ThreadPool::shared(threads)) {}

  std::string name() const override { return "cpu"; }
  std::shared_ptr<std::byte> allocate(size_t bytes) override { return allocate_shared(bytes); }

  void pack(std::byte* to, const TensorSlot& slot, const WeightSource& source,
            int64_t first) override {
    if (slot.kind != TensorKind::matrix)
      return pack_vector(reinterpret_cast<float*>(to), slot, source, first);
    const WeightSpec& spec = slot.spec;
    const int64_t entries = source.shape()[0];
    if (slot.shape.size() == 3) {  // experts, whole matrices
      to += static_cast<size_t>(first) * spec.matrix_bytes();
      return pack_matrices(to, slot, source, static_cast<int>(entries), spec.n);
    }
    // A plain matrix comes whole, or in pieces of whole tiles.
    const int64_t end = first + entries;
    require(first % kTile == 0 && (end % kTile == 0 || end == spec.n), slot.fqn, ": rows ", first,
            " to ", end, " are not whole tiles of ", kTile);
    pack_matrices(to, slot, source, 1, static_cast<int>(entries), static_cast<int>(first));
  }

  void copy_packed(std::byte* to, const TensorSlot&, const PackedSource& from,
                   size_t bytes) override {
    from(to, bytes);
  }

  void fill_random(std::byte* to, const TensorSlot& slot, uint64_t seed) override {
    if (slot.kind != TensorKind::matrix) {
      // Neutral vectors: unit norms, a mild decay, an averaging conv.
      float value = slot.kind == TensorKind::minus_exp   ? -0.1f
                    : slot.kind == TensorKind::conv_taps ? 0.5f
                                                         : 1.0f;
      std::fill_n(reinterpret_cast<float*>(to), num_elements(slot.shape), value);
      return;
    }
    const WeightSpec& spec = slot.spec;
    // Unit-variance inputs give outputs of about unit variance; embeddings are unit-variance
    // themselves.
    float std =
        slot.role == WeightRole::embedding ? 1.0f : 1.0f / std::sqrt(static_cast<float>(spec.k));
    int tiles = spec.tiles();
    run(spec.count * tiles, slot, [&](int task, int) {
      auto which = static_cast<size_t>(task / tiles);
      cpu::fill_random(to + which * spec.matrix_bytes(), spec, seed + which, std, task % tiles,
                       task % tiles + 1);
    });
  }

 private:
  // Tasks of the pool must not throw: the first error is carried out and raised with the tensor's
  // name.
  template <class Work>
  void run(int count, const TensorSlot& slot, const Work& work) {
    std::mutex mutex;
    std::string error;
    pool_->run(count, [&](int task, int worker) {
      try {
        work(task, worker);
      } catch (const std::exception& e) {
        std::lock_guard lock(mutex);
        if (error.empty()) error = e.what();
      }
    });
    require<Format>(error.empty(), slot.fqn, ": ", error);
  }

  // Rows [row, row + rows) of `count` matrices, which the source has one after the other. Who packs
  // a tile also reads it, so that it is in cache.
  void pack_matrices(std::byte* to, const TensorSlot& slot, const WeightSource& source, int count,
                     int rows, int row = 0) {
    const WeightSpec& spec = slot.spec;
    const size_t row_bytes = static_cast<size_t>(spec.k) * dtype_size(source.dtype());
    const int tiles = (rows + kTile - 1) / kTile;
    std::vector<std::vector<std::byte>> buffers(static_cast<size_t>(pool_->size()));
    run(count * tiles, slot, [&](int task, int worker) {
      const int which = task / tiles, begin = task % tiles * kTile;
      const int tile = row / kTile + task % tiles;
      const size_t bytes = static_cast<size_t>(std::min(kTile, rows - begin)) * row_bytes;
      const std::byte* from =
          source.get(buffers[static_cast<size_t>(worker)],
                     (static_cast<size_t>(which) * rows + begin) * row_bytes, bytes);
      pack_tiles(to + static_cast<size_t>(which) * spec.matrix_bytes(), spec,
                 from - static_cast<size_t>(tile) * kTile * row_bytes, source.dtype(), tile,
                 tile + 1);
    });
  }

  void pack_vector(float* to, const TensorSlot& slot, const WeightSource& source, int64_t first) {
    int64_t each = num_elements(slot.shape) / slot.shape[0];
    int64_t count = source.shape()[0] * each;
    const size_t bytes = static_cast<size_t>(count) * dtype_size(source.dtype());
    WeightSpec spec{.format = WeightFormat::f32, .n = 1, .k = static_cast<int>(count)};
    HostBuffer<std::byte> tile(spec.bytes());
    HostBuffer<float> values(static_cast<size_t>(count));
    std::vector<std::byte> buffer;
    try {
      pack_tiles(tile.data(), spec, source.get(buffer, 0, bytes), source.dtype(), 0, 1);
    } catch (const Format& e) {
      throw Format(concat(slot.fqn, ": ", e.what()));
    }
    unpack_row(values.data(), spec, tile.data(), 0);
    for (int64_t i = 0; i < count; ++i) {
      float w = values[static_cast<size_t>(i)];
      int64_t at = first * each + i;
      if (slot.kind == TensorKind::one_plus) w += 1.0f;
      if (slot.kind == TensorKind::minus_exp) w = -std::exp(w);
      if (slot.kind == TensorKind::conv_taps) at = at % each * slot.shape[0] + at / each;
      to[at] = w;
    }
  }

  std::shared_ptr<ThreadPool> pool_;
};

}  // namespace
}  // namespace qwen_moe::cpu

namespace qwen_moe {

std::shared_ptr<WeightHome> make_cpu_weight_home(int threads) {
  return std::make_shared<cpu::CpuWeightHome>(threads);
}

}  // namespace qwen_moe
