// Draws on their way to the device and back: a ring of pinned rows and results, around what one
// graph replays. Copies have streams of their own, so that no kernel of a step waits for one: what
// goes up goes while the kernels before are at work, what comes back comes beside those behind.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/sample.h"
#include "engine/backend.h"
#include "model/ops.h"

namespace qwen_moe::cuda {

class Draws {
 public:
  static constexpr size_t kRing = 4;  // draws that may be uncollected

  // The streams outlive it: of the kernels, and of what goes up.
  Draws(int vocab_size, int max_rows, int max_context, const DeviceProperties& device,
        const Stream& stream, const Stream& uploads);
  ~Draws() { cudaStreamSynchronize(downloads_); }

  // A draw is these three in this order, and collect() later. One that threw in between did not
  // happen. `count` is rows.size() or more: what is beyond is padding.
  void upload(std::span<const SampleRow> rows, int count);
  // The last two have an element for every slot.
  void launch(const Launcher& launcher, int count, SlotArray logits, const int32_t* stale,
              int32_t* last_token) const;
  void download(size_t rows);

  // Waits for the oldest draw that was not collected.
  void collect(std::span<SampleResult> results);

 private:
  struct Drawing {
    PinnedBuffer<DrawRow> rows{kMaxRows};
    PinnedBuffer<DrawResult> results{kMaxRows};
    Event uploaded, done;
    int count = 0;
  };

  const Stream &stream_, &uploads_;
  Stream downloads_;
  Event drawn_;  // the newest draw
  Sampler sampler_;
  DeviceBuffer<DrawRow> rows_;
  DeviceBuffer<DrawResult> results_;
  DeviceBuffer<PenaltyEntry> penalties_;
  PinnedBuffer<PenaltyEntry> penalties_host_;
  Event penalties_uploaded_;
  std::vector<int32_t> counts_;  // [vocab], zero between draws
  std::array<Drawing, kRing> drawings_;
  size_t next_draw_ = 0, next_collect_ = 0;
};

}  // namespace qwen_moe::cuda
