// Steps that serve every session with work, and the draws that they leave in flight.
//
// One step ahead: a backend that only enqueues computes a step while the engine prepares the next,
// so a draw is collected after the step behind it was enqueued. That step feeds the drawn token
// without having seen it. If it then ends the request (end of text, stop id), it was computed all
// the same; what was drawn after it is dropped. Whatever looks at a session or changes one collects
// what is outstanding first.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/dispatch.h"
#include "engine/pipeline.h"
#include "engine/request.h"
#include "state/manager.h"

namespace qwen_moe {

using SessionId = int64_t;

// A session and its request.
struct Record {
  SessionId id = 0;
  Session session;
  std::string poison;             // why, until reset
  std::atomic<bool> stop{false};  // raised by any thread

  bool running = false;
  bool prompt = false;  // pending tokens are a prompt, not one drawn token
  Request request;
  int drawn = 0;  // tokens of this request
  int draws = 0;  // not collected yet
  Finish finish = Finish::none;

  // Since the last poll; reserved at submit, so that drawing allocates nothing.
  std::vector<int32_t> new_tokens;
  std::vector<float> new_logprobs;
  std::vector<std::pair<int32_t, float>> new_top;  // request.sampling.logprobs for each token

  void clear_new() {
    new_tokens.clear();
    new_logprobs.clear();
    new_top.clear();
  }
};

using Records = std::map<SessionId, std::unique_ptr<Record>>;

struct StepOptions {
  int max_sessions = 0;
  int max_context = 0;
  std::vector<int32_t> eos_token_ids;
};

struct StepStats {
  int64_t prefill_tokens = 0, prefill_steps = 0, decode_tokens = 0, decode_steps = 0;
  int64_t max_decode_rows = 0;
};

// Not thread-safe; the engine serializes. Errors of a step poison the sessions in it, and them
// alone.
class Steps {
 public:
  // Both outlive it.
  Steps(Pipeline& pipeline, MutableStateManager& manager, StepOptions options);

  // One step for whoever has work; false when nobody has.
  bool step(const Records& records);
  // Collects draws, the oldest first, until `keep` are outstanding.
  void settle(int keep = 0);
  void finish(Record& record, Finish why, const std::string& error = {});
  const StepStats& stats() const { return stats_; }

 private:
  void prefill(Record& record, int tokens);
  void decode(std::span<Record* const> rows);
  void draw(std::span<Record* const> rows);
  bool may_run_ahead(Record& record);
  bool must_settle() const;
  void collect();
  void accept(Record& record, const SampleResult& result);
  void poison(std::span<Record* const> rows, const std::string& error);

  Pipeline& pipeline_;
  MutableStateManager& manager_;
  StepOptions options_;
  const bool ahead_;

  // Draws not collected yet, the oldest first: at most the newest between two calls.
  std::array<std::vector<Record*>, 2> outstanding_;
  int draws_ = 0;

  bool last_was_prefill_ = false;
  unsigned turn_ = 0;
  StepStats stats_;
  // Step inputs, allocated once.
  std::vector<Work> work_;
  std::vector<Record*> ready_, drawing_;
  std::vector<DecodeRow> decode_rows_;
  std::vector<SampleRow> sample_rows_;
  std::vector<SampleResult> results_;
};

}  // namespace qwen_moe
