// Drawing the next token on the device, for the rows of a step at once. The kernels read everything
// from arrays at fixed addresses, so that a captured graph can be replayed with other settings.
//
// What is drawn is what cpu/sample.cpp defines. Weights are integers here, floor(2^40 exp((logit -
// largest) / temperature)), so that their sums are exact in any order: a draw depends on nothing
// but the logits, the settings, the seed and the position. It differs from the CPU's only where the
// random number falls within rounding of the boundary between two tokens. A token whose weight is
// below 2^-40 of the likeliest is never drawn.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "model/sampling.h"

namespace qwen_moe::cuda {

// One row of a draw.
struct DrawRow {
  int32_t slot = 0;        // whose logits; 0: padding, nothing is drawn
  int32_t draw = 0;        // 0: nothing is drawn
  double temperature = 0;  // 0: greedy
  double top_p = 1;
  double min_p = 0;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  float repetition_penalty = 1;
  int32_t top_k = 0;
  uint64_t seed = 0;
  int64_t position = 0;  // the counter of the random number
  int32_t logprobs = -1;
  int32_t penalty_begin = 0, penalty_count = 0;  // the row's entries among all penalties
  int32_t unused = 0;
};

// A token of the row's timeline or reply; a row names each token once.
struct PenaltyEntry {
  int32_t token;
  int32_t in_timeline;  // how often; 0 when the repetition penalty is off
  int32_t in_reply;     // how often; 0 when presence and frequency penalty are off
};

struct DrawResult {
  int32_t token;   // -1 when a logit was not finite
  int32_t finite;  // 0: a logit was NaN or infinite, and nothing was drawn
  int32_t stale;   // of the slot
  float logprob;
  int32_t top_count;
  int32_t top_token[kMaxLogprobs];  // likeliest first; zeros from top_count on
  float top_logprob[kMaxLogprobs];
};

// The device form of a row. Its penalties are appended to `entries`, of which `used` are taken;
// throws Capacity when they do not fit. `counts` has an element for every token of the vocabulary,
// all zero before and after. Nothing allocates.
DrawRow to_draw_row(const SampleRow& row, std::span<PenaltyEntry> entries, int& used,
                    std::span<int32_t> counts);

// Scratch of the draws of one stream, and their launches.
class Sampler {
 public:
  Sampler(int vocab_size, int max_rows, const DeviceProperties& device);

  // Draws for `count` rows. The logits of slot s are the vocab_size floats at logits + s * stride;
  // they are not written. Writes results[row] and last_token[slot] of the rows that draw, but no
  // last_token where a logit is not finite; a result passes stale[slot] on.
  void launch(const Launcher& launcher, const DrawRow* rows, const PenaltyEntry* penalties,
              int count, const float* logits, int64_t stride, const int32_t* stale,
              int32_t* last_token, DrawResult* results) const;

  size_t scratch_bytes() const;

  struct ChunkSummary {       // of some consecutive logits of a row
    unsigned long long best;  // order key of the largest after penalties, then ~token
    float raw_max;            // before penalties
    int32_t finite;           // all of them, before penalties
  };
  struct RowState {
    unsigned long long total;     // of the weights at temperature 1, before penalties
    uint32_t listed, raw_listed;  // tokens that belong in the row's list, even if it is too short
    uint32_t span, raw_span;      // the largest distance of such a token from the likeliest
  };
  struct Listed {
    float logit;
    int32_t token;
  };

 private:
  int vocab_size_, max_rows_, chunks_;
  DeviceBuffer<float> adjusted_;          // [max_rows, vocab_size] logits after penalties
  DeviceBuffer<ChunkSummary> summaries_;  // [max_rows, chunks]
  DeviceBuffer<RowState> states_;         // [max_rows]
  DeviceBuffer<Listed> list_, raw_list_;  // [max_rows, kListed]
};

}  // namespace qwen_moe::cuda
