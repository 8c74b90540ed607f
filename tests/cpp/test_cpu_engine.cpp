// The engine over the CPU backend and a small model of random weights.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "engine/engine.h"

namespace {
std::atomic<long> allocations{0};
}

// Counts every allocation of the program, so that a test can see that decoding makes none. Kept out
// of line, or the compiler takes inlined halves of the pairs for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace qwen_moe {
namespace {

ModelConfig small_config() {
  ModelConfig c{.vocab_size = 300,
                .hidden_size = 128,
                .num_hidden_layers = 4,
                .layer_types = {LayerType::linear_attention, LayerType::full_attention,
                                LayerType::linear_attention, LayerType::full_attention},
                .num_attention_heads = 4,
                .num_key_value_heads = 2,
                .head_dim = 64,
                .rope_theta = 1e7,
                .partial_rotary_factor = 0.25,
                .linear_num_key_heads = 2,
                .linear_num_value_heads = 4,
                .linear_key_head_dim = 32,
                .linear_value_head_dim = 32,
                .linear_conv_kernel_dim = 4,
                .num_experts = 8,
                .num_experts_per_tok = 2,
                .moe_intermediate_size = 64,
                .shared_expert_intermediate_size = 64,
                .rms_norm_eps = 1e-6,
                .tie_word_embeddings = false,
                .max_position_embeddings = 4096};
  c.validate();
  return c;
}

// The CPU backend as if its draws came late: the host sees a token only when it collects it.
class LateBackend : public Backend {
 public:
  explicit LateBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  bool ahead() const override { return true; }
  void decode(std::span<const DecodeRow> rows, const Handoff* input) override {
    std::copy(rows.begin(), rows.end(), rows_.begin());
    for (DecodeRow& row : std::span(rows_).first(rows.size()))
      if (row.token == kLastDrawn) row.token = last_drawn_[static_cast<size_t>(row.slot)];
    inner_->decode(std::span(rows_).first(rows.size()), input);
  }
  void draw(std::span<const SampleRow> rows) override {
    auto& results = drawn_[draws_++ % 2];
    inner_->draw(rows);
    inner_->collect(std::span(results).first(rows.size()));
    for (size_t i = 0; i < rows.size(); ++i)
      last_drawn_[static_cast<size_t>(rows[i].slot)] = results[i].token;
  }
  void collect(std::span<SampleResult> results) override {
    std::copy_n(drawn_[collects_++ % 2].begin(), results.size(), results.begin());
  }

  const StateLayout& layout() const override { return inner_->layout(); }
  void reserve(const ReserveOptions& options) override { inner_->reserve(options); }
  std::map<std::string, size_t> memory() const override { return inner_->memory(); }
  void prefill(const PrefillStep& step, const Handoff* input) override {
    inner_->prefill(step, input);
  }
  Handoff hidden() const override { return inner_->hidden(); }
  void read_logits(int slot, std::span<float> to) override { inner_->read_logits(slot, to); }
  Discovered discover(int slot, int page) override { return inner_->discover(slot, page); }
  void set_generation(int slot, uint32_t g) override { inner_->set_generation(slot, g); }
  void clear_slot(int slot) override { inner_->clear_slot(slot); }
  void copy_slot(int to, int from) override { inner_->copy_slot(to, from); }
  void copy_page(int to, int from) override { inner_->copy_page(to, from); }
  void poison_slot(int slot) override { inner_->poison_slot(slot); }
  void poison_page(int page) override { inner_->poison_page(page); }
  void read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to) override {
    inner_->read_buffer(buffer, slot, pages, tokens, to);
  }
  void write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from) override {
    inner_->write_buffer(buffer, slot, pages, tokens, from);
  }

 private:
  std::unique_ptr<Backend> inner_;
  std::array<DecodeRow, kMaxRows> rows_;
  std::array<std::array<SampleResult, kMaxRows>, 2> drawn_;
  std::array<int32_t, 16> last_drawn_{};
  size_t draws_ = 0, collects_ = 0;
};

