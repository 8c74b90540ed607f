// The mutable-state manager: opens, resets, forks, saves, loads and closes sessions over the shards
// of one engine, and decides how many there may be.
//
// Coverage: every buffer that the model declares must be written by exactly one shard, with the
// same shape and dtype in prefill and decode. When a probe run shows anything else, the state of
// two sessions cannot be told apart for certain, and the manager fails closed to one session.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "state/pool.h"
#include "state/session.h"
#include "state/store.h"

namespace qwen_moe {

struct StateOptions {
  int max_sessions = 1;
  int max_context = 64;  // tokens
  bool poison = false;   // fill freed state with NaN
};

struct ServingCapacity {
  int max_sessions = 0;
  size_t bytes_per_session = 0;  // at max_context
  std::string reason;
};

// Empty when the coverage holds, else the first thing that is wrong.
std::string check_coverage(const StateLayout& declared, const std::vector<StateLayout>& shards,
                           const std::vector<Discovered>& discovered);

inline int pages_for(int tokens, int page_tokens) {
  return (tokens + page_tokens - 1) / page_tokens;
}

class MutableStateManager {
 public:
  // `shards` must have their arenas for max_sessions slots and the pages of pages_needed(). They
  // outlive the manager. Runs the coverage probe.
  MutableStateManager(const StateLayout& declared, std::vector<StateStore*> shards,
                      const StateOptions& options);

  static int pages_needed(const StateOptions& options);
  static size_t bytes_per_session(const StateLayout& declared, int max_context);

  const ServingCapacity& capacity() const { return capacity_; }
  const SlotPool& slots() const { return slots_; }
  const PagePool& pages() const { return pages_; }

  Session create();
  void reset(Session& session);
  Session fork(const Session& session);
  void destroy(Session& session);
  bool stale(const Session& session) const;

  // Pages for `tokens` tokens in all. What it has stays where it is.
  void grow(Session& session, int tokens);

  struct SavedBuffer {
    StateBuffer buffer;
    Shape shape;  // with the leading token dimension of per-token buffers
    std::vector<std::byte> bytes;
  };
  std::vector<SavedBuffer> save(const Session& session) const;
  // Into a session with no tokens. Throws Format before anything is written when a buffer does not
  // fit.
  void load(Session& session, const std::vector<SavedBuffer>& buffers, int computed);

 private:
  void release_pages(Session& session);

  std::vector<StateStore*> shards_;
  StateOptions options_;
  ServingCapacity capacity_;
  SlotPool slots_;
  PagePool pages_;
};

}  // namespace qwen_moe
