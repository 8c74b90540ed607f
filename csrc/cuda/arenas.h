// The state of all sessions on one GPU: arenas of slots and pages, what else lies there for every
// slot, and the verbs of StateStore over them. Verbs enqueue on the stream of the backend and
// return, except those that hand something to the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "engine/backend.h"
#include "state/places.h"

namespace qwen_moe::cuda {

class Arenas {
 public:
  // `config` and `stream` outlive it.
  Arenas(const ModelConfig& config, StateLayout layout, int device, const Stream& stream);

  // Throws Capacity when the arenas do not fit and leave `keep_free` bytes of the device.
  void reserve(const ReserveOptions& options, size_t keep_free);

  const StateLayout& layout() const { return places_.layout(); }
  size_t slot_arena_bytes() const { return slot_arena_.bytes(); }
  size_t page_arena_bytes() const { return page_arena_.bytes(); }

  // Where the kernels find it.
  LayerState layer(int layer) const;
  SlotArray logits() const { return places_.slot_array(slot_arena_.data(), "lm_head.logits"); }
  const uint32_t* generation() const { return device_generation_.data(); }  // [slots]
  int32_t* last_token() const { return last_token_.data(); }                // [slots] drawn last
  // [slots] 1: the last step named an old generation
  int32_t* stale() const { return stale_.data(); }

  // Refuses a step that names another generation than the slot's.
  void check_generation(int slot, uint32_t generation) const;

  // As StateStore has them; `backend` runs the probes, `input` is the residual stream for them or
  // null on the first shard.
  Discovered discover(Backend& backend, int slot, int page, const Handoff* input);
  void set_generation(int slot, uint32_t generation);
  void clear_slot(int slot) { fill(slot_at(slot), 0, places_.slot_bytes()); }
  void copy_slot(int to, int from);
  void copy_page(int to, int from) { copy(page_at(to), page_at(from), places_.page_bytes()); }
  // All bits set is a NaN in float32 and in bfloat16.
  void poison_slot(int slot) { fill(slot_at(slot), 0xff, places_.slot_bytes()); }
  void poison_page(int page) { fill(page_at(page), 0xff, places_.page_bytes()); }
  void read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to);
  void write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from);

 private:
  struct Run {  // rows of `width` bytes, `row_pitch` apart in the row-major form
    size_t width, rows, row_pitch;
  };

  std::byte* slot_at(int slot) const {
    return slot_arena_.data() + static_cast<size_t>(slot) * places_.slot_bytes();
  }
  std::byte* page_at(int page) const {
    return page_arena_.data() + static_cast<size_t>(page) * places_.page_bytes();
  }
  void fill(std::byte* at, int value, size_t bytes);
  void copy(void* to, const void* from, size_t bytes);
  template <class CopyRun>
  void move(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
            const CopyRun& copy_run);

  const ModelConfig& config_;
  StatePlaces places_;
  int device_;
  const Stream& stream_;

  DeviceBuffer<std::byte> slot_arena_;  // [slots, slot_bytes]
  DeviceBuffer<std::byte> page_arena_;  // [pages, page_bytes]
  std::vector<uint32_t> generation_;    // [slots]
  DeviceBuffer<uint32_t> device_generation_;
  DeviceBuffer<int32_t> last_token_;
  DeviceBuffer<int32_t> stale_;
};

}  // namespace qwen_moe::cuda
