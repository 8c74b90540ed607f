// The memory verbs that the mutable-state manager asks of a backend. Slots and pages are integers;
// where their bytes lie is the backend's own business. Slot 0 and page 0 are the sink.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "state/layout.h"

namespace qwen_moe {

// What a probe run saw a method write.
struct Discovered {
  std::vector<StateBuffer> prefill;
  std::vector<StateBuffer> decode;
};

class StateStore {
 public:
  virtual ~StateStore() = default;

  virtual const StateLayout& layout() const = 0;  // declared

  // Runs prefill and decode on a slot and a page filled with a pattern, and reports which buffers
  // changed. The slot and the page are left dirty.
  virtual Discovered discover(int slot, int page) = 0;

  // The slot's generation from now on; steps that name another are refused.
  virtual void set_generation(int slot, uint32_t generation) = 0;
  virtual void clear_slot(int slot) = 0;  // copies the template: all zero
  virtual void copy_slot(int to, int from) = 0;
  virtual void copy_page(int to, int from) = 0;
  virtual void poison_slot(int slot) = 0;  // fills with NaN
  virtual void poison_page(int page) = 0;

  // Moves one buffer between a session and row-major bytes: [shape] of a fixed buffer,
  // [tokens, shape] of a per-token one, whose tokens lie in `pages`.
  virtual void read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                           std::span<std::byte> to) = 0;
  virtual void write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                            std::span<const std::byte> from) = 0;
};

}  // namespace qwen_moe
