// A backend small enough to reason about: its state is a running hash of the tokens seen, kept in a
// fixed buffer and once more in KV pages, and its next-token logits depend on both.
//
// Deferred, it is a device with one stream: steps and draws only enqueue, and run in order when a
// draw is collected or memory is looked at. It then also checks what the engine promises: at most
// two draws uncollected, and no verb on a slot that has one.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <set>
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

inline float fake_hash(float hash, int32_t token) {
  return std::fmod(hash * 31.0f + static_cast<float>(token) + 7.0f, 65521.0f);
}
inline float fake_sum(float sum, float hash) { return std::fmod(sum * 3.0f + hash, 65521.0f); }
inline std::vector<float> fake_logits(float sum, float hash) {
  std::vector<float> logits;
  for (int t = 0; t < kFakeVocab; ++t)
    logits.push_back(std::fmod((sum + hash) * static_cast<float>(t + 1), 997.0f));
  return logits;
}
// Greedy where the temperature is 0; else every (seed, position) has a token of its own.
inline int32_t fake_choice(std::vector<float> logits, const Sampling& sampling, size_t position,
                           std::span<const int32_t> reply) {
  if (sampling.penalized())
    for (int32_t token : reply)
      logits[static_cast<size_t>(token)] -= static_cast<float>(sampling.frequency_penalty);
  auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  if (sampling.temperature > 0)
    best = (best + static_cast<int64_t>(sampling.seed + 5 * position)) % kFakeVocab;
  return static_cast<int32_t>(best);
}
// What a session with this timeline draws next, whatever happened to it before.
inline int32_t fake_next(std::span<const int32_t> timeline, const Sampling& sampling = {},
                         std::span<const int32_t> reply = {}) {
  float hash = 0, sum = 0;
  for (int32_t token : timeline) sum = fake_sum(sum, hash = fake_hash(hash, token));
  return fake_choice(fake_logits(sum, hash), sampling, timeline.size(), reply);
}

class FakeBackend : public Backend {
 public:
  explicit FakeBackend(bool deferred = false, StateLayout layout = fake_layout())
      : layout_(std::move(layout)), deferred_(deferred) {}

