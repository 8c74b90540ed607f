// Prompts on a GPU that has kernels for them: many tokens of one session in one step.
#pragma once

#include <array>
#include <vector>

#include "cuda/prefill.h"
#include "engine/backend.h"
#include "model/forward.h"

namespace qwen_moe::cuda {

class Prompt {
 public:
  static constexpr int kTokens = 8192;              // of a step, at most
  static constexpr int kTokensBesideDecode = 1024;  // about 30 ms for sessions that wait

  // `decode` embeds and projects to logits; a session has up to `most_pages` pages.
  Prompt(const ModelConfig& config, const DeviceProperties& device, Images& images, CudaOps& decode,
         int64_t most_pages);

  // Runs steps of several sizes on the sink slot, so that every kernel they need is loaded before
  // a session waits for it.
  void warm_up(const Stream& stream, int max_context, const ShardWeights& weights,
               const std::vector<LayerState>& state, SlotArray logits);

  // Enqueues a step and returns where its residual stream will be. Writes the logits of the last
  // token where the step asks for them and the shard has a head.
  Handoff run(const Stream& stream, const PrefillStep& step, const Handoff* input,
              const ShardWeights& weights, const std::vector<LayerState>& state, SlotArray logits);

 private:
  static constexpr size_t kRing = 2;  // steps that may be on their way to the device
  struct Inputs {
    PinnedBuffer<int32_t> data;
    Event uploaded;
  };

  int hidden_size_;
  CudaOps& decode_;
  PrefillOps ops_;
  DeviceBuffer<float> hidden_;   // [kTokens, hidden_size]
  DeviceBuffer<int32_t> input_;  // token, position and slot of every row, then the pages
  std::array<Inputs, kRing> inputs_;
  size_t next_ = 0;
};

}  // namespace qwen_moe::cuda
