// The only mutable hub: owns the pipeline, the state manager and the sessions, and has the verbs
// over them. engine/steps.h runs the steps between.
//
// Threads: any thread may call anything. Calls are served one at a time in the order they came,
// between two steps; stop() never waits. Errors of a step poison the sessions in it, and them
// alone, until reset().
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/fair_mutex.h"
#include "engine/steps.h"

namespace qwen_moe {

struct EngineOptions {
  int max_sessions = 8;
  int max_context = 4096;
  std::vector<int32_t> eos_token_ids;
  bool poison = false;
};

struct EngineStats : StepStats {
  int64_t sessions_opened = 0, sessions_open = 0;
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
  Record& record(SessionId id) const;
  Record& idle(SessionId id, const char* verb) const;  // with no request running
  SessionId add(Session session);

  EngineOptions options_;
  int vocab_size_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Pipeline> pipeline_;
  std::unique_ptr<MutableStateManager> manager_;
  std::unique_ptr<Steps> steps_;

  mutable FairMutex mutex_;         // everything but the next three
  mutable std::mutex names_mutex_;  // records_ as a map; taken for a look-up only
  Records records_;
  SessionId next_id_ = 1;
};

}  // namespace qwen_moe