struct Rig {
  Rig(Recipe recipe, std::vector<int> split, int threads = 2) {
    std::vector<std::shared_ptr<WeightHome>> homes(split.size() + 1, make_cpu_weight_home(threads));
    model = std::make_shared<Model>(small_config(), recipe, DType::bf16, "random", homes, split);
    uint64_t seed = 0;
    for (const Model::Entry& e : model->entries()) model->fill_random(e.tensor->slot().fqn, ++seed);
    for (int i = 0; i < model->shards(); ++i)
      shards.push_back(make_cpu_backend(
          {.model = model.get(), .shard = i, .kv_dtype = DType::bf16, .threads = threads}));
  }
  void come_late() { shards[0] = std::make_unique<LateBackend>(std::move(shards[0])); }
  Engine& engine(EngineOptions options = {.max_sessions = 6, .max_context = 1024}) {
    const ModelConfig& c = model->config();
    made = std::make_unique<Engine>(model,
                                    declare_state(c, {0, c.num_hidden_layers}, true, DType::bf16),
                                    c.vocab_size, std::move(shards), options);
    return *made;
  }
  std::shared_ptr<Model> model;
  std::vector<std::unique_ptr<Backend>> shards;
  std::unique_ptr<Engine> made;
};

std::vector<int32_t> prompt(int seed, int length) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back((seed * 101 + i * i * 7 + i) % 300);
  return tokens;
}

struct Drawn {
  std::vector<int32_t> tokens;
  std::vector<float> logits;
  bool operator==(const Drawn& other) const {
    return tokens == other.tokens && logits.size() == other.logits.size() &&
           std::memcmp(logits.data(), other.logits.data(), logits.size() * sizeof(float)) == 0;
  }
};

Drawn collect(Engine& engine, SessionId id) {
  Drawn drawn{engine.poll(id).tokens, std::vector<float>(300)};
  engine.logits(id, drawn.logits);
  return drawn;
}

Drawn alone(Engine& engine, int i) {
  SessionId id = engine.open();
  engine.submit(id, {.tokens = prompt(i, 3 + 61 * i), .draw = true, .max_tokens = 12});
  engine.run({&id, 1}, 0, false, nullptr);
  Drawn drawn = collect(engine, id);
  engine.close(id);
  return drawn;
}

