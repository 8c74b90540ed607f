// Draws on the device against those of the host.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/ops.h"
#include "cuda/sample.h"

namespace qwen_moe::cuda {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int32_t kUntouched = -7;

ModelConfig config(int vocab) {
  ModelConfig c{.vocab_size = vocab,
                .hidden_size = 64,
                .num_hidden_layers = 1,
                .layer_types = {LayerType::full_attention},
                .num_attention_heads = 1,
                .num_key_value_heads = 1,
                .head_dim = 64,
                .rope_theta = 1e7,
                .partial_rotary_factor = 0.25,
                .linear_num_key_heads = 1,
                .linear_num_value_heads = 1,
                .linear_key_head_dim = 32,
                .linear_value_head_dim = 32,
                .linear_conv_kernel_dim = 4,
                .num_experts = 2,
                .num_experts_per_tok = 1,
                .moe_intermediate_size = 64,
                .shared_expert_intermediate_size = 64,
                .rms_norm_eps = 1e-6,
                .max_position_embeddings = 4096};
  return c;
}

struct Request {
  Sampling sampling;
  std::vector<int32_t> timeline = {0}, reply;
  bool draw = true;
};

SampleRow sample_row(const Request& q, int slot) {
  return {.slot = slot,
          .position = static_cast<int>(q.timeline.size()),
          .sampling = &q.sampling,
          .timeline = q.timeline,
          .reply = q.reply};
}

// Some rows of logits, each in the slot 1 + its number, drawn from on both sides.
class Rig {
 public:
  Rig(int vocab, int rows)
      : vocab_(vocab),
        rows_(rows),
        stride_(vocab + 5),  // no row but the first is aligned, and NaN lies between them
        config_(config(vocab)),
        pool_(static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 16u))),
        cpu_(config_, pool_, rows, 64),
        sampler_(vocab, rows, device_properties(0)),
        logits(static_cast<size_t>((rows + 1) * stride_), kNan),
        device_logits_(logits.size()),
        rows_buffer_(static_cast<size_t>(rows)),
        entries_(static_cast<size_t>(rows) * 1000),
        last_token_(static_cast<size_t>(rows) + 1),
        stale_(static_cast<size_t>(rows) + 1),
        results_(static_cast<size_t>(rows)),
        counts_(static_cast<size_t>(vocab)) {}

  float* row(int r) { return logits.data() + (r + 1) * stride_; }

  void randomize(uint32_t seed, float scale) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int r = 0; r < rows_; ++r)
      for (int i = 0; i < vocab_; ++i) row(r)[i] = scale * normal(random);
  }

  // Draws for requests[i] from row order[i], or from row i.
  std::vector<DrawResult> device(const std::vector<Request>& requests,
                                 const std::vector<int>& order = {}) {
    std::vector<DrawRow> rows;
    std::vector<PenaltyEntry> entries(entries_.size());
    int used = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      const Request& q = requests[i];
      int slot = 1 + (order.empty() ? static_cast<int>(i) : order[i]);
      rows.push_back(to_draw_row(sample_row(q, slot), entries, used, counts_));
      rows.back().draw = q.draw;
    }
    EXPECT_TRUE(std::all_of(counts_.begin(), counts_.end(), [](int32_t n) { return n == 0; }));
    std::vector<DrawResult> results(requests.size());
    std::memset(results.data(), 0x55, results.size() * sizeof(DrawResult));
    last_token.assign(static_cast<size_t>(rows_) + 1, kUntouched);
    upload(device_logits_, logits);
    upload(rows_buffer_, rows);
    upload(entries_, entries);
    upload(last_token_, last_token);
    std::vector<int32_t> stale(static_cast<size_t>(rows_) + 1);
    for (size_t i = 0; i < stale.size(); ++i) stale[i] = i % 3 == 0;
    upload(stale_, stale);
    upload(results_, results);
    QWEN_MOE_CUDA(cudaDeviceSynchronize());
    sampler_.launch({stream_, device_properties(0).programmatic_launch()}, rows_buffer_.data(),
                    entries_.data(), static_cast<int>(requests.size()), device_logits_.data(),
                    stride_, stale_.data(), last_token_.data(), results_.data());
    stream_.synchronize();
    download(results, results_);
    download(last_token, last_token_);
    for (size_t i = 0; i < rows.size(); ++i)
      if (rows[i].draw && rows[i].slot != 0)
        EXPECT_EQ(results[i].stale, rows[i].slot % 3 == 0) << "row " << i;
    std::vector<float> after(logits.size());
    download(after, device_logits_);
    EXPECT_EQ(std::memcmp(after.data(), logits.data(), logits.size() * sizeof(float)), 0)
        << "a draw wrote to the logits";
    return results;
  }

  std::vector<SampleResult> host(const std::vector<Request>& requests) {
    std::vector<SampleRow> rows;
    for (size_t i = 0; i < requests.size(); ++i)
      rows.push_back(sample_row(requests[i], 1 + static_cast<int>(i)));
    std::vector<SampleResult> results(rows.size());
    cpu_.sample(rows, {logits.data(), stride_}, results);
    return results;
  }

  // Compares both, and returns how many tokens differ.
  int compare(const std::vector<Request>& requests) {
    auto got = device(requests);
    auto want = host(requests);
    int differ = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE(concat("row ", i));
      EXPECT_EQ(got[i].finite, want[i].finite ? 1 : 0);
      EXPECT_EQ(last_token[i + 1], got[i].finite ? got[i].token : kUntouched);
      EXPECT_EQ(got[i].top_count, want[i].top_count);
      EXPECT_TRUE(got[i].token >= (got[i].finite ? 0 : -1) && got[i].token < vocab_);
      if (testing::Test::HasFailure()) return differ;
      if (got[i].token == want[i].token)
        EXPECT_NEAR(got[i].logprob, want[i].logprob, 1e-5);
      else
        ++differ;
      const float* x = row(static_cast<int>(i));
      for (int n = 0; n < got[i].top_count; ++n) {
        EXPECT_NEAR(got[i].top_logprob[n], want[i].top[n].second, 1e-5);
        // The host orders rounded log-probabilities, the device logits.
        if (got[i].top_token[n] != want[i].top[n].first)
          EXPECT_NEAR(x[got[i].top_token[n]], x[want[i].top[n].first], 1e-5);
        if (n > 0) {
          int a = got[i].top_token[n - 1], b = got[i].top_token[n];
          EXPECT_TRUE(x[a] > x[b] || (x[a] == x[b] && a < b));
        }
      }
    }
    return differ;
  }

  std::vector<int32_t> last_token;

 private:
  template <class T>
  static void upload(const DeviceBuffer<T>& to, const std::vector<T>& from) {
    QWEN_MOE_CUDA(
        cudaMemcpy(to.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  template <class T>
  static void download(std::vector<T>& to, const DeviceBuffer<T>& from) {
    QWEN_MOE_CUDA(
        cudaMemcpy(to.data(), from.data(), to.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }

  int vocab_, rows_;
  int64_t stride_;
  ModelConfig config_;
  cpu::ThreadPool pool_;
  cpu::CpuOps cpu_;
  Stream stream_;
  Sampler sampler_;

 public:
  std::vector<float> logits;

 private:
  DeviceBuffer<float> device_logits_;
  DeviceBuffer<DrawRow> rows_buffer_;
  DeviceBuffer<PenaltyEntry> entries_;
  DeviceBuffer<int32_t> last_token_, stale_;
  DeviceBuffer<DrawResult> results_;
  std::vector<int32_t> counts_;
};

// Settings that draw at random, each alone and some together.
std::vector<Sampling> random_settings() {
  return {{.temperature = 1},
          {.temperature = 0.3},
          {.temperature = 2.5},
          {.temperature = 1, .top_k = 2},
          {.temperature = 1, .top_k = 20},
          {.temperature = 1, .top_k = 90},
          {.temperature = 1, .top_k = 1000},
          {.temperature = 1, .top_p = 0.1},
          {.temperature = 1, .top_p = 0.95},
          {.temperature = 1, .min_p = 0.05},
          {.temperature = 1, .min_p = 0.9},
          {.temperature = 0.6, .top_k = 20, .top_p = 0.95},
          {.temperature = 1.2, .top_k = 50, .top_p = 0.8, .min_p = 0.02},
          {.temperature = 0.9, .top_p = 0.9, .min_p = 0.01},
          {.temperature = 0.7,
           .top_k = 20,
           .top_p = 0.8,
           .repetition_penalty = 1.1,
           .presence_penalty = 1.5,
           .frequency_penalty = 0.3}};
}

// A timeline, whose second half is the reply, with repeated and with likely tokens.
void add_history(Request& q, const float* logits, int vocab, uint32_t seed, int tokens = 40) {
  std::mt19937 random(seed);
  std::vector<int32_t> likely(static_cast<size_t>(vocab));
  for (int i = 0; i < vocab; ++i) likely[static_cast<size_t>(i)] = i;
  size_t few = std::min<size_t>(10, likely.size());
  std::partial_sort(likely.begin(), likely.begin() + static_cast<std::ptrdiff_t>(few), likely.end(),
                    [&](int a, int b) { return logits[a] > logits[b]; });
  q.timeline.clear();
  for (int i = 0; i < tokens; ++i)
    q.timeline.push_back(i % 3 ? likely[random() % few] : static_cast<int>(random()) & 0x7fffffff);
  for (int32_t& t : q.timeline) t %= vocab;
  q.reply.assign(q.timeline.begin() + tokens / 2, q.timeline.end());
}

class CudaSample : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};
INSTANTIATE_TEST_SUITE_P(Vocabulary, CudaSample, testing::Values(100, 4096, 248320));

TEST_P(CudaSample, GreedyIsTheFirstOfTheLargest) {
  const int vocab = GetParam();
  for (int rows : {1, 5, 64}) {
    Rig rig(vocab, rows);
    for (float scale : {0.1f, 1.0f, 5.0f}) {
      rig.randomize(static_cast<uint32_t>(rows), scale);
      EXPECT_EQ(rig.compare(std::vector<Request>(static_cast<size_t>(rows))), 0);
    }
    // Equal maxima, also as the two zeros, at both ends and across chunks.
    for (int r = 0; r < rows; ++r) {
      float* x = rig.row(r);
      for (int i = 0; i < vocab; ++i) x[i] = -std::abs(x[i]) - 1;
      for (int i : {r % vocab, vocab / 2, vocab - 1}) x[i] = r % 2 ? (i % 2 ? 0.0f : -0.0f) : 7.0f;
    }
    EXPECT_EQ(rig.compare(std::vector<Request>(static_cast<size_t>(rows))), 0);
    Request only{.sampling = {.temperature = 1, .top_k = 1, .seed = 3}};
    EXPECT_EQ(rig.compare(std::vector<Request>(static_cast<size_t>(rows), only)), 0);
  }
}

TEST_P(CudaSample, NothingIsDrawnFromWhatIsNotFinite) {
  const int vocab = GetParam();
  Rig rig(vocab, 5);
  rig.randomize(1, 1);
  rig.row(0)[0] = kNan;
  rig.row(1)[vocab - 1] = kInf;
  rig.row(2)[vocab / 2] = -kInf;
  rig.row(3)[vocab / 2] = -kNan;
  for (double temperature : {0.0, 1.0}) {
    Request q{.sampling = {.temperature = temperature, .logprobs = 3}};
    rig.compare(std::vector<Request>(5, q));
    auto got = rig.device(std::vector<Request>(5, q));
    for (size_t i = 0; i < 5; ++i) {
      EXPECT_EQ(got[i].finite, i == 4 ? 1 : 0);
      if (i < 4) EXPECT_EQ(got[i].token, -1);
    }
  }
}

TEST_P(CudaSample, DrawsWhatTheHostDraws) {
  const int vocab = GetParam(), rows = 64;
  Rig rig(vocab, rows);
  for (float scale : {0.1f, 1.0f, 5.0f}) {
    rig.randomize(7, scale);
    int draws = 0, differ = 0;
    // Every batch mixes the settings; each meets every seed once in a large vocabulary.
    auto settings = random_settings();
    const size_t batches = vocab > 10000 ? 3 : 30;
    for (size_t batch = 0; batch < batches; ++batch) {
      std::vector<Request> requests(rows);
      for (size_t i = 0; i < requests.size(); ++i) {
        requests[i].sampling = settings[(i + batch) % settings.size()];
        requests[i].sampling.seed = 1000 * batch + i;
        add_history(requests[i], rig.row(static_cast<int>(i)), vocab, static_cast<uint32_t>(i),
                    20 + static_cast<int>(i));
      }
      differ += rig.compare(requests);
      draws += rows;
    }
    // On average fewer than one in 200; a handful of draws may be unlucky.
    EXPECT_LE(differ, draws / 200 + 2) << "scale " << scale;
  }
}

TEST_P(CudaSample, PenaltiesAreTheHosts) {
  const int vocab = GetParam();
  for (int rows : {1, 5, 64}) {
    Rig rig(vocab, rows);
    rig.randomize(11, 1);
    std::vector<Sampling> settings = {{.repetition_penalty = 1.3},
                                      {.repetition_penalty = 0.7},
                                      {.presence_penalty = 0.7},
                                      {.frequency_penalty = 0.3},
                                      {.frequency_penalty = -0.2},
                                      {.presence_penalty = 1e300},  // minus infinity
                                      {.repetition_penalty = 1.1,
                                       .presence_penalty = 0.5,
                                       .frequency_penalty = 0.1,
                                       .logprobs = 5}};
    for (size_t batch = 0; batch < settings.size(); ++batch) {
      std::vector<Request> requests(static_cast<size_t>(rows));
      for (size_t i = 0; i < requests.size(); ++i) {
        requests[i].sampling = settings[(i + batch) % settings.size()];
        add_history(requests[i], rig.row(static_cast<int>(i)), vocab, static_cast<uint32_t>(i),
                    1 + 17 * static_cast<int>(i % 10));
      }
      EXPECT_EQ(rig.compare(requests), 0);
    }
  }
}

// A token is penalised to exactly the logit of another: the smaller one wins, unless a bit differs.
TEST_P(CudaSample, PenaltiesAreTheHostsToTheBit) {
  const int vocab = GetParam(), rows = 64;
  Rig rig(vocab, rows);
  std::mt19937 random(29);
  std::uniform_real_distribution<float> uniform(-9, 9);
  const Sampling s{.repetition_penalty = 1.3, .presence_penalty = 0.7, .frequency_penalty = 0.3};
  for (int round = 0; round < 10; ++round) {
    std::vector<Request> requests(rows);
    for (int r = 0; r < rows; ++r) {
      float* x = rig.row(r);
      std::fill_n(x, vocab, -100.0f);
      const int penalised = vocab / 2, other = r % 2 ? vocab - 1 : 3, times = 1 + r % 5;
      const float logit = uniform(random), factor = 1.3f;
      x[penalised] = logit;
      x[other] = (logit > 0 ? logit / factor : logit * factor) -
                 static_cast<float>(s.frequency_penalty * times + s.presence_penalty);
      requests[static_cast<size_t>(r)].sampling = s;
      requests[static_cast<size_t>(r)].timeline.assign(static_cast<size_t>(times), penalised);
      requests[static_cast<size_t>(r)].reply = requests[static_cast<size_t>(r)].timeline;
    }
    EXPECT_EQ(rig.compare(requests), 0);
    for (int r = 0; r < rows; ++r)
      EXPECT_EQ(rig.last_token[static_cast<size_t>(r) + 1], r % 2 ? vocab / 2 : 3);
  }
}

TEST_P(CudaSample, ReportsTheLikeliest) {
  const int vocab = GetParam();
  Rig rig(vocab, 21);
  for (float scale : {0.1f, 1.0f, 5.0f}) {
    rig.randomize(13, scale);
    for (double temperature : {0.0, 0.8}) {
      std::vector<Request> requests(21);
      for (size_t i = 0; i < requests.size(); ++i) {
        requests[i].sampling = {.temperature = temperature, .top_k = 10, .seed = i};
        requests[i].sampling.logprobs = static_cast<int>(i);
      }
      EXPECT_LE(rig.compare(requests), 1);
    }
  }
}

TEST_P(CudaSample, EqualLogitsGoByToken) {
  const int vocab = GetParam();
  Rig rig(vocab, 4);
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < vocab; ++i)
      rig.row(r)[i] = r == 0 ? 2.0f : r == 1 ? static_cast<float>(i % 3) : i % 7 ? -0.0f : 0.0f;
  for (Sampling s : {Sampling{.temperature = 1}, Sampling{.temperature = 1e6},
                     Sampling{.temperature = 1, .top_k = 60}, Sampling{.temperature = 1e-60},
                     Sampling{.temperature = 1, .top_p = 0.3, .min_p = 0.5}}) {
    int differ = 0;
    for (uint64_t seed = 0; seed < 5; ++seed) {
      s.seed = seed;
      s.logprobs = 20;
      differ += rig.compare(std::vector<Request>(4, Request{.sampling = s}));
    }
    EXPECT_LE(differ, 1) << "temperature " << s.temperature << " top_k " << s.top_k;
  }
}

TEST_P(CudaSample, CompanyAndRepetitionChangeNothing) {
  const int vocab = GetParam(), rows = 64;
  Rig rig(vocab, rows);
  rig.randomize(17, 1.5f);
  auto settings = random_settings();
  std::vector<Request> requests(rows);
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].sampling = settings[i % settings.size()];
    requests[i].sampling.seed = i;
    requests[i].sampling.logprobs = static_cast<int>(i % 22) - 1;
    add_history(requests[i], rig.row(static_cast<int>(i)), vocab, static_cast<uint32_t>(i));
  }
  auto equal = [](const DrawResult& a, const DrawResult& b) {
    return std::memcmp(&a, &b, sizeof a) == 0;
  };
  auto first = rig.device(requests), second = rig.device(requests);
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(equal(first[i], second[i])) << "row " << i << " in a second run";
    EXPECT_TRUE(equal(first[i], rig.device({requests[i]}, {static_cast<int>(i)})[0]))
        << "row " << i << " alone";
  }
}

