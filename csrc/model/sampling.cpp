#include "model/sampling.h"

#include <cmath>

#include "base/error.h"

namespace qwen_moe {

void Sampling::validate() const {
  require(std::isfinite(temperature) && temperature >= 0, "temperature must be 0 or more, got ",
          temperature);
  require(top_k >= 0, "top_k must be 0 (off) or more, got ", top_k);
  require(top_p > 0 && top_p <= 1, "top_p must be in (0, 1], got ", top_p);
  require(min_p >= 0 && min_p < 1, "min_p must be in [0, 1), got ", min_p);
  require(std::isfinite(repetition_penalty) && repetition_penalty > 0,
          "repetition_penalty must be positive, got ", repetition_penalty);
  require(std::isfinite(presence_penalty), "presence_penalty must be finite, got ",
          presence_penalty);
  require(std::isfinite(frequency_penalty), "frequency_penalty must be finite, got ",
          frequency_penalty);
  require(logprobs >= -1 && logprobs <= kMaxLogprobs, "logprobs must be at most ", kMaxLogprobs,
          ", got ", logprobs);
}

}  // namespace qwen_moe