class EveryRecipe : public ::testing::TestWithParam<Recipe> {};
INSTANTIATE_TEST_SUITE_P(Recipes, EveryRecipe,
                         ::testing::Values(Recipe::none, Recipe::int8, Recipe::int4,
                                           Recipe::int4_all),
                         [](const auto& info) {
                           std::string name(recipe_name(info.param));
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST_P(EveryRecipe, CoverageHolds) {
  Rig one(GetParam(), {}), two(GetParam(), {3});
  for (Rig* rig : {&one, &two}) {
    const ServingCapacity& capacity = rig->engine().capacity();
    EXPECT_EQ(capacity.max_sessions, 6) << capacity.reason;
    EXPECT_EQ(capacity.reason, "requested");
  }
}

TEST_P(EveryRecipe, ABatchOnTwoShardsHasTheBitsOfASessionAloneOnOne) {
  Rig one(GetParam(), {}), two(GetParam(), {2}, 3);
  Engine& single = one.engine();
  Engine& split =
      two.engine({.max_sessions = 6, .max_context = 1024, .eos_token_ids = {}, .poison = true});
  std::vector<SessionId> ids;
  for (int i = 0; i < 6; ++i) {
    ids.push_back(split.open());
    split.submit(ids.back(), {.tokens = prompt(i, 3 + 61 * i), .draw = true, .max_tokens = 12});
  }
  split.run(ids, 0, false, nullptr);
  EXPECT_GE(split.stats().max_decode_rows, 4);
  for (int i = 0; i < 6; ++i)
    EXPECT_EQ(collect(split, ids[static_cast<size_t>(i)]), alone(single, i)) << "session " << i;
}

TEST_P(EveryRecipe, DecodingAllocatesNothing) {
  Rig rig(GetParam(), {2});
  Engine& engine = rig.engine();
  std::vector<SessionId> ids{engine.open(), engine.open(), engine.open()};
  for (SessionId id : ids)
    engine.submit(id, {.tokens = prompt(1, 70),
                       .draw = true,
                       .sampling = {.temperature = 0.8,
                                    .top_k = 40,
                                    .top_p = 0.9,
                                    .repetition_penalty = 1.1,
                                    .logprobs = 3},
                       .max_tokens = 200});
  engine.run(ids, 4, false, nullptr);  // everybody is decoding
  long before = allocations;
  engine.run(ids, 150, false, nullptr);  // over several page boundaries
  EXPECT_EQ(allocations - before, 0);
}

TEST_P(EveryRecipe, OneStepAheadHasTheBitsOfStepByStep) {
  Rig late(GetParam(), {}), plain(GetParam(), {});
  late.come_late();
  Engine& ahead = late.engine();
  Engine& single = plain.engine();
  std::vector<SessionId> ids;
  for (int i = 0; i < 6; ++i) {
    ids.push_back(ahead.open());
    ahead.submit(ids.back(), {.tokens = prompt(i, 3 + 61 * i), .draw = true, .max_tokens = 12});
  }
  ahead.run(ids, 0, false, nullptr);
  for (int i = 0; i < 6; ++i)
    EXPECT_EQ(collect(ahead, ids[static_cast<size_t>(i)]), alone(single, i)) << "session " << i;
}

TEST(CpuEngine, OneStepAheadAllocatesNothing) {
  Rig rig(Recipe::int4, {});
  rig.come_late();
  Engine& engine = rig.engine();
  std::vector<SessionId> ids{engine.open(), engine.open(), engine.open()};
  for (SessionId id : ids)
    engine.submit(id, {.tokens = prompt(1, 70),
                       .draw = true,
                       .sampling = {.temperature = 0.8, .top_k = 40, .logprobs = 3},
                       .max_tokens = 200});
  engine.run(ids, 4, false, nullptr);
  long before = allocations;
  engine.run(ids, 150, false, nullptr);
  EXPECT_EQ(allocations - before, 0);
}

TEST(CpuEngine, SeededDrawsRepeatWhateverTheCompany) {
  Rig rig(Recipe::int4, {});
  Engine& engine = rig.engine();
  auto request = [](int seed) {
    return Request{
        .tokens = prompt(seed, 20),
        .draw = true,
        .sampling = {.temperature = 1.0, .top_p = 0.95, .seed = static_cast<uint64_t>(seed)},
        .max_tokens = 30};
  };
  std::vector<SessionId> ids;
  for (int i = 0; i < 5; ++i) engine.submit(ids.emplace_back(engine.open()), request(i));
  engine.run(ids, 0, false, nullptr);
  std::vector<std::vector<int32_t>> together;
  for (SessionId id : ids) together.push_back(engine.poll(id).tokens);
  EXPECT_NE(together[0], together[1]);
  SessionId last = engine.open();
  for (int i = 0; i < 5; ++i) {
    engine.reset(last);
    engine.submit(last, request(i));
    engine.run({&last, 1}, 0, false, nullptr);
    EXPECT_EQ(engine.poll(last).tokens, together[static_cast<size_t>(i)]);
  }
}

TEST(CpuEngine, AStaleGenerationIsRefusedAndWritesNothing) {
  Rig rig(Recipe::none, {});
  Backend& backend = *rig.shards[0];
  backend.reserve({.slots = 1, .pages = 1, .max_context = 64});
  backend.set_generation(1, 7);
  int32_t tokens[] = {1, 2, 3}, pages[] = {1};
  PrefillStep step{.slot = 1, .generation = 7, .tokens = tokens, .pages = pages, .logits = true};
  backend.prefill(step, nullptr);
  std::vector<float> before(300), after(300);
  backend.read_logits(1, before);
  step.generation = 6;
  EXPECT_THROW(backend.prefill(step, nullptr), Error);
  DecodeRow row{.slot = 1, .generation = 8, .position = 3, .token = 4, .pages = pages};
  EXPECT_THROW(backend.decode({&row, 1}, nullptr), Error);
  backend.read_logits(1, after);
  EXPECT_EQ(before, after);
}

TEST(WeightStore, EnginesOfOneCheckpointShareACopyUntilTheLastIsGone) {
  size_t before = WeightStore::instance().resident_bytes();
  {
    Rig first(Recipe::int8, {});
    size_t once = WeightStore::instance().resident_bytes();
    Rig second(Recipe::int8, {2});
    EXPECT_EQ(WeightStore::instance().resident_bytes(), once);
    Rig other(Recipe::int4, {});
    EXPECT_GT(WeightStore::instance().resident_bytes(), once);
  }
  EXPECT_EQ(WeightStore::instance().resident_bytes(), before);
}

TEST(WeightStore, RefusesAHitOfAnotherShapeWithBothDescriptions) {
  auto home = make_cpu_weight_home(1);
  TensorSlot slot{.fqn = "w", .shape = {32, 64}};
  slot.spec = {.format = WeightFormat::bf16, .n = 32, .k = 64};
  auto held = WeightStore::instance().acquire("c", slot, *home);
  slot.shape = {64, 32};
  slot.spec.n = 64;
  slot.spec.k = 32;
  try {
    WeightStore::instance().acquire("c", slot, *home);
    FAIL() << "a tensor of another shape was accepted";
  } catch (const Format& error) {
    std::string text = error.what();
    EXPECT_NE(text.find("[32, 64]"), std::string::npos) << text;
    EXPECT_NE(text.find("[64, 32]"), std::string::npos) << text;
  }
}

TEST(StoredTensor, PartsMayComeBySeveralThreadsAndCountOnceAccepted) {
  auto home = make_cpu_weight_home(2);
  TensorSlot slot{.fqn = "w", .shape = {256, 64}};
  slot.spec = {.format = WeightFormat::int4, .n = 256, .k = 64, .group = 64};
  std::vector<float> source(256 * 64);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<float>(i % 31) - 15.0f;
  StoredTensor whole(slot, home->allocate(slot.bytes())), put(slot, home->allocate(slot.bytes())),
      copied(slot, home->allocate(slot.bytes()));
  whole.put(*home, {source.data(), DType::f32, slot.shape}, 0);
  EXPECT_TRUE(whole.complete());
  std::vector<std::thread> threads;
  for (int part = 0; part < 4; ++part) {
    threads.emplace_back([&, part] {
      put.put(*home, {source.data() + part * 64 * 64, DType::f32, {64, 64}}, part * 64);
      const size_t bytes = slot.bytes() / 4, at = bytes * static_cast<size_t>(part);
      copied.put_packed(
          *home, [&](std::byte* to, size_t count) { std::memcpy(to, whole.data() + at, count); },
          bytes, at);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(put.complete());
  EXPECT_FALSE(copied.complete());
  copied.accept();
  EXPECT_TRUE(copied.complete());
  for (const StoredTensor* tensor : {&put, &copied})
    EXPECT_EQ(std::memcmp(tensor->data(), whole.data(), slot.bytes()), 0);
  EXPECT_THROW(
      copied.put_packed(*home, [](std::byte*, size_t) {}, slot.unit().bytes, 0), InvalidArgument);
}

TEST(Model, RefusesASplitThatDoesNotCoverTheLayers) {
  auto home = make_cpu_weight_home(1);
  auto make = [&](std::vector<int> split, size_t devices) {
    Model(small_config(), Recipe::none, DType::bf16, "split",
          std::vector<std::shared_ptr<WeightHome>>(devices, home), split);
  };
  EXPECT_THROW(make({0}, 2), InvalidArgument);
  EXPECT_THROW(make({4}, 2), InvalidArgument);
  EXPECT_THROW(make({3, 2}, 3), InvalidArgument);
  EXPECT_THROW(make({2}, 3), InvalidArgument);
  EXPECT_NO_THROW(make({1, 3}, 3));
}

}  // namespace
}  // namespace qwen_moe