TEST_P(CudaSample, OnlyRowsThatDrawAreWritten) {
  const int vocab = GetParam();
  Rig rig(vocab, 5);
  rig.randomize(19, 1);
  std::vector<Request> requests(5);
  requests[1].draw = requests[3].draw = false;
  requests[3].sampling = {.temperature = 1, .logprobs = 4};
  auto got = rig.device(requests, {0, 1, -1, 3, 4});  // -1: the slot of padding
  for (size_t i = 0; i < 5; ++i) {
    bool writes = i == 0 || i == 4;
    EXPECT_EQ(got[i].token == 0x55555555, !writes) << "row " << i;
    EXPECT_EQ(rig.last_token[i + 1], writes ? got[i].token : kUntouched);
  }
  EXPECT_EQ(rig.last_token[0], kUntouched);
}

TEST_F(CudaSample, FrequenciesAreTheProbabilities) {
  const int vocab = 100, rows = 500, launches = 40;
  Rig rig(vocab, rows);
  rig.randomize(23, 1);
  for (int r = 1; r < rows; ++r) std::copy_n(rig.row(0), vocab, rig.row(r));
  for (const Sampling& s : {Sampling{.temperature = 1}, Sampling{.temperature = 0.7, .top_k = 10},
                            Sampling{.temperature = 1.5, .top_p = 0.6}}) {
    // The definition, on sorted tokens.
    std::vector<int> order(vocab);
    for (int i = 0; i < vocab; ++i) order[static_cast<size_t>(i)] = i;
    const float* x = rig.row(0);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
    if (s.top_k > 0) order.resize(static_cast<size_t>(s.top_k));
    std::vector<double> p;
    double total = 0, kept = 0;
    for (int token : order) p.push_back(std::exp((x[token] - x[order[0]]) / s.temperature));
    for (double w : p) total += w;
    size_t count = 0;
    while (count < p.size() && kept < s.top_p * total) kept += p[count++];

    std::vector<int> seen(vocab);
    for (int launch = 0; launch < launches; ++launch) {
      std::vector<Request> requests(rows, Request{.sampling = s});
      for (size_t i = 0; i < requests.size(); ++i) {
        requests[i].sampling.seed = i;
        requests[i].timeline.assign(static_cast<size_t>(launch), 0);
      }
      for (const DrawResult& result : rig.device(requests))
        ++seen[static_cast<size_t>(result.token)];
    }
    double chi = 0;
    int drawn = 0;
    for (size_t i = 0; i < count; ++i) {
      double expected = p[i] / kept * rows * launches;
      int n = seen[static_cast<size_t>(order[i])];
      chi += (n - expected) * (n - expected) / expected;
      drawn += n;
    }
    EXPECT_EQ(drawn, rows * launches) << "a token was drawn that is not kept";
    double freedom = static_cast<double>(count - 1);
    EXPECT_LT(chi, freedom + 6 * std::sqrt(2 * freedom));
  }
}

