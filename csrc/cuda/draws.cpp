#include "cuda/draws.h"

#include <algorithm>

namespace qwen_moe::cuda {

Draws::Draws(int vocab_size, int max_rows, int max_context, size_t slots,
             const DeviceProperties& device, const Stream& stream)
    : stream_(stream),
      sampler_(vocab_size, max_rows, device),
      rows_(static_cast<size_t>(max_rows)),
      results_(static_cast<size_t>(max_rows)),
      counts_(static_cast<size_t>(vocab_size)) {
  QWEN_MOE_CUDA(cudaMemsetAsync(rows_.data(), 0, rows_.bytes(), stream_));
  // A row names each token of its timeline once.
  size_t entries =
      static_cast<size_t>(max_rows) * static_cast<size_t>(std::min(max_context, vocab_size));
  penalties_ = DeviceBuffer<PenaltyEntry>(entries);
  penalties_host_ = PinnedBuffer<PenaltyEntry>(entries);
  for (Drawing& d : drawings_) d.stale = PinnedBuffer<int32_t>(slots);
}

void Draws::upload(std::span<const SampleRow> rows, int count) {
  Drawing& d = drawings_[next_draw_ % kRing];
  require<Error>(next_draw_ - next_collect_ < kRing, "too many draws are not collected");
  d.uploaded.synchronize();
  int used = 0;
  if (std::any_of(rows.begin(), rows.end(),
                  [](const SampleRow& row) { return row.sampling->penalized(); }))
    penalties_uploaded_.synchronize();
  DrawRow* host = d.rows.data();
  for (int i = 0; i < count; ++i)
    host[i] = i < static_cast<int>(rows.size())
                  ? to_draw_row(rows[static_cast<size_t>(i)],
                                {penalties_host_.data(), penalties_host_.size()}, used, counts_)
                  : DrawRow{};
  QWEN_MOE_CUDA(cudaMemcpyAsync(rows_.data(), host, static_cast<size_t>(count) * sizeof(DrawRow),
                                cudaMemcpyHostToDevice, stream_));
  if (used > 0) {
    QWEN_MOE_CUDA(cudaMemcpyAsync(penalties_.data(), penalties_host_.data(),
                                  static_cast<size_t>(used) * sizeof(PenaltyEntry),
                                  cudaMemcpyHostToDevice, stream_));
    penalties_uploaded_.record(stream_);
  }
  d.uploaded.record(stream_);
}

void Draws::launch(const Launcher& launcher, int count, SlotArray logits,
                   int32_t* last_token) const {
  sampler_.launch(launcher, rows_.data(), penalties_.data(), count, logits.data, logits.stride,
                  last_token, results_.data());
}

void Draws::download(std::span<const SampleRow> rows, const int32_t* stale) {
  Drawing& d = drawings_[next_draw_ % kRing];
  d.count = static_cast<int>(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) d.slot[i] = rows[i].slot;
  QWEN_MOE_CUDA(cudaMemcpyAsync(d.results.data(), results_.data(), rows.size() * sizeof(DrawResult),
                                cudaMemcpyDeviceToHost, stream_));
  QWEN_MOE_CUDA(
      cudaMemcpyAsync(d.stale.data(), stale, d.stale.bytes(), cudaMemcpyDeviceToHost, stream_));
  d.done.record(stream_);
  ++next_draw_;
}

void Draws::collect(std::span<SampleResult> results) {
  Drawing& d = drawings_[next_collect_++ % kRing];
  require<Error>(d.count == static_cast<int>(results.size()), "a draw of ", d.count,
                 " rows is collected as ", results.size());
  d.done.synchronize();
  for (size_t i = 0; i < results.size(); ++i) {
    const DrawResult& from = d.results.data()[i];
    SampleResult& to = results[i];
    to.token = from.token;
    to.finite = from.finite != 0;
    to.stale = d.stale.data()[d.slot[i]] != 0;
    to.logprob = from.logprob;
    to.top_count = from.top_count;
    for (int j = 0; j < from.top_count; ++j) to.top[j] = {from.top_token[j], from.top_logprob[j]};
  }
}

}  // namespace qwen_moe::cuda
