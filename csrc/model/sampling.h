// What the sampler reads and what it gives back. The checked, documented settings are Python's.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace qwen_moe {

inline constexpr int kMaxLogprobs = 20;

struct Sampling {
  double temperature = 0;         // 0: greedy
  int top_k = 0;                  // 0: off
  double top_p = 1;               // 1: off
  double min_p = 0;               // 0: off
  double repetition_penalty = 1;  // over the whole timeline
  double presence_penalty = 0;    // over the reply
  double frequency_penalty = 0;   // over the reply
  uint64_t seed = 0;
  int logprobs = -1;  // -1: none; n: of the drawn token and of the n likeliest

  void validate() const;  // InvalidArgument naming the setting
  // Penalties count the tokens so far, so that the host must know every one of them.
  bool penalized() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }
};

// One draw: from the logits of `slot`. The random number depends on seed and position alone.
struct SampleRow {
  int slot = 0;
  int position = 0;  // tokens in the timeline before this draw: where the drawn one goes
  const Sampling* sampling = nullptr;
  // Prompt and reply. Without penalties the newest token may be missing: the engine runs a step
  // ahead of what it knows.
  std::span<const int32_t> timeline;
  std::span<const int32_t> reply;
};

struct SampleResult {
  int32_t token = -1;
  bool finite = true;  // false: a logit was NaN or infinite, and nothing was drawn
  bool stale = false;  // the step named a generation that the slot no longer has; nothing written
  float logprob = 0;   // of `token`, from the raw logits at temperature 1
  int top_count = 0;
  std::pair<int32_t, float> top[kMaxLogprobs];  // likeliest first
};

}  // namespace qwen_moe
