// A backend small enough to reason about: its state is a running hash of the tokens seen, kept in a
// fixed buffer and once more in KV pages, and its next-token logits depend on both.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace qwen_moe {

inline constexpr int kFakeVocab = 32;

inline StateLayout fake_layout() {
  return {{{"layers.0.linear_attn.recurrent_state", DType::f32, {1}},
           {"layers.1.self_attn.k_cache", DType::f32, {1, 1}, BufferKind::per_token},
           {"lm_head.logits", DType::f32, {kFakeVocab}}}};
}

class FakeBackend : public Backend {
 public:
  explicit FakeBackend(StateLayout layout = fake_layout()) : layout_(std::move(layout)) {}

  // Raised at the beginning of a step when set; sees the slots of the step.
  std::function<void(const std::vector<int>& slots)> on_step;
  // Added to a logit of that slot after every step.
  std::map<int, float> disturb;
  Discovered discovered{fake_layout().buffers, fake_layout().buffers};

  const StateLayout& layout() const override { return layout_; }
  Discovered discover(int, int) override { return discovered; }
  void reserve(const ReserveOptions& o) override {
    hash_.assign(static_cast<size_t>(o.slots) + 1, 0);
    logits_.assign(hash_.size(), std::vector<float>(kFakeVocab, 0));
    pages_.assign(static_cast<size_t>(o.pages) + 1, std::vector<float>(64, 0));
    generation_.assign(hash_.size(), 0);
  }
  std::map<std::string, size_t> memory() const override { return {{"session state", 1}}; }

  void set_generation(int slot, uint32_t g) override { generation_.at(at(slot)) = g; }
  void clear_slot(int slot) override {
    hash_.at(at(slot)) = 0;
    logits_[at(slot)].assign(kFakeVocab, 0);
  }
  void copy_slot(int to, int from) override {
    hash_.at(at(to)) = hash_.at(at(from));
    logits_[at(to)] = logits_[at(from)];
  }
  void copy_page(int to, int from) override { pages_.at(at(to)) = pages_.at(at(from)); }
  void poison_slot(int slot) override { hash_.at(at(slot)) = nan(); }
  void poison_page(int page) override { pages_.at(at(page)).assign(64, nan()); }

  void read_buffer(size_t b, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to) override {
    std::vector<float> values = gather(b, slot, pages, tokens);
    std::memcpy(to.data(), values.data(), to.size());
  }
  void write_buffer(size_t b, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from) override {
    std::vector<float> values(from.size() / 4);
    std::memcpy(values.data(), from.data(), from.size());
    if (b == 0) hash_[at(slot)] = values[0];
    if (b == 1)
      for (int t = 0; t < tokens; ++t) pages_[at(pages[at(t / 64)])][at(t % 64)] = values[at(t)];
    if (b == 2) logits_[at(slot)] = values;
  }

  void prefill(const PrefillStep& s, const Handoff*) override {
    begin({s.slot});
    EXPECT_EQ(generation_.at(at(s.slot)), s.generation);
    chunks.push_back({s.position, static_cast<int>(s.tokens.size())});
    for (size_t i = 0; i < s.tokens.size(); ++i)
      feed(s.slot, s.position + static_cast<int>(i), s.tokens[i], s.pages);
    if (s.logits) project(s.slot, s.position + static_cast<int>(s.tokens.size()), s.pages);
  }
  void decode(std::span<const DecodeRow> rows, const Handoff*) override {
    std::vector<int> slots;
    for (const DecodeRow& row : rows) slots.push_back(row.slot);
    begin(slots);
    most_rows = std::max(most_rows, rows.size());
    for (const DecodeRow& row : rows) {
      EXPECT_EQ(generation_.at(at(row.slot)), row.generation);
      feed(row.slot, row.position, row.token, row.pages);
      project(row.slot, row.position + 1, row.pages);
    }
  }
  Handoff hidden() const override { return {}; }

  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::vector<float>& x = logits_[at(rows[i].slot)];
      results[i] = {};
      for (int t = 0; t < kFakeVocab; ++t) results[i].finite &= std::isfinite(x[at(t)]);
      results[i].token = static_cast<int32_t>(std::max_element(x.begin(), x.end()) - x.begin());
    }
  }
  void read_logits(int slot, std::span<float> to) override {
    std::copy(logits_[at(slot)].begin(), logits_[at(slot)].end(), to.begin());
  }

  struct Chunk {
    int position, tokens;
    bool operator==(const Chunk&) const = default;
  };
  std::vector<Chunk> chunks;
  size_t most_rows = 0;

 private:
  template <class T>
  static size_t at(T i) {
    return static_cast<size_t>(i);
  }
  static float nan() { return std::numeric_limits<float>::quiet_NaN(); }

  void begin(const std::vector<int>& slots) {
    if (on_step) on_step(slots);
  }
  void feed(int slot, int position, int32_t token, std::span<const int32_t> pages) {
    float& hash = hash_[at(slot)];
    hash = std::fmod(hash * 31.0f + static_cast<float>(token) + 7.0f, 65521.0f);
    pages_[at(pages[at(position / 64)])][at(position % 64)] = hash;
  }
  void project(int slot, int length, std::span<const int32_t> pages) {
    float sum = 0;  // over the whole timeline, so that a wrong page shows
    for (int t = 0; t < length; ++t)
      sum = std::fmod(sum * 3.0f + pages_[at(pages[at(t / 64)])][at(t % 64)], 65521.0f);
    for (int t = 0; t < kFakeVocab; ++t)
      logits_[at(slot)][at(t)] =
          std::fmod((sum + hash_[at(slot)]) * static_cast<float>(t + 1), 997.0f);
    if (disturb.contains(slot)) logits_[at(slot)][0] += disturb[slot];
  }
  std::vector<float> gather(size_t b, int slot, std::span<const int32_t> pages, int tokens) {
    if (b == 0) return {hash_[at(slot)]};
    if (b == 2) return logits_[at(slot)];
    std::vector<float> values;
    for (int t = 0; t < tokens; ++t) values.push_back(pages_[at(pages[at(t / 64)])][at(t % 64)]);
    return values;
  }

  StateLayout layout_;
  std::vector<float> hash_;
  std::vector<std::vector<float>> logits_, pages_;
  std::vector<uint32_t> generation_;
};

}  // namespace qwen_moe
