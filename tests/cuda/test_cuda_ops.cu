// Projections and experts on the GPU against the CPU backend's, on shapes from one table.
#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <random>

#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cuda/ops.h"
#include "engine/backend.h"
#include "model/model.h"
#include "shapes.h"

namespace qwen_moe {
namespace {

using cuda::DeviceBuffer;
using cuda::Input;

constexpr Shapes kShapes[] = {{"Tiny", 256, 2, 1, 1, 2, 8, 2, 128, 500},
                              {"Model35b", 2048, 16, 2, 16, 32, 32, 8, 512, 5000},
                              {"Model122b", 3072, 32, 2, 16, 64, 16, 8, 1024, 1000},
                              {"Model397b", 4096, 32, 2, 16, 64, 320, 10, 64, 1000}};

std::vector<float> floats(const std::vector<Input>& values) {
  std::vector<float> out;
  for (Input v : values) out.push_back(cuda::from_input(v));
  return out;
}

constexpr double kTolerance = 5e-4;  // activations are rounded to fp16 once

// The same random weights on both devices, and one set of inputs for 64 rows.
class CudaOpsTest : public testing::TestWithParam<std::tuple<Shapes, Recipe>> {
 protected:
  static constexpr int kRows = 64;

  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    own_stream.emplace();
    auto [shapes, recipe] = GetParam();
    c = config_of(shapes);
    // Made once for all tests of these shapes and this recipe.
    static std::map<std::pair<std::string, Recipe>, std::array<std::shared_ptr<Model>, 2>> made;
    auto& [known_cpu, known_gpu] = made[{shapes.name, recipe}];
    if (!known_cpu) make_models(recipe, known_cpu, known_gpu);
    cpu_model = known_cpu;
    gpu_model = known_gpu;
    cpu_weights = cpu_model->shard(0);
    gpu_weights = gpu_model->shard(0);
    cpu_ops = std::make_unique<cpu::CpuOps>(c, *pool, kRows, 256);
    properties = cuda::device_properties(0);
    gpu_ops = std::make_unique<cuda::CudaOps>(c, properties, kRows, 256);

    hidden = random_floats(kRows * c.hidden_size, 1.0f, 1);
    for (int i = 0; i < kRows; ++i) {
      token.push_back(i * 7 % c.vocab_size);
      position.push_back(i);
      slot.push_back(kRows - i);
      pages.push_back(i + 1);
    }
    d_token = to_device(token);
    d_position = to_device(position);
    d_slot = to_device(slot);
    d_pages = to_device(pages);
  }

  void make_models(Recipe recipe, std::shared_ptr<Model>& on_cpu,
                   std::shared_ptr<Model>& on_gpu) const {
    auto host = make_cpu_weight_home(16);
    const char* shapes = std::get<0>(GetParam()).name;
    auto make = [&](const char* name, std::shared_ptr<WeightHome> home) {
      return std::make_shared<Model>(c, recipe, DType::bf16, std::string(name) + shapes,
                                     std::vector{std::move(home)}, std::vector<int>{});
    };
    on_cpu = make("cpu", host);
    on_gpu = make("gpu", make_cuda_weight_home(0, host));
    for (const Model::Entry& e : on_cpu->entries()) {
      const TensorSlot& slot = e.tensor->slot();
      float scale = slot.kind == TensorKind::matrix && slot.role != WeightRole::embedding
                        ? 1.7f / std::sqrt(static_cast<float>(slot.spec.k))
                        : 0.5f;
      std::vector<float> values(static_cast<size_t>(num_elements(slot.shape)));
      uint64_t random = std::hash<std::string>{}(slot.fqn) | 1;
      for (float& v : values) {  // uniform, and exact in bf16
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        float unit = static_cast<float>(static_cast<int32_t>(random >> 32)) * 0x1.0p-31f;
        v = __bfloat162float(__float2bfloat16(scale * unit));
      }
      on_cpu->put(slot.fqn, values.data(), values.size() * 4, DType::f32, 0);
      on_gpu->put(slot.fqn, values.data(), values.size() * 4, DType::f32, 0);
    }
  }