  // Raised at the beginning of a step when set; sees the slots of the step.
  std::function<void(const std::vector<int>& slots)> on_step;
  // Raised when a draw is collected; sees its slots.
  std::function<void(const std::vector<int>& slots)> on_collect;
  std::set<int> stale;             // slots whose draws come back stale
  std::vector<std::string> calls;  // decode, draw and collect, each with its number
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
    last_drawn_.assign(hash_.size(), kLastDrawn);
  }
  std::map<std::string, size_t> memory() const override { return {{"session state", 1}}; }

  void set_generation(int slot, uint32_t g) override {
    touch(slot);
    generation_.at(at(slot)) = g;
  }
  void clear_slot(int slot) override {
    touch(slot);
    hash_.at(at(slot)) = 0;
    last_drawn_[at(slot)] = kLastDrawn;
    logits_[at(slot)].assign(kFakeVocab, 0);
  }
  void copy_slot(int to, int from) override {
    touch(to);
    touch(from);
    hash_.at(at(to)) = hash_.at(at(from));
    logits_[at(to)] = logits_[at(from)];
  }
  void copy_page(int to, int from) override {
    flush();
    pages_.at(at(to)) = pages_.at(at(from));
  }
  void poison_slot(int slot) override {
    touch(slot);
    hash_.at(at(slot)) = nan();
  }
  void poison_page(int page) override {
    flush();
    pages_.at(at(page)).assign(64, nan());
  }

  void read_buffer(size_t b, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to) override {
    touch(slot);
    std::vector<float> values = gather(b, slot, pages, tokens);
    std::memcpy(to.data(), values.data(), to.size());
  }
  void write_buffer(size_t b, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from) override {
    touch(slot);
    std::vector<float> values(from.size() / 4);
    std::memcpy(values.data(), from.data(), from.size());
    if (b == 0) hash_[at(slot)] = values[0];
    if (b == 1)
      for (int t = 0; t < tokens; ++t) pages_[at(pages[at(t / 64)])][at(t % 64)] = values[at(t)];
    if (b == 2) logits_[at(slot)] = values;
  }

  PrefillChunk prefill_chunk() const override { return chunk; }
  void prefill(const PrefillStep& s, const Handoff*) override {
    begin({s.slot});
    chunks.push_back({s.position, static_cast<int>(s.tokens.size())});
    enqueue([this, s, tokens = copy(s.tokens), pages = copy(s.pages)] {
      EXPECT_EQ(generation_.at(at(s.slot)), s.generation);
      for (size_t i = 0; i < tokens.size(); ++i)
        feed(s.slot, s.position + static_cast<int>(i), tokens[i], pages);
      if (s.logits) project(s.slot, s.position + static_cast<int>(tokens.size()), pages);
    });
  }
  void decode(std::span<const DecodeRow> rows, const Handoff*) override {
    std::vector<int> slots;
    for (const DecodeRow& row : rows) slots.push_back(row.slot);
    begin(slots);
    calls.push_back(concat("decode ", decodes_++));
    most_rows = std::max(most_rows, rows.size());
    for (const DecodeRow& row : rows) {
      EXPECT_TRUE(deferred_ || row.token != kLastDrawn);
      EXPECT_GT(row.pages.size(), at(row.position / 64));
      enqueue([this, row, pages = copy(row.pages)] {
        EXPECT_EQ(generation_.at(at(row.slot)), row.generation);
        int32_t token = row.token == kLastDrawn ? last_drawn_[at(row.slot)] : row.token;
        EXPECT_GE(token, 0) << "slot " << row.slot << " has drawn nothing";
        feed(row.slot, row.position, token, pages);
        project(row.slot, row.position + 1, pages);
      });
    }
  }
  Handoff hidden() const override { return {}; }

  void draw(std::span<const SampleRow> rows) override {
    calls.push_back(concat("draw ", draws_++));
    uncollected_.emplace_back();
    EXPECT_LE(uncollected_.size(), deferred_ ? 2u : 1u);
    for (const SampleRow& row : rows) {
      EXPECT_TRUE(!row.sampling->penalized() || row.timeline.size() == at(row.position));
      uncollected_.back().push_back(row.slot);
    }
    std::vector<SampleRow> copies(rows.begin(), rows.end());
    std::vector<Sampling> settings;
    std::vector<std::vector<int32_t>> replies;
    for (const SampleRow& row : rows) {
      settings.push_back(*row.sampling);
      replies.push_back(copy(row.reply));
    }
    enqueue([this, copies, settings, replies] {
      std::vector<SampleResult> results(copies.size());
      for (size_t i = 0; i < copies.size(); ++i) {
        size_t slot = at(copies[i].slot);
        const std::vector<float>& x = logits_[slot];
        results[i].stale = stale.contains(copies[i].slot);
        for (float logit : x) results[i].finite &= std::isfinite(logit);
        last_drawn_[slot] = 0;  // of a draw that fails, anything that can be fed
        if (results[i].stale || !results[i].finite) continue;
        results[i].token = fake_choice(x, settings[i], at(copies[i].position), replies[i]);
        last_drawn_[slot] = results[i].token;
      }
      drawn_.push_back(std::move(results));
    });
  }
  void collect(std::span<SampleResult> results) override {
    calls.push_back(concat("collect ", collects_++));
    ASSERT_FALSE(uncollected_.empty()) << "nothing was drawn";
    std::vector<int> slots = uncollected_.front();
    uncollected_.pop_front();
    while (drawn_.empty()) run_one();
    std::vector<SampleResult> oldest = drawn_.front();
    drawn_.pop_front();
    if (on_collect) on_collect(slots);
    ASSERT_EQ(results.size(), oldest.size());
    std::copy(oldest.begin(), oldest.end(), results.begin());
  }
  bool ahead() const override { return deferred_; }
  std::map<std::string, int64_t> counters() const override { return {{"draws", draws_}}; }

  void read_logits(int slot, std::span<float> to) override {
    touch(slot);
    std::copy(logits_[at(slot)].begin(), logits_[at(slot)].end(), to.begin());
  }

  struct Chunk {
    int position, tokens;
    bool operator==(const Chunk&) const = default;
  };
  PrefillChunk chunk;
  std::vector<Chunk> chunks;
  size_t most_rows = 0;

 private:
  template <class T>
  static size_t at(T i) {
    return static_cast<size_t>(i);
  }
  static float nan() { return std::numeric_limits<float>::quiet_NaN(); }

  static std::vector<int32_t> copy(std::span<const int32_t> values) {
    return {values.begin(), values.end()};
  }

  void begin(const std::vector<int>& slots) {
    if (on_step) on_step(slots);
  }
  void enqueue(std::function<void()> work) {
    queue_.push_back(std::move(work));
    if (!deferred_) flush();
  }
  void run_one() {
    ASSERT_FALSE(queue_.empty());
    std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    work();
  }
  void flush() {
    while (!queue_.empty()) run_one();
  }
  // Memory of a slot is looked at or changed: behind everything in the stream.
  void touch(int slot) {
    flush();
    for (const std::vector<int>& slots : uncollected_)
      EXPECT_EQ(std::count(slots.begin(), slots.end(), slot), 0)
          << "slot " << slot << " was not settled";
  }
  void feed(int slot, int position, int32_t token, std::span<const int32_t> pages) {
    float& hash = hash_[at(slot)];
    hash = fake_hash(hash, token);
    pages_[at(pages[at(position / 64)])][at(position % 64)] = hash;
  }
  void project(int slot, int length, std::span<const int32_t> pages) {
    float sum = 0;  // over the whole timeline, so that a wrong page shows
    for (int t = 0; t < length; ++t) sum = fake_sum(sum, pages_[at(pages[at(t / 64)])][at(t % 64)]);
    logits_[at(slot)] = fake_logits(sum, hash_[at(slot)]);
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
  std::vector<int32_t> last_drawn_;

  bool deferred_;
  std::deque<std::function<void()>> queue_;      // the stream
  std::deque<std::vector<int>> uncollected_;     // slots of every draw, the oldest first
  std::deque<std::vector<SampleResult>> drawn_;  // executed, not collected
  int64_t decodes_ = 0, draws_ = 0, collects_ = 0;
};

}  // namespace qwen_moe
