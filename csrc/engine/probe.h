// How a backend discovers what its methods write: it runs them on state full of a pattern, and
// whatever differs afterwards was written.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "engine/backend.h"

namespace qwen_moe {

inline constexpr unsigned char kProbePattern = 0x25;  // a small number in float32 and in bfloat16

// Buffer i lies offsets[i] bytes into a slot or a page. `fill()` fills both with the pattern;
// `bytes_of(kind)` gives the slot (fixed) or the page (per_token) to the host. `input` is the
// residual stream of two rows, or null on the first shard.
template <class Fill, class BytesOf>
Discovered probe_writes(Backend& backend, int slot, uint32_t generation, int page,
                        const Handoff* input, std::span<const size_t> offsets, const Fill& fill,
                        const BytesOf& bytes_of) {
  auto written_by = [&](auto&& run) {
    fill();
    run();
    std::vector<StateBuffer> written;
    const std::vector<StateBuffer>& buffers = backend.layout().buffers;
    for (BufferKind kind : {BufferKind::fixed, BufferKind::per_token}) {
      const std::byte* state = bytes_of(kind);
      for (size_t i = 0; i < buffers.size(); ++i) {
        const StateBuffer& b = buffers[i];
        if (b.kind != kind) continue;
        const std::byte* at = state + offsets[i];
        size_t bytes = b.bytes() * (kind == BufferKind::fixed ? 1 : kPageTokens);
        if (std::any_of(at, at + bytes, [](std::byte x) { return x != std::byte{kProbePattern}; }))
          written.push_back(b);
      }
    }
    return written;
  };
  int32_t pages[] = {page};
  int32_t tokens[] = {0, 0};
  Discovered found;
  found.prefill = written_by([&] {
    backend.prefill({.slot = slot,
                     .generation = generation,
                     .position = 0,
                     .tokens = tokens,
                     .pages = pages,
                     .logits = true},
                    input);
  });
  DecodeRow row{.slot = slot, .generation = generation, .position = 0, .token = 0, .pages = pages};
  found.decode = written_by([&] { backend.decode({&row, 1}, input); });
  return found;
}

}  // namespace qwen_moe
