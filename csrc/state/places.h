// Where the buffers of a layout lie: fixed ones one after the other in a slot, those of tokens in a
// page, each at a multiple of an alignment.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "model/forward.h"
#include "state/layout.h"

namespace qwen_moe {

class StatePlaces {
 public:
  StatePlaces(StateLayout layout, size_t align);

  const StateLayout& layout() const { return layout_; }
  size_t slot_bytes() const { return slot_bytes_; }
  size_t page_bytes() const { return page_bytes_; }
  const std::vector<size_t>& offsets() const { return offsets_; }  // of every buffer
  size_t offset_of(const std::string& fqn) const;

  // In arenas of whole slots and pages.
  SlotArray slot_array(std::byte* slots, const std::string& fqn) const;
  LayerState layer(LayerType type, int layer, std::byte* slots, std::byte* pages) const;

 private:
  StateLayout layout_;
  std::vector<size_t> offsets_;
  size_t slot_bytes_ = 0, page_bytes_ = 0;
};

}  // namespace qwen_moe
