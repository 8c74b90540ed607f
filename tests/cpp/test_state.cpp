#include <gtest/gtest.h>

#include "fake_backend.h"
#include "state/manager.h"

namespace qwen_moe {
namespace {

TEST(SlotPool, GivesEverySlotOnceAndNeverTheSink) {
  SlotPool pool(3);
  std::vector<int> slots{pool.acquire(), pool.acquire(), pool.acquire()};
  std::sort(slots.begin(), slots.end());
  EXPECT_EQ(slots, (std::vector<int>{1, 2, 3}));
  EXPECT_THROW((void)pool.acquire(), Capacity);
}

TEST(SlotPool, RaisesTheGenerationOnRelease) {
  SlotPool pool(1);
  int slot = pool.acquire();
  uint32_t before = pool.generation(slot);
  pool.release(slot);
  EXPECT_EQ(pool.acquire(), slot);
  EXPECT_NE(pool.generation(slot), before);
}

TEST(PagePool, FreesAPageWithItsLastReference) {
  PagePool pool(2);
  int page = pool.acquire();
  pool.share(page);
  EXPECT_FALSE(pool.release(page));
  EXPECT_EQ(pool.used(), 1);
  EXPECT_TRUE(pool.release(page));
  EXPECT_EQ(pool.available(), 2);
}

TEST(Coverage, HoldsWhenDeclaredIsDiscovered) {
  StateLayout layout = fake_layout();
  EXPECT_EQ(check_coverage(layout, {layout}, {{layout.buffers, layout.buffers}}), "");
}

TEST(Coverage, NamesWhatIsWrong) {
  StateLayout layout = fake_layout();
  auto complaint = [&](std::vector<StateBuffer> prefill, std::vector<StateBuffer> decode) {
    return check_coverage(layout, {layout}, {{std::move(prefill), std::move(decode)}});
  };
  auto fewer = layout.buffers;
  fewer.erase(fewer.begin());
  EXPECT_NE(complaint(layout.buffers, fewer).find("recurrent_state is declared but decode"),
            std::string::npos);
  auto more = layout.buffers;
  more.push_back({"layers.9.secret", DType::f32, {1}});
  EXPECT_NE(complaint(more, layout.buffers).find("layers.9.secret is written but not declared"),
            std::string::npos);
  auto reshaped = layout.buffers;
  reshaped[0].shape = {2};
  EXPECT_NE(complaint(layout.buffers, reshaped).find("decode writes"), std::string::npos);
  EXPECT_NE(check_coverage(layout, {layout, layout},
                           {{layout.buffers, layout.buffers}, {layout.buffers, layout.buffers}})
                .find("owned by 2 shards"),
            std::string::npos);
}

class Manager : public ::testing::Test {
 protected:
  MutableStateManager make(StateOptions options) {
    backend.reserve({.slots = options.max_sessions,
                     .pages = MutableStateManager::pages_needed(options),
                     .max_context = options.max_context});
    return MutableStateManager(fake_layout(), {&backend}, options);
  }
  FakeBackend backend;
};

TEST_F(Manager, CountsTheBytesOfASession) {
  MutableStateManager manager = make({.max_sessions = 2, .max_context = 100});
  // 4 bytes of state, a logits row, and two pages of 64 tokens of 4 bytes.
  EXPECT_EQ(manager.capacity().bytes_per_session, 4u + kFakeVocab * 4u + 2u * 64u * 4u);
  EXPECT_EQ(manager.capacity().max_sessions, 2);
  EXPECT_EQ(manager.capacity().reason, "requested");
}

TEST_F(Manager, FailsClosedToOneSessionAndSaysWhy) {
  backend.discovered.decode.pop_back();
  MutableStateManager manager = make({.max_sessions = 4, .max_context = 64});
  EXPECT_EQ(manager.capacity().max_sessions, 1);
  EXPECT_NE(manager.capacity().reason.find("lm_head.logits"), std::string::npos);
  Session only = manager.create();
  EXPECT_THROW(manager.create(), Capacity);
  manager.destroy(only);
}

TEST_F(Manager, ForkSharesFullPagesAndCopiesTheOneBeingFilled) {
  MutableStateManager manager = make({.max_sessions = 2, .max_context = 256});
  Session a = manager.create();
  manager.grow(a, 130);
  a.computed = 130;
  Session b = manager.fork(a);
  ASSERT_EQ(b.pages.size(), 3u);
  EXPECT_EQ(b.pages[0], a.pages[0]);
  EXPECT_EQ(b.pages[1], a.pages[1]);
  EXPECT_NE(b.pages[2], a.pages[2]);
  EXPECT_EQ(manager.pages().references(a.pages[0]), 2);
  manager.destroy(a);
  EXPECT_EQ(manager.pages().references(b.pages[0]), 1);
  manager.destroy(b);
  EXPECT_EQ(manager.pages().used(), 0);
  EXPECT_EQ(manager.slots().used(), 0);
}

TEST_F(Manager, ForkWithoutPagesLeavesNothingBehind) {
  MutableStateManager manager = make({.max_sessions = 2, .max_context = 64});
  Session a = manager.create();
  manager.grow(a, 10);
  a.computed = 10;
  Session b = manager.create();
  manager.grow(b, 64);  // the last page
  manager.destroy(b);
  Session hog = manager.create();
  manager.grow(hog, 64);
  EXPECT_THROW(manager.fork(a), Capacity);
  EXPECT_EQ(manager.slots().used(), 2);
  EXPECT_EQ(manager.pages().used(), 2);
}

TEST_F(Manager, StaleAfterDestroyEvenWhenTheSlotIsTakenAgain) {
  MutableStateManager manager = make({.max_sessions = 1, .max_context = 64});
  Session a = manager.create();
  Session old = a;
  manager.destroy(a);
  Session b = manager.create();
  EXPECT_EQ(b.slot, old.slot);
  EXPECT_TRUE(manager.stale(old));
  EXPECT_FALSE(manager.stale(b));
}

TEST_F(Manager, LoadRefusesWhatDoesNotFitBeforeWriting) {
  MutableStateManager manager = make({.max_sessions = 2, .max_context = 64});
  Session a = manager.create();
  manager.grow(a, 3);
  a.computed = 3;
  auto saved = manager.save(a);
  auto broken = saved;
  broken[0].shape = {2};
  Session b = manager.create();
  EXPECT_THROW(manager.load(b, broken, 3), Format);
  broken = saved;
  broken.pop_back();
  EXPECT_THROW(manager.load(b, broken, 3), Format);
  EXPECT_TRUE(b.pages.empty());
  manager.load(b, saved, 3);
  EXPECT_EQ(b.computed, 3);
}

}  // namespace
}  // namespace qwen_moe
