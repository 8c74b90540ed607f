// An engine over the fake backend.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "fake_backend.h"

namespace qwen_moe {

struct Rig {
  static inline bool deferred = false;  // what a rig gets that is not told

  explicit Rig(EngineOptions options = {.max_sessions = 8, .max_context = 1024},
               bool only_enqueues = deferred) {
    auto owned = std::make_unique<FakeBackend>(only_enqueues);
    backend = owned.get();
    std::vector<std::unique_ptr<Backend>> shards;
    shards.push_back(std::move(owned));
    engine =
        std::make_unique<Engine>(nullptr, fake_layout(), kFakeVocab, std::move(shards), options);
  }
  std::vector<int32_t> draw(SessionId id, std::vector<int32_t> tokens, int max_tokens) {
    engine->submit(id, {.tokens = std::move(tokens), .draw = true, .max_tokens = max_tokens});
    engine->run({&id, 1}, 0, false, nullptr);
    return engine->poll(id).tokens;
  }
  FakeBackend* backend;
  std::unique_ptr<Engine> engine;
};

inline std::vector<int32_t> prompt(int seed, int length) {
  std::mt19937 random(static_cast<unsigned>(seed));
  std::vector<int32_t> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back(static_cast<int32_t>(random() % kFakeVocab));
  return tokens;
}

}  // namespace qwen_moe
