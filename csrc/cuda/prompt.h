// Prompts on a GPU that has kernels for them: many tokens of one session in one step.
#pragma once

#include <algorithm>
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

  // Of a step, where sessions have up to `max_context` tokens.
  static int tokens_for(int max_context) {
    const int steps = (max_context + kTokensBesideDecode - 1) / kTokensBesideDecode;
    return std::min(kTokens, steps * kTokensBesideDecode);
  }

  // `decode` embeds and projects to logits.
  Prompt(const ModelConfig& config, const DeviceProperties& device, Images& images, CudaOps& decode,
         int max_context);

  // Runs steps of several sizes on the sink slot, so that every kernel they need is loaded before
  // a session waits for it.
  void warm_up(const Stream& stream, const ShardWeights& weights,
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

  int tokens_;  // of a step, at most
  int hidden_size_;
  CudaOps& decode_;
  PrefillOps ops_;
  DeviceBuffer<float> hidden_;   // [tokens, hidden_size]
  DeviceBuffer<int32_t> input_;  // token, position and slot of every row, then the pages
  std::array<Inputs, kRing> inputs_;
  size_t next_ = 0;
};

}  // namespace qwen_moe::cuda
