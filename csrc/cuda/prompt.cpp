#include "cuda/prompt.h"

#include <algorithm>

namespace qwen_moe::cuda {

Prompt::Prompt(const ModelConfig& config, const DeviceProperties& device, Images& images,
               CudaOps& decode, int max_context)
    : tokens_(tokens_for(max_context)),
      hidden_size_(config.hidden_size),
      decode_(decode),
      ops_(config, device, images, decode, tokens_),
      hidden_(static_cast<size_t>(tokens_) * static_cast<size_t>(config.hidden_size)),
      input_(3 * static_cast<size_t>(tokens_) +
             static_cast<size_t>(max_context + tokens_) / kPageTokens + 1) {
  for (Inputs& in : inputs_) in.data = PinnedBuffer<int32_t>(input_.size());
}

void Prompt::warm_up(const Stream& stream, const ShardWeights& weights,
                     const std::vector<LayerState>& state, SlotArray logits) {
  const std::vector<int32_t> zeros(static_cast<size_t>(tokens_));
  for (int rows = tokens_; rows > 0; rows /= 4)
    run(stream,
        {.tokens = std::span(zeros).first(static_cast<size_t>(rows)),
         .pages = zeros,
         .logits = true},
        nullptr, weights, state, logits);
  stream.synchronize();
}

Handoff Prompt::run(const Stream& stream, const PrefillStep& step, const Handoff* input,
                    const ShardWeights& weights, const std::vector<LayerState>& state,
                    SlotArray logits) {
  auto count = static_cast<int>(step.tokens.size());
  Inputs& in = inputs_[next_++ % kRing];
  in.uploaded.synchronize();
  int32_t* host = in.data.data();
  for (int i = 0; i < count; ++i) {
    host[i] = step.tokens[static_cast<size_t>(i)];
    host[count + i] = step.position + i;
    host[2 * count + i] = step.slot;
  }
  auto pages = static_cast<size_t>((step.position + count - 1) / kPageTokens + 1);
  std::copy_n(step.pages.data(), pages, host + 3 * count);
  size_t bytes = (3 * static_cast<size_t>(count) + pages) * sizeof(int32_t);
  QWEN_MOE_CUDA(cudaMemcpyAsync(input_.data(), host, bytes, cudaMemcpyHostToDevice, stream));
  in.uploaded.record(stream);

  const int32_t* at = input_.data();
  StepRows rows{.rows = count,
                .token = at,
                .position = at + count,
                .slot = at + 2 * count,
                .pages = at + 3 * count,
                .pages_stride = 0};
  auto width = static_cast<size_t>(hidden_size_);
  if (input)
    QWEN_MOE_CUDA(cudaMemcpyAsync(hidden_.data(), input->data,
                                  static_cast<size_t>(count) * width * sizeof(float),
                                  cudaMemcpyDefault, stream));
  decode_.begin({stream, false});
  ops_.begin(stream, {.rows = count, .position = step.position, .slot = step.slot});
  Buffers<float, bf16> buffers{.hidden = hidden_.data()};
  forward_layers(ops_, weights, state, buffers, rows, Phase::prefill);
  if (weights.last && step.logits)
    decode_.lm_head({.logits = logits,
                     .hidden = hidden_.data() + static_cast<size_t>(count - 1) * width,
                     .norm = weights.norm,
                     .lm_head = weights.lm_head,
                     .slot = rows.slot + count - 1,
                     .rows = 1});
  return {hidden_.data(), DType::f32, count, hidden_size_};
}

}  // namespace qwen_moe::cuda
