#include "cuda/arenas.h"

#include <algorithm>
#include <utility>

#include "cuda/step.h"
#include "engine/probe.h"

namespace qwen_moe::cuda {
namespace {

constexpr size_t kAlign = 256;

}  // namespace

Arenas::Arenas(const ModelConfig& config, StateLayout layout, int device, const Stream& stream)
    : config_(config), places_(std::move(layout), kAlign), device_(device), stream_(stream) {}

void Arenas::reserve(const ReserveOptions& options, size_t keep_free) {
  auto slots = static_cast<size_t>(options.slots) + 1;
  auto pages = static_cast<size_t>(options.pages) + 1;
  size_t state = slots * places_.slot_bytes() + pages * places_.page_bytes(), free = 0, total = 0;
  QWEN_MOE_CUDA(cudaMemGetInfo(&free, &total));
  size_t room = free > keep_free ? free - keep_free : 0;
  auto session_pages = static_cast<size_t>((options.max_context + kPageTokens - 1) / kPageTokens);
  size_t each = places_.slot_bytes() + places_.page_bytes() * session_pages;
  require<Capacity>(state <= room, options.slots, " sessions of ", options.max_context,
                    " tokens need ", state >> 20, " MiB of state (", places_.slot_bytes() >> 20,
                    " MiB for each session and ", places_.page_bytes() / kPageTokens,
                    " bytes for each token); of ", total >> 20, " MiB on cuda:", device_, " ",
                    room >> 20, " MiB are left beside weights, scratch and graphs, which fit ",
                    room / std::max<size_t>(each, 1),
                    " such sessions. Lower max_sessions or max_context");
  slot_arena_ = DeviceBuffer<std::byte>(slots * places_.slot_bytes());
  page_arena_ = DeviceBuffer<std::byte>(pages * places_.page_bytes());
  generation_.assign(slots, 0);
  device_generation_ = DeviceBuffer<uint32_t>(slots);
  last_token_ = DeviceBuffer<int32_t>(slots);
  stale_ = DeviceBuffer<int32_t>(slots);
  auto clear = [&](const auto& buffer) {
    QWEN_MOE_CUDA(cudaMemsetAsync(buffer.data(), 0, buffer.bytes(), stream_));
  };
  clear(slot_arena_);
  clear(page_arena_);
  clear(device_generation_);
  clear(last_token_);
  clear(stale_);
}

LayerState Arenas::layer(int layer) const {
  const LayerType type = config_.layer_types[static_cast<size_t>(layer)];
  if (type != LayerType::linear_attention) {
    // The kernels find V behind K.
    const std::string prefix = concat("layers.", layer, ".self_attn.");
    require<Error>(places_.offset_of(prefix + "v_cache") - places_.offset_of(prefix + "k_cache") ==
                       static_cast<size_t>(config_.kv_dim()) * kPageTokens * 2,
                   "k_cache and v_cache of layer ", layer, " are not neighbours");
  }
  return places_.layer(type, layer, slot_arena_.data(), page_arena_.data());
}

void Arenas::check_generation(int slot, uint32_t generation) const {
  require_generation(slot, generation_.at(static_cast<size_t>(slot)), generation);
}

Discovered Arenas::discover(Backend& backend, int slot, int page, const Handoff* input) {
  std::vector<std::byte> after(std::max(places_.slot_bytes(), places_.page_bytes()));
  return probe_writes(
      backend, slot, generation_[static_cast<size_t>(slot)], page, input, places_.offsets(),
      [&] {
        fill(slot_at(slot), kProbePattern, places_.slot_bytes());
        fill(page_at(page), kProbePattern, places_.page_bytes());
      },
      [&](BufferKind kind) {
        bool fixed = kind == BufferKind::fixed;
        if (size_t bytes = fixed ? places_.slot_bytes() : places_.page_bytes()) {
          QWEN_MOE_CUDA(cudaMemcpyAsync(after.data(), fixed ? slot_at(slot) : page_at(page), bytes,
                                        cudaMemcpyDeviceToHost, stream_));
          stream_.synchronize();
        }
        return after.data();
      });
}

void Arenas::set_generation(int slot, uint32_t generation) {
  DeviceGuard device(device_);
  generation_.at(static_cast<size_t>(slot)) = generation;
  cuda::set_generation(stream_, device_generation_.data(), slot, generation);
}

void Arenas::copy_slot(int to, int from) {
  copy(slot_at(to), slot_at(from), places_.slot_bytes());
  copy(last_token_.data() + to, last_token_.data() + from, sizeof(int32_t));
}

void Arenas::read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                         std::span<std::byte> to) {
  move(buffer, slot, pages, tokens, [&](std::byte* state, size_t at, const Run& run) {
    QWEN_MOE_CUDA(cudaMemcpy2DAsync(to.data() + at, run.row_pitch, state, run.width, run.width,
                                    run.rows, cudaMemcpyDeviceToHost, stream_));
  });
}

void Arenas::write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                          std::span<const std::byte> from) {
  move(buffer, slot, pages, tokens, [&](std::byte* state, size_t at, const Run& run) {
    QWEN_MOE_CUDA(cudaMemcpy2DAsync(state, run.width, from.data() + at, run.row_pitch, run.width,
                                    run.rows, cudaMemcpyHostToDevice, stream_));
  });
}

void Arenas::fill(std::byte* at, int value, size_t bytes) {
  DeviceGuard device(device_);
  QWEN_MOE_CUDA(cudaMemsetAsync(at, value, bytes, stream_));
}

void Arenas::copy(void* to, const void* from, size_t bytes) {
  DeviceGuard device(device_);
  QWEN_MOE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
}

// Calls copy_run(state bytes, offset in the row-major form, run) for every run of a buffer.
template <class CopyRun>
void Arenas::move(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                  const CopyRun& copy_run) {
  DeviceGuard device(device_);
  const StateBuffer& b = layout().buffers.at(buffer);
  if (b.kind == BufferKind::fixed) {
    copy_run(slot_at(slot) + places_.offsets()[buffer], 0, Run{b.bytes(), 1, b.bytes()});
  } else {
    auto heads = static_cast<size_t>(b.shape[0]);
    size_t width = b.bytes() / heads;  // one head of one token; a page is [heads, 64, head_dim]
    for (int t = 0; t < tokens; t += kPageTokens)
      for (size_t h = 0; h < heads; ++h)
        copy_run(page_at(pages[static_cast<size_t>(t / kPageTokens)]) + places_.offsets()[buffer] +
                     h * kPageTokens * width,
                 (static_cast<size_t>(t) * heads + h) * width,
                 Run{width, static_cast<size_t>(std::min(kPageTokens, tokens - t)), heads * width});
  }
  stream_.synchronize();
}

}  // namespace qwen_moe::cuda
