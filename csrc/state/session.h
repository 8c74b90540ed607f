// One timeline: the tokens seen so far and the integers that say where their state lives.
#pragma once

#include <cstdint>
#include <vector>

namespace qwen_moe {

struct Session {
  int slot = 0;
  uint32_t generation = 0;
  std::vector<int32_t> pages;   // page i holds the KV of tokens [64 i, 64 i + 64)
  std::vector<int32_t> tokens;  // prompt and drawn tokens, in order
  int computed = 0;             // tokens[0, computed) are in the state; the rest are pending
  int reply_begin = 0;          // tokens[reply_begin, ...) were drawn since the last prefill
  bool has_logits = false;      // lm_head.logits of the slot belongs to tokens[computed - 1]

  int position() const { return static_cast<int>(tokens.size()); }
  int pending() const { return position() - computed; }
};

}  // namespace qwen_moe
