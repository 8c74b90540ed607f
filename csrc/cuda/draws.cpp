#include "cuda/draws.h"

#include <algorithm>

namespace qwen_moe::cuda {

Draws::Draws(int vocab_size, int max_rows, int max_context, const DeviceProperties& device,
             const Stream& stream, const Stream& uploads)
    : stream_(stream),
      uploads_(uploads),
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
  uploads_.wait_for(drawn_);  // which reads the rows of before
  QWEN_MOE_CUDA(cudaMemcpyAsync(rows_.data(), host, static_cast<size_t>(count) * sizeof(DrawRow),
                                cudaMemcpyHostToDevice, uploads_));
  if (used > 0) {
    QWEN_MOE_CUDA(cudaMemcpyAsync(penalties_.data(), penalties_host_.data(),
                                  static_cast<size_t>(used) * sizeof(PenaltyEntry),
                                  cudaMemcpyHostToDevice, uploads_));
    penalties_uploaded_.record(uploads_);
  }
  d.uploaded.record(uploads_);
  stream_.wait_for(d.uploaded);
  stream_.wait_for(drawings_[(next_draw_ + kRing - 1) % kRing].done);  // the results of before
}

void Draws::launch(const Launcher& launcher, int count, SlotArray logits, const int32_t* stale,
                   int32_t* last_token) const {
  sampler_.launch(launcher, rows_.data(), penalties_.data(), count, logits.data, logits.stride,
                  stale, last_token, results_.data());
}

void Draws::download(size_t rows) {
  Drawing& d = drawings_[next_draw_ % kRing];
  d.count = static_cast<int>(rows);
  drawn_.record(stream_);
  downloads_.wait_for(drawn_);
  QWEN_MOE_CUDA(cudaMemcpyAsync(d.results.data(), results_.data(), rows * sizeof(DrawResult),
                                cudaMemcpyDeviceToHost, downloads_));
  d.done.record(downloads_);
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
    to.stale = from.stale != 0;
    to.logprob = from.logprob;
    to.top_count = from.top_count;
    for (int j = 0; j < from.top_count; ++j) to.top[j] = {from.top_token[j], from.top_logprob[j]};
  }
}

}  // namespace qwen_moe::cuda
