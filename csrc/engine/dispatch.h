// Which step comes next: a pure function of the sessions that have work.
#pragma once

#include <array>
#include <span>

#include "engine/backend.h"

namespace qwen_moe {

// What one session waits for. `key` is whatever the caller wants back.
struct Work {
  int key = 0;
  bool prefill = false;  // pending prompt tokens, else one token to decode
  int position = 0;      // of the first pending token
  int pending = 0;
};

struct StepPlan {
  enum class Kind { none, prefill, decode };
  Kind kind = Kind::none;
  int tokens = 0;  // of the prefill chunk
  int rows = 0;    // sessions in `keys`; one for a prefill
  std::array<int, kMaxRows> keys{};
};

// Prefill chunks and decode steps alternate while both have work, so that a long prompt never
// stalls a running session for more than one chunk. `turn` rotates the choice among many.
StepPlan plan_step(std::span<const Work> work, bool last_was_prefill, unsigned turn,
                   const PrefillChunk& chunk = {});

// Tokens of the next prefill chunk: up to the next multiple of `chunk`.
int prefill_tokens(int position, int pending, int chunk = kPrefillChunk);

}  // namespace qwen_moe