TEST(DrawRowTest, NamesEachTokenOnce) {
  Sampling s{.temperature = 0.5, .top_k = 4, .repetition_penalty = 1.5, .frequency_penalty = 1};
  std::vector<int32_t> timeline = {5, 2, 5, 9, 2, 2}, reply = {9, 2, 2}, counts(10);
  std::vector<PenaltyEntry> entries(8);
  int used = 4;
  const SampleRow row{
      .slot = 3, .position = 6, .sampling = &s, .timeline = timeline, .reply = reply};
  DrawRow draw = to_draw_row(row, entries, used, counts);
  EXPECT_EQ(used, 7);
  EXPECT_EQ(draw.slot, 3);
  EXPECT_EQ(draw.position, 6);
  EXPECT_EQ(draw.penalty_begin, 4);
  ASSERT_EQ(draw.penalty_count, 3);
  const int want[3][3] = {{5, 2, 0}, {2, 3, 2}, {9, 1, 1}};
  for (int i = 0; i < 3; ++i) {
    const PenaltyEntry& e = entries[static_cast<size_t>(4 + i)];
    EXPECT_EQ(e.token, want[i][0]);
    EXPECT_EQ(e.in_timeline, want[i][1]);
    EXPECT_EQ(e.in_reply, want[i][2]);
  }
  EXPECT_EQ(counts, std::vector<int32_t>(10));
  EXPECT_THROW(to_draw_row(row, entries, used, counts), Capacity);
  EXPECT_EQ(used, 7);
  EXPECT_EQ(counts, std::vector<int32_t>(10));
  s.repetition_penalty = 1;
  s.frequency_penalty = 0;
  EXPECT_EQ(to_draw_row(row, entries, used, counts).penalty_count, 0);
}

}  // namespace
}  // namespace qwen_moe::cuda
