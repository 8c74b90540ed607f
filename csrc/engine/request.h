// What a session is asked for, and what comes back.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/sampling.h"

namespace qwen_moe {

struct Request {
  std::vector<int32_t> tokens;  // appended to the timeline first
  bool draw = false;            // false: prefill only
  Sampling sampling;
  int max_tokens = 0;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
};

enum class Finish { none, stop, length, stopped, error };

inline const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::none: return "";
    case Finish::stop: return "stop";
    case Finish::length: return "length";
    case Finish::stopped: return "stopped";
    case Finish::error: return "error";
  }
  return "";
}

// What a request produced since the last poll.
struct Progress {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // empty when not asked for
  std::vector<std::vector<std::pair<int32_t, float>>> top_logprobs;
  bool finished = true;
  Finish finish = Finish::none;
  std::string error;
};

}  // namespace qwen_moe
