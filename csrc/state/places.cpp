#include "state/places.h"

#include <utility>

#include "base/error.h"

namespace qwen_moe {

StatePlaces::StatePlaces(StateLayout layout, size_t align) : layout_(std::move(layout)) {
  for (const StateBuffer& b : layout_.buffers) {
    bool fixed = b.kind == BufferKind::fixed;
    size_t& total = fixed ? slot_bytes_ : page_bytes_;
    size_t bytes = b.bytes() * static_cast<size_t>(fixed ? 1 : kPageTokens);
    offsets_.push_back(total);
    total += (bytes + align - 1) / align * align;
  }
}

size_t StatePlaces::offset_of(const std::string& fqn) const {
  for (size_t i = 0; i < layout_.buffers.size(); ++i)
    if (layout_.buffers[i].fqn == fqn) return offsets_[i];
  throw InvalidArgument(concat("no state buffer named ", fqn));
}

SlotArray StatePlaces::slot_array(std::byte* slots, const std::string& fqn) const {
  return {reinterpret_cast<float*>(slots + offset_of(fqn)),
          static_cast<int64_t>(slot_bytes_ / sizeof(float))};
}

LayerState StatePlaces::layer(LayerType type, int layer, std::byte* slots, std::byte* pages) const {
  const std::string prefix = concat("layers.", layer, ".");
  LayerState state;
  if (type == LayerType::linear_attention) {
    state.conv_state = slot_array(slots, prefix + "linear_attn.conv_state");
    state.recurrent_state = slot_array(slots, prefix + "linear_attn.recurrent_state");
  } else {
    const std::string keys = prefix + "self_attn.k_cache";
    state.kv = {pages + offset_of(keys), static_cast<int64_t>(page_bytes_),
                layout_.find(keys)->dtype};
  }
  return state;
}

}  // namespace qwen_moe
