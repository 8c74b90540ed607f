#include <gtest/gtest.h>

#include <thread>

#include "engine_rig.h"

namespace qwen_moe {
namespace {

TEST(Dispatch, PrefillChunksEndOnTheGrid) {
  EXPECT_EQ(prefill_tokens(0, 10), 10);
  EXPECT_EQ(prefill_tokens(0, 5000), kPrefillChunk);
  EXPECT_EQ(prefill_tokens(kPrefillChunk - 3, 5000), 3);
  EXPECT_EQ(prefill_tokens(4000, 5000, 4096), 96);
}

TEST(Dispatch, AlternatesPrefillAndDecode) {
  std::vector<Work> work{{0, true, 0, 100}, {1, false, 5, 1}, {2, false, 9, 1}};
  EXPECT_EQ(plan_step(work, false, 0).kind, StepPlan::Kind::prefill);
  StepPlan plan = plan_step(work, true, 0);
  EXPECT_EQ(plan.kind, StepPlan::Kind::decode);
  EXPECT_EQ(plan.rows, 2);
  EXPECT_EQ(plan_step(std::span(work).first(1), true, 0).kind, StepPlan::Kind::prefill);
  EXPECT_EQ(plan_step({}, true, 0).kind, StepPlan::Kind::none);
}

TEST(Dispatch, MoreSessionsThanRowsAllGetTheirTurn) {
  std::vector<Work> work;
  for (int i = 0; i < 100; ++i) work.push_back({i, false, 0, 1});
  std::vector<int> served(100, 0);
  for (unsigned turn = 0; turn < 100; ++turn) {
    StepPlan plan = plan_step(work, false, turn);
    EXPECT_EQ(plan.rows, kMaxRows);
    for (int i = 0; i < plan.rows; ++i)
      ++served[static_cast<size_t>(plan.keys[static_cast<size_t>(i)])];
  }
  for (int count : served) EXPECT_EQ(count, kMaxRows);
}

// Everything holds on a backend that computes at once and on one that only enqueues.
class EngineModes : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override { Rig::deferred = GetParam(); }
  void TearDown() override { Rig::deferred = false; }
};
INSTANTIATE_TEST_SUITE_P(Backends, EngineModes, ::testing::Bool(), [](const auto& info) {
  return std::string(info.param ? "deferred" : "at_once");
});

TEST_P(EngineModes, SessionsInABatchDrawWhatTheyDrawAlone) {
  Rig together, alone;
  std::vector<SessionId> ids;
  for (int i = 0; i < 8; ++i) {
    ids.push_back(together.engine->open());
    together.engine->submit(ids.back(),
                            {.tokens = prompt(i, 5 + 130 * i), .draw = true, .max_tokens = 20});
  }
  together.engine->run(ids, 0, false, nullptr);
  EXPECT_GT(together.backend->most_rows, 4u);
  for (int i = 0; i < 8; ++i) {
    SessionId id = alone.engine->open();
    EXPECT_EQ(together.engine->poll(ids[static_cast<size_t>(i)]).tokens,
              alone.draw(id, prompt(i, 5 + 130 * i), 20));
    alone.engine->close(id);
  }
}

TEST_P(EngineModes, ChunksDependOnTheSessionAlone) {
  Rig rig({.max_sessions = 2, .max_context = 2000});
  SessionId id = rig.engine->open();
  rig.draw(id, prompt(1, 100), 1);
  rig.backend->chunks.clear();
  rig.draw(id, prompt(2, 1000), 1);  // one pending token goes first
  using Chunk = FakeBackend::Chunk;
  EXPECT_EQ(rig.backend->chunks, (std::vector<Chunk>{{100, 412}, {512, 512}, {1024, 77}}));
}

TEST_P(EngineModes, ChunksAreAsLargeAsTheBackendTakesThem) {
  Rig rig({.max_sessions = 1, .max_context = 4096});
  rig.backend->chunk = {1024, 512};
  rig.backend->chunks.clear();
  rig.draw(rig.engine->open(), prompt(1, 2100), 1);
  using Chunk = FakeBackend::Chunk;
  EXPECT_EQ(rig.backend->chunks, (std::vector<Chunk>{{0, 1024}, {1024, 1024}, {2048, 52}}));
}

// So that sessions that decode do not wait long for a prompt's step.
TEST_P(EngineModes, ChunksAreSmallerBesideSessionsThatDecode) {
  Rig rig({.max_sessions = 2, .max_context = 4096});
  rig.backend->chunk = {1024, 512};
  SessionId first = rig.engine->open(), second = rig.engine->open();
  rig.draw(first, prompt(1, 10), 1);
  rig.engine->submit(first, {.draw = true, .max_tokens = 3});
  rig.engine->submit(second, {.tokens = prompt(2, 2100), .draw = true, .max_tokens = 1});
  rig.backend->chunks.clear();
  rig.engine->run({&second, 1}, 0, false, nullptr);
  using Chunk = FakeBackend::Chunk;
  const std::vector<Chunk>& chunks = rig.backend->chunks;
  ASSERT_GT(chunks.size(), 2u);
  EXPECT_EQ(chunks.front(), (Chunk{0, 512}));
  EXPECT_EQ(chunks.back(), (Chunk{2048, 52}));
  EXPECT_EQ(chunks[chunks.size() - 2], (Chunk{1024, 1024}));
}

TEST_P(EngineModes, SplitPromptsContinueTheTimeline) {
  Rig rig;
  SessionId whole = rig.engine->open(), pieces = rig.engine->open();
  auto tokens = prompt(3, 300);
  auto expected = rig.draw(whole, tokens, 10);
  rig.engine->submit(pieces, {.tokens = {tokens.begin(), tokens.begin() + 77}});
  rig.engine->run({&pieces, 1}, 0, false, nullptr);
  EXPECT_EQ(rig.draw(pieces, {tokens.begin() + 77, tokens.end()}, 10), expected);
  EXPECT_EQ(rig.engine->tokens(pieces), rig.engine->tokens(whole));
}

TEST_P(EngineModes, ForkGoesOnLikeItsParent) {
  Rig rig;
  SessionId a = rig.engine->open();
  rig.draw(a, prompt(4, 70), 3);
  SessionId b = rig.engine->fork(a);
  auto from_a = rig.draw(a, {}, 12);
  EXPECT_EQ(rig.draw(b, {}, 12), from_a);
}

TEST_P(EngineModes, SavedSessionsGoOnInAnotherEngine) {
  Rig rig, other;
  SessionId a = rig.engine->open();
  rig.draw(a, prompt(5, 90), 5);
  Engine::Snapshot snapshot = rig.engine->save(a);
  SessionId b = other.engine->open();
  other.engine->load(b, snapshot);
  EXPECT_EQ(other.engine->tokens(b), rig.engine->tokens(a));
  EXPECT_EQ(other.draw(b, {}, 12), rig.draw(a, {}, 12));
}

TEST_P(EngineModes, ClosedAndReopenedSlotsRememberNothing) {
  Rig rig({.max_sessions = 1, .max_context = 256, .eos_token_ids = {}, .poison = true});
  SessionId first = rig.engine->open();
  auto expected = rig.draw(first, prompt(6, 40), 8);
  rig.engine->close(first);
  SessionId second = rig.engine->open();
  EXPECT_EQ(rig.draw(second, prompt(6, 40), 8), expected);
  EXPECT_THROW(rig.engine->tokens(first), InvalidArgument);
}

TEST_P(EngineModes, RefusesBadRequestsAndChangesNothing) {
  Rig rig({.max_sessions = 1, .max_context = 64});
  SessionId id = rig.engine->open();
  EXPECT_THROW(rig.engine->open(), Capacity);
  EXPECT_THROW(rig.engine->submit(id, {.tokens = {}}), InvalidArgument);
  EXPECT_THROW(rig.engine->submit(id, {.tokens = {}, .draw = true, .max_tokens = 1}),
               InvalidArgument);
  EXPECT_THROW(rig.engine->submit(id, {.tokens = {kFakeVocab}}), InvalidArgument);
  EXPECT_THROW(rig.engine->submit(id, {.tokens = {-1}}), InvalidArgument);
  EXPECT_THROW(rig.engine->submit(id, {.tokens = prompt(1, 65)}), Capacity);
  EXPECT_EQ(rig.engine->position(id), 0);
  EXPECT_EQ(rig.engine->stats().pages_used, 0);
  std::vector<float> logits(kFakeVocab);
  EXPECT_THROW(rig.engine->logits(id, logits), InvalidArgument);
}

TEST_P(EngineModes, EndsAtTheContextAndRefusesMore) {
  Rig rig({.max_sessions = 1, .max_context = 64});
  SessionId id = rig.engine->open();
  rig.engine->submit(id, {.tokens = prompt(1, 60), .draw = true, .max_tokens = 100});
  rig.engine->run({&id, 1}, 0, false, nullptr);
  Progress progress = rig.engine->poll(id);
  EXPECT_EQ(progress.tokens.size(), 4u);
  EXPECT_EQ(progress.finish, Finish::length);
  EXPECT_THROW(rig.engine->submit(id, {.draw = true, .max_tokens = 1}), Capacity);
}

TEST_P(EngineModes, StopsAtStopTokens) {
  Rig rig;
  SessionId id = rig.engine->open();
  auto tokens = rig.draw(id, prompt(9, 20), 10);
  SessionId again = rig.engine->open();
  rig.engine->submit(
      again,
      {.tokens = prompt(9, 20), .draw = true, .max_tokens = 10, .stop_token_ids = {tokens[4]}});
  rig.engine->run({&again, 1}, 0, false, nullptr);
  Progress progress = rig.engine->poll(again);
  EXPECT_EQ(progress.finish, Finish::stop);
  auto first = std::find(tokens.begin(), tokens.end(), tokens[4]);
  EXPECT_EQ(progress.tokens, std::vector<int32_t>(tokens.begin(), first + 1));
}

TEST_P(EngineModes, AnErrorPoisonsTheSessionOfItsStepAlone) {
  Rig rig;
  SessionId good = rig.engine->open(), bad = rig.engine->open();
  rig.engine->submit(good, {.tokens = prompt(1, 10)});
  rig.engine->submit(bad, {.tokens = prompt(2, 10)});
  // The second session's slot is the second one given out.
  rig.backend->on_step = [](const std::vector<int>& slots) {
    if (slots == std::vector<int>{2}) throw Device("injected");
  };
  SessionId both[] = {good, bad};
  rig.engine->run(both, 0, false, nullptr);
  EXPECT_EQ(rig.engine->poisoned(good), "");
  EXPECT_EQ(rig.engine->poll(bad).finish, Finish::error);
  EXPECT_EQ(rig.engine->poisoned(bad), "injected");
  rig.backend->on_step = nullptr;
  EXPECT_THROW(rig.engine->submit(bad, {.tokens = {1}}), Error);
  EXPECT_THROW(rig.engine->fork(bad), Error);
  EXPECT_THROW(rig.engine->save(bad), Error);
  rig.engine->reset(bad);
  Rig fresh;
  EXPECT_EQ(rig.draw(bad, prompt(2, 10), 5), fresh.draw(fresh.engine->open(), prompt(2, 10), 5));
}

TEST_P(EngineModes, ANonFiniteLogitPoisonsOneRowOfABatch) {
  Rig rig;
  std::vector<SessionId> ids{rig.engine->open(), rig.engine->open()};
  rig.backend->disturb[2] = std::numeric_limits<float>::infinity();
  for (SessionId id : ids)
    rig.engine->submit(id, {.tokens = prompt(1, 10), .draw = true, .max_tokens = 5});
  rig.engine->run(ids, 0, false, nullptr);
  EXPECT_EQ(rig.engine->poll(ids[0]).tokens.size(), 5u);
  EXPECT_NE(rig.engine->poisoned(ids[1]).find("not finite"), std::string::npos);
}

TEST_P(EngineModes, StopFromAnotherThreadEndsTheRunAtATokenBoundary) {
  Rig rig({.max_sessions = 1, .max_context = 100000});
  SessionId id = rig.engine->open();
  std::atomic<int> steps{0};
  rig.backend->on_step = [&](const auto&) { ++steps; };
  rig.engine->submit(id, {.tokens = prompt(1, 4), .draw = true, .max_tokens = 90000});
  std::thread stopper([&] {
    while (steps < 20) std::this_thread::yield();
    rig.engine->stop(id);
  });
  rig.engine->run({&id, 1}, 0, false, nullptr);
  stopper.join();
  Progress progress = rig.engine->poll(id);
  EXPECT_EQ(progress.finish, Finish::stopped);
  EXPECT_LT(progress.tokens.size(), 90000u);
  EXPECT_EQ(rig.engine->tokens(id).size(), 4 + progress.tokens.size());
  rig.backend->on_step = nullptr;
  EXPECT_EQ(rig.draw(id, {}, 3).size(), 3u);
}

TEST_P(EngineModes, AStoppedPrefillGoesOnAsAPrompt) {
  Rig rig({.max_sessions = 2, .max_context = 4096});
  SessionId id = rig.engine->open(), other = rig.engine->open();
  auto tokens = prompt(8, 2000);
  rig.engine->submit(id, {.tokens = tokens, .draw = true, .max_tokens = 1});
  rig.engine->step();
  rig.engine->cancel(id);
  EXPECT_TRUE(rig.engine->poll(id).finished);
  EXPECT_EQ(rig.draw(id, {}, 6), rig.draw(other, tokens, 6));
}

TEST_P(EngineModes, AnInterruptLeavesRequestsWhereTheyAre) {
  Rig rig;
  SessionId id = rig.engine->open(), other = rig.engine->open();
  auto expected = rig.draw(other, prompt(1, 10), 30);
  std::atomic<bool> interrupt{false};
  int steps = 0;
  rig.backend->on_step = [&](const auto&) { interrupt = ++steps == 10; };
  rig.engine->submit(id, {.tokens = prompt(1, 10), .draw = true, .max_tokens = 30});
  EXPECT_FALSE(rig.engine->run({&id, 1}, 0, false, &interrupt));
  EXPECT_EQ(steps, 10);
  rig.backend->on_step = nullptr;
  EXPECT_TRUE(rig.engine->run({&id, 1}, 0, false, nullptr));
  EXPECT_EQ(rig.engine->poll(id).tokens, expected);
}

TEST_P(EngineModes, ThreadsWithASessionEachDrawWhatTheyDrawAlone) {
  Rig rig({.max_sessions = 4, .max_context = 1024}), alone;
  std::vector<std::vector<int32_t>> drawn(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < 5; ++round) {
        SessionId id = rig.engine->open();
        drawn[static_cast<size_t>(i)] = rig.draw(id, prompt(i, 50 + 100 * i), 40);
        rig.engine->stats();
        rig.engine->close(id);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4; ++i) {
    SessionId id = alone.engine->open();
    EXPECT_EQ(drawn[static_cast<size_t>(i)], alone.draw(id, prompt(i, 50 + 100 * i), 40));
    alone.engine->close(id);
  }
  EXPECT_EQ(rig.engine->stats().sessions_open, 0);
  EXPECT_EQ(rig.engine->stats().pages_used, 0);
}

}  // namespace
}  // namespace qwen_moe
