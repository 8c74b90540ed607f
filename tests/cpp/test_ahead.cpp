// One step ahead: the same timelines as step by step, whatever happens while a draw is outstanding.
#include <random>

#include "engine_rig.h"

namespace qwen_moe {
namespace {

using Calls = std::vector<std::string>;

struct Ahead : Rig {
  explicit Ahead(EngineOptions options = {.max_sessions = 8, .max_context = 1024})
      : Rig(options, true) {}

  void submit(SessionId id, std::vector<int32_t> tokens, int max_tokens,
              std::vector<int32_t> stop = {}, const Sampling& sampling = {}) {
    engine->submit(id, {.tokens = std::move(tokens),
                        .draw = true,
                        .sampling = sampling,
                        .max_tokens = max_tokens,
                        .stop_token_ids = std::move(stop)});
  }
  void steps(int count) {
    for (int i = 0; i < count; ++i) engine->step();
  }
  void finish(SessionId id) { engine->run({&id, 1}, 0, false, nullptr); }
  SessionId running(std::vector<int32_t> tokens, int steps_done, int max_tokens = 100) {
    SessionId id = engine->open();
    submit(id, std::move(tokens), max_tokens);
    steps(steps_done);
    return id;
  }
};

// Tokens that a timeline grows by, step by step.
std::vector<int32_t> expected(std::vector<int32_t> timeline, int count,
                              const Sampling& sampling = {}) {
  std::vector<int32_t> reply;
  for (int i = 0; i < count; ++i) {
    reply.push_back(fake_next(timeline, sampling, reply));
    timeline.push_back(reply.back());
  }
  return reply;
}

std::vector<int32_t> joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST(Ahead, TheNextStepIsEnqueuedBeforeADrawIsCollected) {
  Ahead rig;
  SessionId id = rig.engine->open();
  EXPECT_EQ(rig.draw(id, prompt(1, 5), 4), expected(prompt(1, 5), 4));
  EXPECT_EQ(rig.backend->calls,
            (Calls{"draw 0", "decode 0", "draw 1", "collect 0", "decode 1", "draw 2", "collect 1",
                   "decode 2", "draw 3", "collect 2", "collect 3"}));
  EXPECT_EQ(rig.engine->stats().decode_steps, 3);
  EXPECT_EQ(rig.engine->stats().backend.at("draws"), 4);
}

TEST(Ahead, ABackendThatComputesAtOnceIsCollectedAtOnce) {
  Rig rig({.max_sessions = 1, .max_context = 64}, false);
  rig.draw(rig.engine->open(), prompt(1, 5), 3);
  EXPECT_EQ(rig.backend->calls, (Calls{"draw 0", "collect 0", "decode 0", "draw 1", "collect 1",
                                       "decode 1", "draw 2", "collect 2"}));
}

TEST(Ahead, SessionsOfEveryLengthDrawWhatTheirTimelineSays) {
  Ahead rig({.max_sessions = 100, .max_context = 800});
  std::vector<SessionId> ids;
  auto sampling = [](int i) {
    return Sampling{.temperature = i % 3 ? 1.0 : 0.0, .seed = static_cast<uint64_t>(i)};
  };
  for (int i = 0; i < 100; ++i) {  // more than fit a step
    ids.push_back(rig.engine->open());
    rig.submit(ids.back(), prompt(i, 1 + 6 * i), 1 + 2 * i, {}, sampling(i));
    if (i % 10 == 0) rig.steps(3);  // the rest join later
  }
  rig.engine->run(ids, 0, false, nullptr);
  EXPECT_EQ(rig.backend->most_rows, 64u);
  for (int i = 0; i < 100; ++i) {
    Progress progress = rig.engine->poll(ids[static_cast<size_t>(i)]);
    EXPECT_EQ(progress.finish, Finish::length);
    EXPECT_EQ(progress.tokens, expected(prompt(i, 1 + 6 * i), 1 + 2 * i, sampling(i))) << i;
  }
}

TEST(Ahead, AStopTokenAtAnyPlaceEndsTheReplyAndTheTimelineGoesOn) {
  auto start = prompt(9, 60);
  auto reply = expected(start, 12);
  for (size_t k = 0; k < reply.size(); ++k)
    for (bool company : {false, true}) {
      Ahead rig;
      SessionId id = rig.engine->open();
      rig.submit(id, start, 50, {reply[k]});
      if (company) rig.submit(rig.engine->open(), prompt(3, 30), 100);
      rig.finish(id);
      auto end = std::find(reply.begin(), reply.end(), reply[k]) + 1;
      Progress progress = rig.engine->poll(id);
      EXPECT_EQ(progress.finish, Finish::stop);
      EXPECT_EQ(progress.tokens, std::vector<int32_t>(reply.begin(), end));
      auto timeline = joined(start, progress.tokens);
      EXPECT_EQ(rig.engine->tokens(id), timeline);
      EXPECT_EQ(rig.engine->position(id), static_cast<int>(timeline.size()));

      // A saved copy goes on elsewhere, a fork and the session itself here, all the same.
      Rig other({.max_sessions = 1, .max_context = 1024}, false);
      SessionId loaded = other.engine->open();
      other.engine->load(loaded, rig.engine->save(id));
      SessionId fork = rig.engine->fork(id);
      auto more = prompt(4, 5);
      auto want = expected(joined(timeline, more), 6);
      EXPECT_EQ(other.draw(loaded, more, 6), want);
      EXPECT_EQ(rig.draw(fork, more, 6), want);
      EXPECT_EQ(rig.draw(id, {}, 6), expected(timeline, 6));  // from the logits, or from the token
    }
}

TEST(Ahead, TheLogitsAfterAStopTokenThatWasFedAreItsOwn) {
  Ahead rig;
  SessionId id = rig.engine->open();
  auto start = prompt(9, 60);
  rig.submit(id, start, 50, {fake_next(start)});
  rig.finish(id);
  std::vector<float> logits(kFakeVocab);
  rig.engine->logits(id, logits);
  auto likeliest = std::max_element(logits.begin(), logits.end()) - logits.begin();
  EXPECT_EQ(likeliest, fake_next(joined(start, {fake_next(start)})));
  EXPECT_EQ(rig.engine->save(id).computed, 61);
}

TEST(Ahead, VerbsCollectWhatIsOutstandingFirst) {
  auto start = prompt(2, 20);
  for (int done = 1; done < 6; ++done) {
    Ahead rig({.max_sessions = 4, .max_context = 256, .eos_token_ids = {}, .poison = true});
    // `done` steps: a prefill that draws, then decode steps; the newest draw is outstanding.
    SessionId id = rig.running(start, done);
    EXPECT_THROW(rig.engine->fork(id), InvalidArgument);  // its request is running
    EXPECT_THROW(rig.engine->save(id), InvalidArgument);
    EXPECT_EQ(rig.engine->tokens(id), joined(start, expected(start, done)));
    rig.engine->cancel(id);
    EXPECT_EQ(rig.engine->poll(id).finish, Finish::stopped);
    EXPECT_EQ(rig.draw(id, {}, 4), expected(joined(start, expected(start, done)), 4));

    SessionId closed = rig.running(prompt(3, 10), done);
    rig.engine->close(closed);
    SessionId reset = rig.running(prompt(4, 10), done);
    rig.engine->reset(reset);
    EXPECT_EQ(rig.engine->position(reset), 0);
    EXPECT_EQ(rig.draw(reset, start, 5), expected(start, 5));
    SessionId looked = rig.running(prompt(5, 10), done);
    std::vector<float> logits(kFakeVocab);
    rig.engine->logits(looked, logits);
    EXPECT_EQ(rig.engine->tokens(looked), joined(prompt(5, 10), expected(prompt(5, 10), done)));
    rig.finish(looked);
    EXPECT_EQ(rig.engine->poll(looked).tokens, expected(prompt(5, 10), 100));
  }
}

TEST(Ahead, CancelKeepsWhatWasDrawn) {
  for (int done = 1; done < 6; ++done) {
    Ahead rig;
    SessionId id = rig.running(prompt(2, 20), done);
    rig.engine->cancel(id);
    EXPECT_EQ(rig.engine->poll(id).tokens, expected(prompt(2, 20), done));
  }
}

TEST(Ahead, ASessionIsSavedBehindTheDrawThatNobodyWants) {
  Ahead rig;
  auto start = prompt(9, 60);
  SessionId id = rig.engine->open();
  rig.submit(id, start, 50, {fake_next(start)});
  while (!rig.engine->poll(id).finished) rig.steps(1);  // the draw behind the stop token is on
  Engine::Snapshot snapshot = rig.engine->save(id);
  EXPECT_EQ(snapshot.tokens, joined(start, {fake_next(start)}));
  EXPECT_EQ(rig.backend->calls.back(), "collect 1");
}

TEST(Ahead, ADrawIsCollectedBehindTheNextStepAlsoWhenThatIsAPrefill) {
  Ahead rig({.max_sessions = 2, .max_context = 2000});
  SessionId id = rig.running(prompt(1, 5), 2), long_one = rig.engine->open();
  rig.submit(long_one, prompt(2, 1500), 1);  // several chunks
  rig.backend->calls.clear();
  rig.steps(3);  // a chunk, a decode step that leaves its draw on, and a chunk
  EXPECT_EQ(rig.backend->calls, (Calls{"decode 1", "draw 2", "collect 2"}));
  rig.finish(long_one);
  rig.finish(id);
  EXPECT_EQ(rig.engine->poll(id).tokens, expected(prompt(1, 5), 100));
  EXPECT_EQ(rig.engine->poll(long_one).tokens, expected(prompt(2, 1500), 1));
}

TEST(Ahead, StopKeepsWhatWasDrawn) {
  Ahead rig;
  auto start = prompt(2, 20);
  SessionId id = rig.running(start, 4), other = rig.running(prompt(3, 20), 2);
  rig.engine->stop(id);
  rig.steps(1);
  Progress progress = rig.engine->poll(id);
  EXPECT_EQ(progress.finish, Finish::stopped);
  EXPECT_EQ(progress.tokens, expected(start, static_cast<int>(progress.tokens.size())));
  EXPECT_GE(progress.tokens.size(), 4u);
  EXPECT_EQ(rig.draw(id, prompt(1, 3), 5),
            expected(joined(joined(start, progress.tokens), prompt(1, 3)), 5));
  rig.finish(other);
  EXPECT_EQ(rig.engine->poll(other).tokens, expected(prompt(3, 20), 100));
}

TEST(Ahead, PenaltiesWaitForTheTokenTheyCount) {
  Ahead rig;
  Sampling penalty{.frequency_penalty = 500};
  SessionId id = rig.engine->open(), free = rig.engine->open();
  rig.submit(id, prompt(6, 10), 30, {}, penalty);
  rig.finish(id);
  auto want = expected(prompt(6, 10), 30, penalty);
  EXPECT_NE(want, expected(prompt(6, 10), 30));
  EXPECT_EQ(rig.engine->poll(id).tokens, want);
  for (size_t i = 0; i < 29; ++i) {  // one after the other
    EXPECT_EQ(rig.backend->calls[3 * i], concat("draw ", i));
    EXPECT_EQ(rig.backend->calls[3 * i + 1], concat("collect ", i));
  }
  rig.engine->reset(id);
  rig.submit(id, prompt(6, 10), 30, {}, penalty);
  rig.submit(free, prompt(7, 10), 30);
  rig.engine->run(std::vector{id, free}, 0, false, nullptr);
  EXPECT_EQ(rig.engine->poll(id).tokens, want);
  EXPECT_EQ(rig.engine->poll(free).tokens, expected(prompt(7, 10), 30));
}

TEST(Ahead, NothingIsFedBeyondTheContext) {
  for (int length : {62, 63, 126, 127}) {  // the last page is full with the last token
    Ahead rig({.max_sessions = 2, .max_context = 128});
    SessionId id = rig.engine->open();
    rig.submit(id, prompt(1, length), 1000);
    rig.finish(id);
    Progress progress = rig.engine->poll(id);
    EXPECT_EQ(progress.finish, Finish::length);
    EXPECT_EQ(progress.tokens, expected(prompt(1, length), 128 - length));
    EXPECT_EQ(rig.engine->save(id).computed, 127);
    EXPECT_EQ(rig.engine->stats().pages_used, 2);
  }
}

TEST(Ahead, AStepThatCannotBeEnqueuedKeepsWhatWasDrawnBefore) {
  Ahead rig;
  auto start = prompt(1, 10);
  SessionId bad = rig.running(start, 3), good = rig.engine->open();
  rig.backend->on_step = [&](const std::vector<int>& slots) {
    if (slots == std::vector<int>{1}) throw Device("injected");
  };
  rig.steps(1);
  rig.backend->on_step = nullptr;
  EXPECT_EQ(rig.engine->poisoned(bad), "injected");
  Progress progress = rig.engine->poll(bad);
  EXPECT_EQ(progress.finish, Finish::error);
  EXPECT_EQ(progress.tokens, expected(start, 3));
  EXPECT_EQ(rig.draw(good, start, 5), expected(start, 5));
  EXPECT_THROW(rig.engine->submit(bad, {.tokens = {1}}), Error);
  rig.engine->reset(bad);
  EXPECT_EQ(rig.draw(bad, start, 5), expected(start, 5));
}

TEST(Ahead, AnErrorOfCollectPoisonsTheRowsOfThatDraw) {
  Ahead rig;
  SessionId first = rig.running(prompt(1, 10), 3), late = rig.engine->open();
  rig.backend->on_collect = [raised = 0](const auto&) mutable {
    if (!raised++) throw Device("injected");
  };
  rig.steps(1);  // the next step is enqueued already
  EXPECT_EQ(rig.engine->poisoned(first), "injected");
  EXPECT_EQ(rig.engine->poll(first).tokens, expected(prompt(1, 10), 2));
  rig.submit(late, prompt(2, 10), 8);
  rig.finish(late);
  EXPECT_EQ(rig.engine->poll(late).tokens, expected(prompt(2, 10), 8));
  EXPECT_EQ(rig.engine->poisoned(first), "injected");

  rig.backend->on_collect = [](const std::vector<int>& slots) {
    if (slots.size() == 2) throw Device("injected twice");
  };
  rig.engine->reset(first);
  rig.engine->reset(late);
  SessionId both[] = {first, late};
  SessionId spared = rig.engine->open();
  rig.submit(first, prompt(1, 10), 8);
  rig.submit(late, prompt(2, 10), 8);
  rig.engine->run(both, 0, false, nullptr);
  rig.backend->on_collect = nullptr;
  for (SessionId id : both) {
    EXPECT_EQ(rig.engine->poisoned(id), "injected twice");
    EXPECT_EQ(rig.engine->poll(id).finish, Finish::error);
    rig.engine->reset(id);
    EXPECT_EQ(rig.draw(id, prompt(5, 10), 6), expected(prompt(5, 10), 6));
  }
  EXPECT_EQ(rig.draw(spared, prompt(5, 10), 6), expected(prompt(5, 10), 6));
}

TEST(Ahead, TokensAskedForOneByOneLeaveTheNextStepInFlight) {
  Ahead rig;
  SessionId id = rig.engine->open(), other = rig.engine->open();
  rig.submit(id, prompt(1, 10), 30);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 12; ++i) {
    rig.engine->run({&id, 1}, 1, false, nullptr);
    for (int32_t token : rig.engine->poll(id).tokens) tokens.push_back(token);
    EXPECT_EQ(static_cast<int>(tokens.size()), i + 1);
    EXPECT_LE(rig.engine->stats().decode_steps, i + 2);
  }
  // A verb on another session waits for it and takes nothing from it.
  rig.engine->reset(other);
  rig.finish(id);
  for (int32_t token : rig.engine->poll(id).tokens) tokens.push_back(token);
  EXPECT_EQ(tokens, expected(prompt(1, 10), 30));
}

TEST(Ahead, AStaleDrawPoisonsItsRowAlone) {
  Ahead rig;
  SessionId bad = rig.running(prompt(1, 10), 2), good = rig.running(prompt(2, 10), 2, 20);
  rig.backend->stale = {1};
  rig.finish(good);
  EXPECT_EQ(rig.engine->poll(good).tokens, expected(prompt(2, 10), 20));
  EXPECT_NE(rig.engine->poisoned(bad).find("no longer has generation 0"), std::string::npos);
  EXPECT_EQ(rig.engine->poll(bad).finish, Finish::error);
  rig.backend->stale.clear();
  rig.engine->reset(bad);
  EXPECT_EQ(rig.draw(bad, prompt(1, 10), 5), expected(prompt(1, 10), 5));
}

TEST(Ahead, AStopTokenThatWasFedToAStaleSlotPoisonsItToo) {
  Ahead rig;
  auto start = prompt(1, 10);
  SessionId id = rig.engine->open();
  rig.submit(id, start, 50, {expected(start, 3)[2]});
  rig.backend->on_collect = [&, count = 0](const auto&) mutable {
    if (++count == 3) rig.backend->stale = {1};  // the step behind the stop token
  };
  rig.finish(id);
  EXPECT_EQ(rig.engine->tokens(id), joined(start, expected(start, 3)));
  EXPECT_NE(rig.engine->poisoned(id).find("generation"), std::string::npos);
}

// Everything at random. At any time a timeline must be its prompts with the tokens that follow from
// it between them.
TEST(Ahead, AnyOrderOfVerbsLeavesTheTimelinesRight) {
  struct Seen {
    std::vector<int32_t> timeline;  // until the request
    bool drawing = false;
  };
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    Ahead rig({.max_sessions = 5, .max_context = 200, .eos_token_ids = {3}, .poison = true});
    std::map<SessionId, Seen> open;
    auto check = [&](SessionId id) {
      Seen& seen = open.at(id);
      auto tokens = rig.engine->tokens(id);
      ASSERT_GE(tokens.size(), seen.timeline.size());
      auto grown = static_cast<int>(tokens.size() - seen.timeline.size());
      ASSERT_TRUE(seen.drawing || grown == 0);
      ASSERT_EQ(tokens, joined(seen.timeline, expected(seen.timeline, grown))) << "seed " << seed;
      ASSERT_EQ(rig.engine->poisoned(id), "");
    };
    for (int turn = 0; turn < 150; ++turn) {
      int verb = below(10);
      if (verb == 0 && open.size() < 5) open[rig.engine->open()];
      if (open.empty()) continue;
      SessionId id = std::next(open.begin(), below(static_cast<int>(open.size())))->first;
      Seen& seen = open.at(id);
      bool idle = rig.engine->poll(id).finished;
      if (verb == 1) {
        rig.engine->close(id);
        open.erase(id);
      } else if (verb == 2) {
        rig.engine->reset(id);
        seen = {};
      } else if (verb == 3) {
        rig.engine->cancel(id);
      } else if (verb == 4) {
        rig.engine->stop(id);
      } else if (verb == 5 && idle && open.size() < 5) {
        open[rig.engine->fork(id)] = {rig.engine->tokens(id), false};
      } else if (verb == 6) {
        rig.engine->run({&id, 1}, 1 + below(5), false, nullptr);
      } else if (verb <= 8 && idle) {
        auto tokens = prompt(below(1000), below(30));
        auto before = rig.engine->tokens(id);
        if (before.size() + tokens.size() == 0 || before.size() + tokens.size() >= 200) continue;
        rig.submit(id, tokens, 1 + below(20), {static_cast<int32_t>(below(kFakeVocab))});
        seen = {joined(before, tokens), true};
      }
      rig.steps(below(4));
      for (auto& [each, unused] : open) check(each);
    }
  }
}

}  // namespace
}  // namespace qwen_moe
