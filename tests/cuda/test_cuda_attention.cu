// Decode attention on the GPU against the CPU backend, and against itself in other company.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "cpu/ops.h"
#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kDim = 256;
constexpr int kMaxRows = 64;
constexpr int kMaxContext = 20001;
// The last has splits of two and of three pages.
constexpr int kPositions[] = {0, 1, 15, 62, 63, 64, 65, 127, 130, 511, 2047, 2100, 9000, 20000};
constexpr uint16_t kPoison = 0xffff;  // a NaN
constexpr int kPadding = -1;          // in a choice of rows
constexpr int kGap = 256;             // elements of other layers that a page has before this one's

struct Heads {
  int query, kv;
};
std::ostream& operator<<(std::ostream& out, const Heads& heads) {
  return out << heads.query << "_query_heads_" << heads.kv << "_kv_heads";
}

float float_of(uint16_t bits) {
  uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
uint16_t bf16_of(float value) {
  __nv_bfloat16_raw raw = __float2bfloat16_rn(value);
  return raw.x;
}
// Neighbouring bf16 values are neighbouring integers.
int order_of(uint16_t bits) { return bits & 0x8000 ? -(bits & 0x7fff) : bits; }

ModelConfig config_of(Heads heads) {
  ModelConfig c;
  c.vocab_size = 1024;
  c.hidden_size = 2048;
  c.num_hidden_layers = 1;
  c.layer_types = {LayerType::full_attention};
  c.num_attention_heads = heads.query;
  c.num_key_value_heads = heads.kv;
  c.head_dim = kDim;
  c.rope_theta = 1e7;
  c.partial_rotary_factor = 0.25;
  c.linear_num_key_heads = 16;
  c.linear_num_value_heads = 32;
  c.linear_key_head_dim = 128;
  c.linear_value_head_dim = 128;
  c.linear_conv_kernel_dim = 4;
  c.num_experts = 256;
  c.num_experts_per_tok = 8;
  c.moe_intermediate_size = 512;
  c.shared_expert_intermediate_size = 512;
  c.rms_norm_eps = 1e-6;
  c.max_position_embeddings = 262144;
  return c;
}

// 64 sessions: one at each of kPositions, then short ones. Their pages are scattered; what no token
// was written to is NaN.
struct World {
  struct Session {
    int position;
    std::vector<int32_t> pages;
  };
  ModelConfig config;
  std::vector<Session> sessions;
  int64_t proj_stride, core_stride, page_stride, max_pages = 0;  // page_stride in elements
  std::vector<float> proj;                                       // [sessions, proj_stride]
  std::vector<float> q_norm, k_norm;
  std::vector<uint16_t> kv;  // before the step

  explicit World(Heads heads) : config(config_of(heads)) {
    std::mt19937 engine(static_cast<uint32_t>(heads.query * 100 + heads.kv));
    // Wider than needed, so that a stride mistaken for a width shows.
    proj_stride = 2 * config.attention_dim() + 2 * config.kv_dim() + 64;
    core_stride = config.attention_dim() + 32;
    page_stride = 2 * config.kv_dim() * kPageTokens + kGap;

    for (int position : kPositions) sessions.push_back({position, {}});
    while (sessions.size() < kMaxRows) sessions.push_back({static_cast<int>(engine() % 300), {}});
    int64_t total = 1;  // page 0 is the sink
    for (const Session& s : sessions) total += s.position / kPageTokens + 1;
    std::vector<int32_t> free(static_cast<size_t>(total - 1));
    std::iota(free.begin(), free.end(), 1);
    std::shuffle(free.begin(), free.end(), engine);
    for (Session& s : sessions) {
      int64_t count = s.position / kPageTokens + 1;
      s.pages.assign(free.end() - count, free.end());
      free.resize(free.size() - static_cast<size_t>(count));
      max_pages = std::max(max_pages, count);
    }

    std::normal_distribution<float> normal;
    proj.resize(sessions.size() * static_cast<size_t>(proj_stride));
    for (float& x : proj) x = normal(engine);
    for (std::vector<float>* norm : {&q_norm, &k_norm}) {
      norm->resize(kDim);
      for (float& x : *norm) x = 1.0f + 0.2f * normal(engine);
    }
    std::vector<uint16_t> values(1 << 16);  // drawn once: there are many tokens to fill
    for (uint16_t& x : values) x = bf16_of(normal(engine));
    kv.assign(static_cast<size_t>(total * page_stride), kPoison);
    for (const Session& s : sessions)
      for (int token = 0; token < s.position; ++token)
        for (int part = 0; part < 2 * config.num_key_value_heads; ++part)
          std::copy_n(values.data() + engine() % (values.size() - kDim), kDim,
                      kv.data() + place(s, token, part));
  }

  // Of a token's K of head `part`, or its V of head part - kv_heads.
  size_t place(const Session& s, int token, int part) const {
    return static_cast<size_t>(s.pages[static_cast<size_t>(token / kPageTokens)] * page_stride +
                               kGap + (part * kPageTokens + token % kPageTokens) * kDim);
  }
};

// The arrays of a step over a choice of sessions.
struct Inputs {
  std::vector<int32_t> position, slot, pages;
  std::vector<float> proj;

  Inputs(const World& world, const std::vector<int>& choice)
      : pages(choice.size() * static_cast<size_t>(world.max_pages), 1 << 30) {
    for (size_t row = 0; row < choice.size(); ++row) {
      if (choice[row] == kPadding) {  // whatever it names must not be touched
        position.push_back(70);
        slot.push_back(0);
        proj.insert(proj.end(), static_cast<size_t>(world.proj_stride), NAN);
        continue;
      }
      const World::Session& session = world.sessions[static_cast<size_t>(choice[row])];
      position.push_back(session.position);
      slot.push_back(choice[row] + 1);
      std::copy(session.pages.begin(), session.pages.end(),
                pages.begin() + static_cast<int64_t>(row) * world.max_pages);
      const float* from = world.proj.data() + choice[row] * world.proj_stride;
      proj.insert(proj.end(), from, from + world.proj_stride);
    }
  }
};

struct HostResult {
  std::vector<float> core;  // [rows, core_stride]
  std::vector<uint16_t> kv;
};

HostResult run_on_host(const World& world, const std::vector<int>& choice) {
  Inputs in(world, choice);
  HostResult result{std::vector<float>(choice.size() * static_cast<size_t>(world.core_stride)),
                    world.kv};
  cpu::ThreadPool pool(2);
  cpu::CpuOps ops(world.config, pool, kMaxRows, kMaxContext);
  LayerWeights layer;
  layer.type = LayerType::full_attention;
  layer.q_norm = world.q_norm.data();
  layer.k_norm = world.k_norm.data();
  StepRows rows{.rows = static_cast<int>(choice.size()),
                .position = in.position.data(),
                .slot = in.slot.data(),
                .pages = in.pages.data(),
                .pages_stride = world.max_pages};
  ops.begin(rows);
  ops.attention_step({.core = result.core.data(),
                      .core_stride = world.core_stride,
                      .proj = in.proj.data(),
                      .proj_stride = world.proj_stride,
                      .kv = {.data = reinterpret_cast<std::byte*>(result.kv.data() + kGap),
                             .page_stride = world.page_stride * 2,
                             .dtype = DType::bf16},
                      .layer = layer,
                      .rows = rows});
  return result;
}

template <class T>
void upload(const DeviceBuffer<T>& to, const std::vector<T>& from) {
  ASSERT_LE(from.size(), to.size());
  QWEN_MOE_CUDA(
      cudaMemcpy(to.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
}
template <class T>
std::vector<T> download(const DeviceBuffer<T>& from, size_t count) {
  std::vector<T> to(count);
  QWEN_MOE_CUDA(cudaMemcpy(to.data(), from.data(), count * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

// The same step on the GPU, whose arrays stay where they are from step to step.
class Gpu {
 public:
  explicit Gpu(const World& world)
      : world_(world),
        ops_(world.config, device_properties(0), kMaxRows, kMaxContext),
        position_(kMaxRows),
        slot_(kMaxRows),
        pages_(static_cast<size_t>(kMaxRows * world.max_pages)),
        proj_(static_cast<size_t>(kMaxRows * world.proj_stride)),
        norms_(2 * kDim),
        core_(static_cast<size_t>(kMaxRows * world.core_stride)),
        kv_(world.kv.size()) {
    std::vector<float> norms = world.q_norm;
    norms.insert(norms.end(), world.k_norm.begin(), world.k_norm.end());
    upload(norms_, norms);
  }

  // Sets everything as it is before the step; core to NaN.
  void prepare(const std::vector<int>& choice) {
    rows_ = choice.size();
    Inputs in(world_, choice);
    upload(position_, in.position);
    upload(slot_, in.slot);
    upload(pages_, in.pages);
    upload(proj_, in.proj);
    upload(core_, std::vector<uint16_t>(core_.size(), kPoison));
    upload(kv_, world_.kv);
    QWEN_MOE_CUDA(cudaDeviceSynchronize());
  }

  void launch(bool programmatic, DType dtype = DType::bf16) {
    ops_.begin({.stream = stream_, .programmatic = programmatic});
    LayerWeights layer;
    layer.type = LayerType::full_attention;
    layer.q_norm = norms_.data();
    layer.k_norm = norms_.data() + kDim;
    StepRows rows{.rows = static_cast<int>(rows_),
                  .position = position_.data(),
                  .slot = slot_.data(),
                  .pages = pages_.data(),
                  .pages_stride = world_.max_pages};
    // The first launch of a step waits for everything before it. The second time it may start
    // early; the outcome is the same.
    for (int i = 0; i < (programmatic ? 2 : 1); ++i)
      ops_.attention_step({.core = reinterpret_cast<Input*>(core_.data()),
                           .core_stride = world_.core_stride,
                           .proj = proj_.data(),
                           .proj_stride = world_.proj_stride,
                           .kv = {.data = reinterpret_cast<std::byte*>(kv_.data() + kGap),
                                  .page_stride = world_.page_stride * 2,
                                  .dtype = dtype},
                           .layer = layer,
                           .rows = rows});
  }

  // [rows, core_stride] after what was launched.
  std::vector<uint16_t> core() {
    stream_.synchronize();
    return download(core_, rows_ * static_cast<size_t>(world_.core_stride));
  }
  std::vector<uint16_t> kv() {
    stream_.synchronize();
    return download(kv_, kv_.size());
  }
  std::vector<uint16_t> run(const std::vector<int>& choice, bool programmatic) {
    prepare(choice);
    launch(programmatic);
    return core();
  }
  cudaStream_t stream() const { return stream_; }

 private:
  const World& world_;
  CudaOps ops_;
  Stream stream_;
  size_t rows_ = 0;
  DeviceBuffer<int32_t> position_, slot_, pages_;
  DeviceBuffer<float> proj_, norms_;
  DeviceBuffer<uint16_t> core_, kv_;
};

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

class CudaAttention : public testing::TestWithParam<Heads> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no GPU";
    world_.emplace(GetParam());
    gpu_ = std::make_unique<Gpu>(*world_);
    everyone_.resize(world_->sessions.size());
    std::iota(everyone_.begin(), everyone_.end(), 0);
    std::shuffle(everyone_.begin(), everyone_.end(), std::mt19937(7));
    modes_ = {false};
    if (device_properties(0).programmatic_launch()) modes_.push_back(true);
  }

  // Row `row` of a result without the gap to the next row.
  std::vector<uint16_t> row_of(const std::vector<uint16_t>& core, size_t row) const {
    auto begin = core.begin() + static_cast<int64_t>(row) * world_->core_stride;
    return {begin, begin + world_->config.attention_dim()};
  }

  std::optional<World> world_;
  std::unique_ptr<Gpu> gpu_;
  std::vector<int> everyone_;  // all sessions, in no order
  std::vector<bool> modes_;    // of launching: programmatic or not
};

TEST_P(CudaAttention, AgreesWithTheHost) {
  const World& world = *world_;
  const HostResult host = run_on_host(world, everyone_);
  for (bool programmatic : modes_) {
    const std::vector<uint16_t> core = gpu_->run(everyone_, programmatic);
    for (size_t row = 0; row < everyone_.size(); ++row) {
      const World::Session& session = world.sessions[static_cast<size_t>(everyone_[row])];
      double largest = 0, worst = 0, squares = 0, error_squares = 0;
      for (int i = 0; i < world.config.attention_dim(); ++i) {
        const size_t at = row * static_cast<size_t>(world.core_stride) + static_cast<size_t>(i);
        const double want = host.core[at], error = from_input(__ushort_as_half(core[at])) - want;
        ASSERT_TRUE(std::isfinite(error)) << "position " << session.position << ", core " << i;
        largest = std::max(largest, std::fabs(want));
        worst = std::max(worst, std::fabs(error));
        squares += want * want;
        error_squares += error * error;
      }
      EXPECT_LE(worst, 1e-2 * largest) << "position " << session.position;
      EXPECT_LE(std::sqrt(error_squares / squares), 5e-3) << "position " << session.position;
      for (int64_t i = world.config.attention_dim(); i < world.core_stride; ++i)
        ASSERT_EQ(core[row * static_cast<size_t>(world.core_stride) + static_cast<size_t>(i)],
                  kPoison)
            << "written past row " << row;
    }

    // The new token's K and V, then everything else.
    std::vector<uint16_t> on_host = host.kv, on_gpu = gpu_->kv();
    const int kv_heads = world.config.num_key_value_heads;
    for (const World::Session& session : world.sessions) {
      for (int part = 0; part < 2 * kv_heads; ++part) {
        const size_t begin = world.place(session, session.position, part);
        for (size_t at = begin; at < begin + kDim; ++at) {
          if (part >= kv_heads) {
            ASSERT_EQ(on_host[at], on_gpu[at]) << "V at position " << session.position;
          } else if (std::abs(order_of(on_host[at]) - order_of(on_gpu[at])) > 1) {
            // Next to 0 the rotation cancels, and what fp32 rounds off is many such steps.
            ASSERT_NEAR(float_of(on_host[at]), float_of(on_gpu[at]), 1e-5)
                << "K at position " << session.position;
          }
          on_host[at] = on_gpu[at] = kPoison;  // as it was
        }
      }
    }
    EXPECT_TRUE(on_host == world.kv);
    EXPECT_TRUE(on_gpu == world.kv) << "a token other than the new one was changed";
  }
}

TEST_P(CudaAttention, DoesNotDependOnTheBatch) {
  for (bool programmatic : modes_) {
    const std::vector<uint16_t> together = gpu_->run(everyone_, programmatic);
    EXPECT_TRUE(together == gpu_->run(everyone_, programmatic)) << "two runs differ";
    for (size_t row = 0; row < everyone_.size(); ++row) {
      const int session = everyone_[row];
      if (session >= static_cast<int>(std::size(kPositions))) continue;
      const auto want = row_of(together, row);
      EXPECT_TRUE(want == row_of(gpu_->run({session}, programmatic), 0))
          << "alone, position " << kPositions[session];
      const std::vector<int> few = {20, 21, 22, session, 23, 24, 25, 26};
      EXPECT_TRUE(want == row_of(gpu_->run(few, programmatic), 3))
          << "among 8, position " << kPositions[session];
    }
  }
}

TEST_P(CudaAttention, PaddingRowsTouchNothing) {
  const std::vector<int> chosen = {12, 3, 40, 11, 0};
  const std::vector<int> padded = {kPadding, 12, 3, kPadding, kPadding, 40, 11, 0, kPadding};
  for (bool programmatic : modes_) {
    const auto want = gpu_->run(chosen, programmatic);
    const auto want_kv = gpu_->kv();
    const auto core = gpu_->run(padded, programmatic);
    EXPECT_TRUE(gpu_->kv() == want_kv);
    for (size_t row = 0, next = 0; row < padded.size(); ++row) {
      const auto got = row_of(core, row);
      if (padded[row] == kPadding)
        EXPECT_TRUE(std::ranges::all_of(got, [](uint16_t x) { return x == 0; })) << "row " << row;
      else
        EXPECT_TRUE(got == row_of(want, next++)) << "row " << row;
    }
  }
}

// A step is captured once and replayed at whatever positions the arrays then hold.
TEST_P(CudaAttention, ReplaysAsAGraph) {
  std::vector<int> others(everyone_.rbegin(), everyone_.rend());
  others[5] = others[6] = kPadding;
  for (bool programmatic : modes_) {
    const auto want = gpu_->run(others, programmatic);
    const auto want_kv = gpu_->kv();

    gpu_->prepare(everyone_);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t step = nullptr;
    QWEN_MOE_CUDA(cudaStreamBeginCapture(gpu_->stream(), cudaStreamCaptureModeThreadLocal));
    gpu_->launch(programmatic);
    QWEN_MOE_CUDA(cudaStreamEndCapture(gpu_->stream(), &graph));
    QWEN_MOE_CUDA(cudaGraphInstantiate(&step, graph, 0));
    gpu_->prepare(others);
    QWEN_MOE_CUDA(cudaGraphLaunch(step, gpu_->stream()));
    EXPECT_TRUE(gpu_->core() == want);
    EXPECT_TRUE(gpu_->kv() == want_kv);
    QWEN_MOE_CUDA(cudaGraphExecDestroy(step));
    QWEN_MOE_CUDA(cudaGraphDestroy(graph));
  }
}

TEST_P(CudaAttention, RefusesOtherElementTypes) {
  gpu_->prepare({0});
  EXPECT_THROW(gpu_->launch(false, DType::f32), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaAttention,
                         testing::Values(Heads{16, 2}, Heads{2, 1}, Heads{32, 2}, Heads{8, 8},
                                         Heads{24, 2}),
                         testing::PrintToStringParamName());

TEST(CudaAttentionConfig, RefusesWhatTheKernelsDoNotKnow) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  ModelConfig narrow = config_of({16, 2});
  narrow.head_dim = 128;
  EXPECT_THROW(CudaOps(narrow, device_properties(0), 1, 128), InvalidArgument);
  ModelConfig wide = config_of({34, 2});
  EXPECT_THROW(CudaOps(wide, device_properties(0), 1, 128), InvalidArgument);
}

}  // namespace
}  // namespace qwen_moe::cuda
