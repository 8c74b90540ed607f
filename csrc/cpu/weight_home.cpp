// Host memory as a home for weights: packs tensors tile by tile on the thread pool.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>

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

  void pack(std::byte* to, const TensorSlot& slot, const TensorView& source,
            int64_t first) override {
    if (slot.kind != TensorKind::matrix)
      return pack_vector(reinterpret_cast<float*>(to), slot, source, first);
    const WeightSpec& spec = slot.spec;
    const auto* from = static_cast<const std::byte*>(source.data);
    size_t row_bytes = static_cast<size_t>(spec.k) * dtype_size(source.dtype);
    if (slot.shape.size() == 3) {  // experts, whole matrices
      int tiles = spec.tiles(), count = static_cast<int>(source.shape[0]);
      run(count * tiles, slot, [&](int task) {
        auto which = static_cast<size_t>(task / tiles);
        pack_tiles(to + (static_cast<size_t>(first) + which) * spec.matrix_bytes(), spec,
                   from + which * static_cast<size_t>(spec.n) * row_bytes, source.dtype,
                   task % tiles, task % tiles + 1);
      });
      return;
    }
    // A plain matrix comes whole, or in pieces of whole tiles.
    int64_t end = first + source.shape[0];
    require(first % kTile == 0 && (end % kTile == 0 || end == spec.n), slot.fqn, ": rows ", first,
            " to ", end, " are not whole tiles of ", kTile);
    int tile = static_cast<int>(first / kTile), tiles = static_cast<int>((end + kTile - 1) / kTile);
    const std::byte* base = from - static_cast<size_t>(first) * row_bytes;
    run(tiles - tile, slot,
        [&](int task) { pack_tiles(to, spec, base, source.dtype, tile + task, tile + task + 1); });
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
    run(spec.count * tiles, slot, [&](int task) {
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
    pool_->run(count, [&](int task, int) {
      try {
        work(task);
      } catch (const std::exception& e) {
        std::lock_guard lock(mutex);
        if (error.empty()) error = e.what();
      }
    });
    require<Format>(error.empty(), slot.fqn, ": ", error);
  }

  void pack_vector(float* to, const TensorSlot& slot, const TensorView& source, int64_t first) {
    int64_t each = num_elements(slot.shape) / slot.shape[0];
    int64_t count = source.shape[0] * each;
    WeightSpec spec{.format = WeightFormat::f32, .n = 1, .k = static_cast<int>(count)};
    HostBuffer<std::byte> tile(spec.bytes());
    HostBuffer<float> values(static_cast<size_t>(count));
    try {
      pack_tiles(tile.data(), spec, source.data, source.dtype, 0, 1);
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