  static std::vector<float> random_floats(int64_t count, float scale, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = normal(random);
    return values;
  }
  static std::vector<Input> random_halves(int64_t count, float scale, unsigned seed) {
    std::vector<Input> halves;
    for (float v : random_floats(count, scale, seed)) halves.push_back(cuda::input_of(v));
    return halves;
  }

  // Inputs of `rows` rows from row `first` on.
  StepRows cpu_rows(int rows, int first = 0) const {
    return {rows,
            token.data() + first,
            position.data() + first,
            slot.data() + first,
            pages.data() + first,
            1};
  }
  StepRows gpu_rows(int rows, int first = 0) const {
    return {rows,
            d_token.data() + first,
            d_position.data() + first,
            d_slot.data() + first,
            d_pages.data() + first,
            1};
  }
  void begin(bool programmatic = true) {
    // What was copied and filled on the default stream is there before the ops run on theirs.
    QWEN_MOE_CUDA(cudaDeviceSynchronize());
    gpu_ops->begin({*own_stream, programmatic && properties.programmatic_launch(), 1});
  }

  // `run(rows, first row)` gives the results of some rows; every row must have the same bits alone
  // and in any company.
  template <class Run>
  void same_in_any_company(const Run& run) {
    auto all = run(kRows, 0);
    size_t each = all.size() / kRows;
    for (int rows : {1, 2, 3, 8, 9, 16, 17, 32, 33}) {
      for (int first : {0, 5, kRows - rows}) {
        if (first + rows > kRows) continue;
        auto some = run(rows, first);
        size_t differ = 0;
        for (size_t i = 0; i < static_cast<size_t>(rows) * each; ++i)
          differ += std::memcmp(&some[i], &all[static_cast<size_t>(first) * each + i],
                                sizeof some[0]) != 0;
        EXPECT_EQ(differ, 0u) << rows << " rows from " << first;
      }
    }
  }

