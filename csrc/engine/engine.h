// The only mutable hub: owns the pipeline, the state manager and the sessions, and runs steps that
// serve every session with work.
//
// Threads: any thread may call anything. Calls are served one at a time in the order they came,
// between two steps; stop() never waits. Errors of a step poison the sessions in it, and them
// alone, until reset().
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
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/dispatch.h"
#include "engine/fair_mutex.h"
#include "engine/pipeline.h"
#include "state/manager.h"

namespace qwen_moe {

using SessionId = int64_t;

struct Request {
  std::vector<int32_t> tokens;  // appended to the timeline first
  bool draw = false;            // false: prefill only
  Sampling sampling;
  int max_tokens = 0;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
};

enum class Finish { none, stop, length, stopped, error };
const char* finish_name(Finish finish);

// What a request produced since the last poll.
struct Progress {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // empty when not asked for
  std::vector<std::vector<std::pair<int32_t, float>>> top_logprobs;
  bool finished = true;
  Finish finish = Finish::none;
  std::string error;
};

struct EngineOptions {
  int max_sessions = 8;
  int max_context = 4096;
  std::vector<int32_t> eos_token_ids;
  bool poison = false;
};

struct EngineStats {
  int64_t prefill_tokens = 0, prefill_steps = 0, decode_tokens = 0, decode_steps = 0;
  int64_t max_decode_rows = 0, sessions_opened = 0, sessions_open = 0;
  int64_t slots_used = 0, pages_used = 0, pages_total = 0;
  std::map<std::string, int64_t> backend;  // whatever the backends count
};

class Engine {
 public:
  // `model` may be null when the shards need none (tests). Reserves everything.
  Engine(std::shared_ptr<const Model> model, const StateLayout& declared, int vocab_size,
         std::vector<std::unique_ptr<Backend>> shards, const EngineOptions& options);
  ~Engine();

  const ServingCapacity& capacity() const { return manager_->capacity(); }
  const EngineOptions& options() const { return options_; }
  std::map<std::string, size_t> memory() const;
  EngineStats stats() const;

  SessionId open();
  void close(SessionId id);
  void reset(SessionId id);
  SessionId fork(SessionId id);
  void stop(SessionId id);
  void cancel(SessionId id);

  void submit(SessionId id, const Request& request);
  // Until every one of `ids` (with `any`: one of them) has no running request, or has `tokens` (>
  // 0) tokens to poll; false when `interrupt` was raised first. Nothing is outstanding afterwards.
  bool run(std::span<const SessionId> ids, int tokens, bool any,
           const std::atomic<bool>* interrupt);
  // One step for whoever has work; false when nobody has.
  bool step();
  Progress poll(SessionId id);

  std::vector<int32_t> tokens(SessionId id) const;
  int position(SessionId id) const;
  std::string poisoned(SessionId id) const;
  void logits(SessionId id, std::span<float> to);

  struct Snapshot {
    std::vector<int32_t> tokens;
    int computed = 0, reply_begin = 0;
    bool has_logits = false;
    std::vector<MutableStateManager::SavedBuffer> buffers;
  };
  Snapshot save(SessionId id);
  void load(SessionId id, const Snapshot& snapshot);

 private:
  struct Record;

  Record& record(SessionId id) const;
  Record& idle(SessionId id, const char* verb) const;  // with no request running
  SessionId add(Session session);
  bool step_locked();
  void prefill_step(Record& record, int tokens);
  void decode_step(std::span<Record* const> rows);
  void draw(std::span<Record* const> rows);
  bool may_run_ahead(Record& record);
  bool must_settle() const;
  void settle(int keep = 0);  // collects draws, the oldest first, until `keep` are outstanding
  void collect();
  void accept(Record& record, const SampleResult& result);
  void finish(Record& record, Finish why, const std::string& error = {});
  void poison(std::span<Record* const> rows, const std::string& error);

  EngineOptions options_;
  int vocab_size_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Pipeline> pipeline_;
  std::unique_ptr<MutableStateManager> manager_;

  mutable FairMutex mutex_;         // everything but the next three
  mutable std::mutex names_mutex_;  // records_ as a map; taken for a look-up only
  std::map<SessionId, std::unique_ptr<Record>> records_;
  SessionId next_id_ = 1;

  // Draws not collected yet, the oldest first: at most the newest between two calls.
  std::array<std::vector<Record*>, 2> outstanding_;
  int draws_ = 0;
  const bool ahead_;

  bool last_was_prefill_ = false;
  unsigned turn_ = 0;
  EngineStats stats_;
  // Step inputs, allocated once.
  std::vector<Work> work_;
  std::vector<Record*> ready_, drawing_;
  std::vector<DecodeRow> decode_rows_;
  std::vector<SampleRow> sample_rows_;
  std::vector<SampleResult> results_;
};

}  // namespace qwen_moe