  ModelConfig c;
  std::shared_ptr<Model> cpu_model, gpu_model;
  ShardWeights cpu_weights, gpu_weights;
  std::shared_ptr<cpu::ThreadPool> pool = cpu::ThreadPool::shared(16);
  cuda::DeviceProperties properties;
  std::optional<cuda::Stream> own_stream;
  std::unique_ptr<cpu::CpuOps> cpu_ops;
  std::unique_ptr<cuda::CudaOps> gpu_ops;
  std::vector<float> hidden;
  std::vector<int32_t> token, position, slot, pages;
  DeviceBuffer<int32_t> d_token, d_position, d_slot, d_pages;
};

TEST(CudaInput, KeepsWhatFitsAndTellsTheRest) {
  for (float x : {0.0f, -1.0f, 0.02f, 3e-3f, 1234.5f, -4.1e6f})
    EXPECT_NEAR(cuda::from_input(cuda::input_of(x)), x, std::abs(x) / 2048 + 2e-6f) << x;
  for (float sign : {1.0f, -1.0f}) {
    EXPECT_EQ(cuda::from_input(cuda::input_of(sign * 1e9f)), sign * 64 * 65504);
    EXPECT_EQ(cuda::from_input(cuda::input_of(sign * INFINITY)), sign * 64 * 65504);
  }
  EXPECT_TRUE(std::isnan(cuda::from_input(cuda::input_of(NAN))));
}

TEST_P(CudaOpsTest, Embed) {
  std::vector<float> want(hidden.size());
  StepRows rows = cpu_rows(kRows);
  cpu_ops->begin(rows);
  cpu_ops->embed({want.data(), cpu_weights.embed_tokens, rows});
  DeviceBuffer<float> got(hidden.size());
  begin();
  StepRows on_gpu = gpu_rows(kRows);
  gpu_ops->embed({got.data(), gpu_weights.embed_tokens, on_gpu});
  own_stream->synchronize();
  EXPECT_EQ(to_host(got), want);
}

TEST_P(CudaOpsTest, NormInProjOfAttention) {
  const LayerWeights &on_cpu = cpu_weights.layers[1], &on_gpu = gpu_weights.layers[1];
  int64_t width = 2 * c.attention_dim() + 2 * c.kv_dim();
  std::vector<float> want(static_cast<size_t>(kRows * width));
  StepRows rows = cpu_rows(kRows);
  cpu_ops->begin(rows);
  cpu_ops->norm_in_proj({want.data(), width, hidden.data(), on_cpu, {}, rows});
  auto d_hidden = to_device(hidden);
  auto run = [&](int count, int first) {
    DeviceBuffer<float> got(static_cast<size_t>(count * width));
    QWEN_MOE_CUDA(cudaMemset(got.data(), 0xff, got.bytes()));
    begin();
    StepRows device_rows = gpu_rows(count, first);
    gpu_ops->norm_in_proj(
        {got.data(), width, d_hidden.data() + first * c.hidden_size, on_gpu, {}, device_rows});
    own_stream->synchronize();
    return to_host(got);
  };
  EXPECT_LE(relative_error(run(kRows, 0), want), kTolerance);
  same_in_any_company(run);
}

TEST_P(CudaOpsTest, NormInProjAndConvOfDelta) {
  const LayerWeights &on_cpu = cpu_weights.layers[0], &on_gpu = gpu_weights.layers[0];
  int conv = c.conv_dim();
  int64_t width = conv + c.value_dim() + 2 * c.linear_num_value_heads;
  std::vector<float> want(static_cast<size_t>(kRows * width));
  StepRows rows = cpu_rows(kRows);
  cpu_ops->begin(rows);
  cpu_ops->norm_in_proj({want.data(), width, hidden.data(), on_cpu, {}, rows});
  auto windows = random_floats(static_cast<int64_t>(kRows + 1) * 3 * conv, 1.0f, 3);
  auto want_windows = windows;
  for (int r = 0; r < kRows; ++r) {
    float* window =
        want_windows.data() + static_cast<int64_t>(slot[static_cast<size_t>(r)]) * 3 * conv;
    float* x = want.data() + r * width;
    for (int n = 0; n < conv; ++n) {
      float y = on_cpu.conv1d[3 * conv + n] * x[n];
      for (int j = 0; j < 3; ++j) y += on_cpu.conv1d[j * conv + n] * window[j * conv + n];
      window[n] = window[conv + n];
      window[conv + n] = window[2 * conv + n];
      window[2 * conv + n] = x[n];
      x[n] = y / (1.0f + std::exp(-y));
    }
  }
  auto d_hidden = to_device(hidden);
  std::vector<float> after;
  auto run = [&](int count, int first) {
    auto d_windows = to_device(windows);
    DeviceBuffer<float> got(static_cast<size_t>(count * width));
    QWEN_MOE_CUDA(cudaMemset(got.data(), 0xff, got.bytes()));
    begin();
    StepRows device_rows = gpu_rows(count, first);
    gpu_ops->norm_in_proj({got.data(),
                           width,
                           d_hidden.data() + first * c.hidden_size,
                           on_gpu,
                           {d_windows.data(), 3 * conv},
                           device_rows});
    own_stream->synchronize();
    after = to_host(d_windows);
    return to_host(got);
  };
  EXPECT_LE(relative_error(run(kRows, 0), want), kTolerance);
  EXPECT_LE(relative_error(after, want_windows), kTolerance);
  EXPECT_TRUE(std::equal(after.begin(), after.begin() + 3 * conv, windows.begin())) << "the sink";
  same_in_any_company(run);
  run(1, 3);  // one row changes its own window only
  size_t changed = 0;
  for (int s = 0; s <= kRows; ++s) {
    auto at = static_cast<std::ptrdiff_t>(s) * 3 * conv;
    changed += !std::equal(after.begin() + at, after.begin() + at + 3 * conv, windows.begin() + at);
  }
  EXPECT_EQ(changed, 1u);
}

TEST_P(CudaOpsTest, OutProjResidual) {
  for (int layer : {0, 1}) {
    const WeightView &on_cpu = cpu_weights.layers[static_cast<size_t>(layer)].out_proj,
                     &on_gpu = gpu_weights.layers[static_cast<size_t>(layer)].out_proj;
    int k = on_cpu.spec.k;
    auto core = random_halves(static_cast<int64_t>(kRows) * k, 1.0f, 4);
    auto core_floats = floats(core);
    auto want = hidden;
    cpu_ops->begin(cpu_rows(kRows));
    cpu_ops->out_proj_residual({want.data(), core_floats.data(), k, on_cpu, kRows});
    auto d_core = to_device(core);
    auto run = [&](int count, int first) {
      auto got = to_device(std::vector(hidden.begin() + first * c.hidden_size,
                                       hidden.begin() + (first + count) * c.hidden_size));
      begin();
      gpu_ops->out_proj_residual(
          {got.data(), d_core.data() + static_cast<int64_t>(first) * k, k, on_gpu, count});
      own_stream->synchronize();
      return to_host(got);
    };
    EXPECT_LE(relative_error(run(kRows, 0), want), kTolerance);
    same_in_any_company(run);
  }
}

// What a phase leaves for the norm behind it is what the norm makes of the residual stream itself.
TEST_P(CudaOpsTest, NormsBegunAhead) {
  const LayerWeights &delta = gpu_weights.layers[0], &attention = gpu_weights.layers[1];
  auto h = static_cast<size_t>(c.hidden_size);
  auto picks = static_cast<size_t>(c.num_experts_per_tok);
  int64_t width = 2 * c.attention_dim() + 2 * c.kv_dim();
  auto core = to_device(random_halves(static_cast<int64_t>(kRows) * delta.out_proj.spec.k, 1, 4));
  for (int count : {1, 3, 8, 9, 33, 64}) {
    auto n = static_cast<size_t>(count);
    StepRows rows = gpu_rows(count);
    auto run = [&](bool ahead) {
      DeviceBuffer<float> d_hidden(n * h), router(n * static_cast<size_t>(c.num_experts)), scale(n),
          proj(n * static_cast<size_t>(width));
      DeviceBuffer<Input> shared(n * static_cast<size_t>(c.shared_expert_intermediate_size)),
          routed(n * picks * static_cast<size_t>(c.moe_intermediate_size));
      auto next = [&](const float* norm) { return ahead ? norm : nullptr; };
      begin();
      gpu_ops->embed(
          {d_hidden.data(), gpu_weights.embed_tokens, rows, next(attention.input_layernorm)});
      gpu_ops->norm_in_proj({proj.data(), width, d_hidden.data(), attention, {}, rows});
      own_stream->synchronize();
      auto first = to_host(proj);
      gpu_ops->out_proj_residual({d_hidden.data(), core.data(), delta.out_proj.spec.k,
                                  delta.out_proj, count, next(delta.post_attention_layernorm)});
      gpu_ops->norm_router_shared(
          {nullptr, router.data(), scale.data(), shared.data(), d_hidden.data(), delta, count});
      gpu_ops->routed_gate_up({routed.data(), router.data(), nullptr, delta, rows});
      gpu_ops->down_combine_residual({d_hidden.data(), routed.data(), router.data(), scale.data(),
                                      shared.data(), delta, rows, next(attention.input_layernorm)});
      gpu_ops->norm_in_proj({proj.data(), width, d_hidden.data(), attention, {}, rows});
      own_stream->synchronize();
      return std::tuple{first, to_host(router), to_host(d_hidden), to_host(proj)};
    };
    EXPECT_TRUE(run(true) == run(false)) << count << " rows";
  }
}

TEST_P(CudaOpsTest, Experts) {
  const LayerWeights &on_cpu = cpu_weights.layers[0], &on_gpu = gpu_weights.layers[0];
  auto h = static_cast<size_t>(c.hidden_size),
       s = static_cast<size_t>(c.shared_expert_intermediate_size);
  auto e = static_cast<size_t>(c.num_experts);
  size_t picks = static_cast<size_t>(c.num_experts_per_tok),
         inter = static_cast<size_t>(c.moe_intermediate_size);
  std::vector<float> normed(kRows * h), router(kRows * e), scale(kRows), shared(kRows * s),
      routed(kRows * picks * inter);
  StepRows rows = cpu_rows(kRows);
  cpu_ops->begin(rows);
  cpu_ops->norm_router_shared(
      {normed.data(), router.data(), scale.data(), shared.data(), hidden.data(), on_cpu, kRows});
  struct Got {
    std::vector<float> router, scale, shared, hidden;
  } got;
  auto run = [&](int count, int first) {
    auto n = static_cast<size_t>(count);
    DeviceBuffer<float> g_router(n * e), g_scale(n);
    DeviceBuffer<Input> g_shared(n * s), g_routed(n * picks * inter);
    auto g_hidden = to_device(std::vector(hidden.begin() + first * c.hidden_size,
                                          hidden.begin() + (first + count) * c.hidden_size));
    StepRows device_rows = gpu_rows(count, first);
    begin();
    gpu_ops->norm_router_shared({nullptr, g_router.data(), g_scale.data(), g_shared.data(),
                                 g_hidden.data(), on_gpu, count});
    own_stream->synchronize();
    got.router = to_host(g_router);
    // Both devices route by the same logits, so that a tie of bits does not count as an error.
    std::vector<float> logits(router.begin() + first * c.num_experts,
                              router.begin() + (first + count) * c.num_experts);
    QWEN_MOE_CUDA(cudaMemcpy(g_router.data(), logits.data(), g_router.bytes(), cudaMemcpyDefault));
    begin();
    gpu_ops->routed_gate_up({g_routed.data(), g_router.data(), nullptr, on_gpu, device_rows});
    gpu_ops->down_combine_residual({g_hidden.data(), g_routed.data(), g_router.data(),
                                    g_scale.data(), g_shared.data(), on_gpu, device_rows});
    own_stream->synchronize();
    got.scale = to_host(g_scale);
    got.shared = floats(to_host(g_shared));
    got.hidden = to_host(g_hidden);
    return got.hidden;
  };
  // What the experts add on the GPU for the logits in `router`, not the residual that hides it.
  auto expect_added_as_on_cpu = [&](std::initializer_list<std::pair<int, int>> first_and_count) {
    auto want = hidden;
    cpu_ops->routed_gate_up({routed.data(), router.data(), normed.data(), on_cpu, rows});
    cpu_ops->down_combine_residual(
        {want.data(), routed.data(), router.data(), scale.data(), shared.data(), on_cpu, rows});
    for (auto [first, count] : first_and_count) {
      auto added = run(count, first);
      std::vector<float> want_added(added.size());
      for (size_t i = 0; i < added.size(); ++i) {
        auto at = i + static_cast<size_t>(first) * h;
        added[i] -= hidden[at];
        want_added[i] = want[at] - hidden[at];
      }
      EXPECT_LE(relative_error(added, want_added), 2 * kTolerance)
          << count << " rows from row " << first << " on";
    }
  };
  expect_added_as_on_cpu({{0, kRows}});
  EXPECT_LE(relative_error(got.router, router), kTolerance);
  EXPECT_LE(relative_error(got.scale, scale), kTolerance);
  EXPECT_LE(relative_error(got.shared, shared), 1.5 * kTolerance);
  same_in_any_company(run);

  // Where logits are level the expert with the lowest index comes first: all alike in the first
  // row, all but one in the second, few values in the others.
  for (size_t i = 0; i < router.size(); ++i)
    router[i] = i < 2 * e ? 0.5f : std::round(2 * router[i]);
  router[2 * e - 2] = 1.0f;
  expect_added_as_on_cpu({{0, 1}, {1, 1}, {2, 1}, {3, 1}, {0, 8}, {0, kRows}});
}

// Rows of slot 0 route nowhere, and do not disturb the others.
TEST_P(CudaOpsTest, PaddingRoutesNowhere) {
  const LayerWeights& layer = gpu_weights.layers[0];
  auto e = static_cast<size_t>(c.num_experts);
  size_t picks = static_cast<size_t>(c.num_experts_per_tok),
         inter = static_cast<size_t>(c.moe_intermediate_size);
  auto d_logits = to_device(random_floats(static_cast<int64_t>(kRows * e), 1.0f, 9));
  DeviceBuffer<float> router(kRows * e);
  for (int count : {1, 8, 64}) {
    auto run = [&](bool padded) {
      std::vector<int32_t> slots = slot;
      if (padded)
        for (int i = 0; i < kRows; ++i)
          if (i % 3 == 0) slots[static_cast<size_t>(i)] = 0;
      auto d_slots = to_device(slots);
      StepRows rows = gpu_rows(count);
      rows.slot = d_slots.data();
      DeviceBuffer<Input> routed(static_cast<size_t>(count) * picks * inter),
          shared(static_cast<size_t>(count) *
                 static_cast<size_t>(c.shared_expert_intermediate_size));
      DeviceBuffer<float> scale(static_cast<size_t>(count));
      auto d_hidden = to_device(hidden);
      begin();
      gpu_ops->norm_router_shared(
          {nullptr, router.data(), scale.data(), shared.data(), d_hidden.data(), layer, count});
      gpu_ops->routed_gate_up({routed.data(), d_logits.data(), nullptr, layer, rows});
      gpu_ops->down_combine_residual({d_hidden.data(), routed.data(), d_logits.data(), scale.data(),
                                      shared.data(), layer, rows});
      own_stream->synchronize();
      return to_host(d_hidden);
    };
    auto all = run(false), some = run(true);
    for (int i = 0; i < count; ++i) {
      auto at = static_cast<std::ptrdiff_t>(i) * c.hidden_size;
      const auto& want = i % 3 == 0 ? hidden : all;
      EXPECT_TRUE(
          std::equal(some.begin() + at, some.begin() + at + c.hidden_size, want.begin() + at))
          << "row " << i << " of " << count;
      EXPECT_FALSE(
          std::equal(all.begin() + at, all.begin() + at + c.hidden_size, hidden.begin() + at));
    }
  }
}

TEST_P(CudaOpsTest, LmHead) {
  auto vocab = static_cast<size_t>(c.vocab_size);
  std::vector<float> want((kRows + 1) * vocab);
  StepRows rows = cpu_rows(kRows);
  cpu_ops->begin(rows);
  cpu_ops->lm_head({{want.data(), c.vocab_size},
                    hidden.data(),
                    cpu_weights.norm,
                    cpu_weights.lm_head,
                    slot.data(),
                    kRows});
  auto d_hidden = to_device(hidden);
  std::vector<float> whole;
  auto run = [&](int count, int first) {
    DeviceBuffer<float> got(want.size());
    QWEN_MOE_CUDA(cudaMemset(got.data(), 0, got.bytes()));
    begin(first % 2 == 0);
    gpu_ops->lm_head({{got.data(), c.vocab_size},
                      d_hidden.data() + first * c.hidden_size,
                      gpu_weights.norm,
                      gpu_weights.lm_head,
                      d_slot.data() + first,
                      count});
    own_stream->synchronize();
    whole = to_host(got);
    std::vector<float> mine;
    for (int i = first; i < first + count; ++i) {
      auto at =
          whole.begin() + static_cast<std::ptrdiff_t>(slot[static_cast<size_t>(i)]) * c.vocab_size;
      mine.insert(mine.end(), at, at + c.vocab_size);
    }
    return mine;
  };
  run(kRows, 0);
  EXPECT_LE(relative_error(whole, want), kTolerance);
  same_in_any_company(run);
}

std::string name_of(const testing::TestParamInfo<std::tuple<Shapes, Recipe>>& info) {
  std::string name =
      concat(std::get<0>(info.param).name, "_", recipe_name(std::get<1>(info.param)));
  std::erase(name, '-');
  return name;
}

INSTANTIATE_TEST_SUITE_P(EveryRecipe, CudaOpsTest,
                         testing::Combine(testing::Values(kShapes[0], kShapes[1]),
                                          testing::Values(Recipe::none, Recipe::int8, Recipe::int4,
                                                          Recipe::int4_all)),
                         name_of);
INSTANTIATE_TEST_SUITE_P(LargeModels, CudaOpsTest,
                         testing::Combine(testing::Values(kShapes[2], kShapes[3]),
                                          testing::Values(Recipe::int4)),
                         name_of);

}  // namespace
}  // namespace qwen_moe
