// Prefill through compiled kernels against decode, token by token. The images come from
// `python -m qwen_moe.kernels --arch 90 --out DIR`; QWEN_MOE_KERNEL_IMAGES names DIR.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <regex>
#include <sstream>

#include "cuda/prefill.h"
#include "engine/backend.h"
#include "model/forward.h"
#include "model/model.h"
#include "shapes.h"

namespace qwen_moe {
namespace {

using cuda::bf16;
using cuda::DeviceBuffer;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// As kernels/images.py writes them; enough of JSON for that.
std::vector<KernelImage> read_images(const std::string& folder) {
  const std::string manifest = read_file(folder + "/manifest.json");
  std::vector<KernelImage> images;
  const std::string begin = "\"name\": \"";
  for (size_t at = manifest.find(begin); at != std::string::npos;) {
    const size_t next = manifest.find(begin, at + 1);
    const std::string entry = manifest.substr(at, next == std::string::npos ? next : next - at);
    auto field = [&](const char* name) {
      std::smatch found;
      std::regex_search(entry, found, std::regex(concat("\"", name, "\": \"?([^\",\\s]+)")));
      return found[1].str();
    };
    KernelImage image{.name = field("name"),
                      .symbol = field("symbol"),
                      .shared = std::stoi(field("shared")),
                      .warps = std::stoi(field("warps")),
                      .scratch = std::stoi(field("scratch")),
                      .overlaps = field("overlaps") == "true"};
    image.code = read_file(folder + "/" + image.name + ".cubin");
    const std::regex item("\\[\\s*\"(\\w+)\",\\s*(\"[^\"]+\"|-?\\d+)\\s*\\]");
    for (std::sregex_iterator i(entry.begin(), entry.end(), item), end; i != end; ++i) {
      const std::string value = (*i)[2];
      if (value[0] == '"')
        image.params.emplace_back((*i)[1], value.substr(1, value.size() - 2));
      else
        image.constants.emplace_back((*i)[1], std::stoi(value));
    }
    images.push_back(std::move(image));
    at = next;
  }
  return images;
}

constexpr Shapes kShapes[] = {{"Tiny", 256, 2, 1, 1, 2, 8, 2, 128, 64},
                              {"Model35b", 2048, 16, 2, 16, 32, 16, 8, 512, 64}};

// What a run leaves.
struct Left {
  std::vector<float> hidden, conv, recurrent;
  bool operator==(const Left&) const = default;
};

class PrefillTest : public testing::TestWithParam<std::tuple<Shapes, Recipe>> {
 protected:
  static constexpr int kMost = 512;

  // Filled once for all tests of a shape and a recipe.
  static std::shared_ptr<Model> model_of(const Shapes& shapes, Recipe recipe) {
    static std::map<std::pair<std::string, Recipe>, std::shared_ptr<Model>> made;
    std::shared_ptr<Model>& model = made[{shapes.name, recipe}];
    if (model) return model;
    model = std::make_shared<Model>(config_of(shapes), recipe, DType::bf16,
                                    concat("prefill ", shapes.name, recipe_name(recipe)),
                                    std::vector{make_cuda_weight_home(0, make_cpu_weight_home(8))},
                                    std::vector<int>{});
    std::mt19937 random(1);
    for (const Model::Entry& e : model->entries()) {
      const TensorSlot& slot = e.tensor->slot();
      float scale = slot.kind == TensorKind::matrix
                        ? 1.7f / std::sqrt(static_cast<float>(slot.spec.k))
                        : 0.5f;
      std::uniform_real_distribution<float> uniform(-scale, scale);
      std::vector<float> values(static_cast<size_t>(num_elements(slot.shape)));
      for (float& v : values) v = __bfloat162float(__float2bfloat16(uniform(random)));
      model->put(slot.fqn, values.data(), values.size() * 4, DType::f32, 0);
    }
    return model;
  }

  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    const char* folder = std::getenv("QWEN_MOE_KERNEL_IMAGES");
    if (folder == nullptr) GTEST_SKIP() << "QWEN_MOE_KERNEL_IMAGES does not name a folder";
    images = std::make_unique<cuda::Images>(read_images(folder));
    auto [shapes, recipe] = GetParam();
    c = config_of(shapes);
    model = model_of(shapes, recipe);
    weights = model->shard(0);
    weights.first = false;
    stream.emplace();
    const cuda::DeviceProperties properties = cuda::device_properties(0);
    decode = std::make_unique<cuda::CudaOps>(c, properties, 1, kMost);
    prefill = std::make_unique<cuda::PrefillOps>(c, properties, *images, *decode, kMost);

    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    input.resize(static_cast<size_t>(kMost) * static_cast<size_t>(c.hidden_size));
    for (float& x : input) x = normal(random);
    std::vector<int32_t> host_position, host_pages;
    for (int i = 0; i < kMost; ++i) host_position.push_back(i);
    for (int i = 0; i < kMost / kPageTokens; ++i) host_pages.push_back(kMost / kPageTokens - i);
    position = to_device(host_position);
    pages = to_device(host_pages);
    slot = to_device(std::vector<int32_t>(kMost, 1));
  }

  // Runs `body` over an empty session; it gets the layers' state and the residual stream.
  Left run(int rows, const std::function<void(const std::vector<LayerState>&, float*)>& body) {
    auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const int64_t window = 3 * c.conv_dim();
    const int64_t matrix =
        int64_t{c.linear_num_value_heads} * c.linear_key_head_dim * c.linear_value_head_dim;
    const int64_t page_bytes = int64_t{4} * c.kv_dim() * kPageTokens;
    DeviceBuffer<float> conv(size(2 * window)), recurrent(size(2 * matrix));
    DeviceBuffer<std::byte> kv(size(page_bytes * (kMost / kPageTokens + 1)));
    QWEN_MOE_CUDA(cudaMemset(conv.data(), 0, conv.bytes()));
    QWEN_MOE_CUDA(cudaMemset(recurrent.data(), 0, recurrent.bytes()));
    QWEN_MOE_CUDA(cudaMemset(kv.data(), 0xff, kv.bytes()));  // NaN
    std::vector<LayerState> state(2);
    state[0].conv_state = {conv.data(), window};
    state[0].recurrent_state = {recurrent.data(), matrix};
    state[1].kv = {kv.data(), page_bytes, DType::bf16};
    auto hidden = to_device(std::vector<float>(
        input.begin(), input.begin() + static_cast<std::ptrdiff_t>(rows) * c.hidden_size));
    QWEN_MOE_CUDA(cudaDeviceSynchronize());
    body(state, hidden.data());
    QWEN_MOE_CUDA(cudaDeviceSynchronize());
    return {to_host(hidden), to_host(conv), to_host(recurrent)};
  }

  StepRows rows_from(int first, int rows) const {
    return {rows, nullptr, position.data() + first, slot.data() + first, pages.data(), 0};
  }

  Left prefilled(const std::vector<int>& pieces) {
    int rows = 0;
    for (int piece : pieces) rows += piece;
    return run(rows, [&](const std::vector<LayerState>& state, float* hidden) {
      int first = 0;
      for (int piece : pieces) {
        prefill->begin(*stream, {.rows = piece, .position = first, .slot = 1});
        Buffers<float, bf16> buffers{.hidden = hidden + int64_t{first} * c.hidden_size};
        forward_layers(*prefill, weights, state, buffers, rows_from(first, piece), Phase::prefill);
        first += piece;
      }
    });
  }

  Left decoded(int rows) {
    auto size = [](int n) { return static_cast<size_t>(n); };
    const int stride = (std::max(c.conv_dim() + c.value_dim() + 2 * c.linear_num_value_heads,
                                 2 * (c.attention_dim() + c.kv_dim())) +
                        15) /
                       16 * 16;
    DeviceBuffer<float> proj(size(stride)), router(size(c.num_experts)), scale(1);
    DeviceBuffer<cuda::Input> core(size(std::max(c.value_dim(), c.attention_dim()))),
        normed(size(c.hidden_size)), shared(size(c.shared_expert_intermediate_size)),
        routed(size(c.num_experts_per_tok * c.moe_intermediate_size));
    return run(rows, [&](const std::vector<LayerState>& state, float* hidden) {
      decode->begin({*stream, false, 1});
      for (int i = 0; i < rows; ++i) {
        Buffers<float, cuda::Input> buffers{.hidden = hidden + int64_t{i} * c.hidden_size,
                                            .proj = proj.data(),
                                            .proj_stride = stride,
                                            .core = core.data(),
                                            .normed = normed.data(),
                                            .router = router.data(),
                                            .shared_scale = scale.data(),
                                            .shared = shared.data(),
                                            .routed = routed.data()};
        forward_layers(*decode, weights, state, buffers, rows_from(i, 1), Phase::decode);
      }
    });
  }

  ModelConfig c;
  std::unique_ptr<cuda::Images> images;
  std::shared_ptr<Model> model;
  ShardWeights weights;
  std::optional<cuda::Stream> stream;
  std::unique_ptr<cuda::CudaOps> decode;
  std::unique_ptr<cuda::PrefillOps> prefill;
  std::vector<float> input;
  DeviceBuffer<int32_t> position, pages, slot;
};

TEST_P(PrefillTest, LeavesWhatDecodeLeaves) {
  for (int rows : {1, 2, 31, 63, 64, 65, 129, 300}) {
    SCOPED_TRACE(rows);
    const Left expected = decoded(rows), got = prefilled({rows});
    // Weights and what lies between phases round to bf16, and to fp16 in decode. Where two
    // experts are about equally likely, the pick may differ: that row is then another.
    EXPECT_LT(relative_error(got.conv, expected.conv), 1e-2);
    EXPECT_LT(relative_error(got.recurrent, expected.recurrent), 2e-2);
    EXPECT_LT(relative_error(got.hidden, expected.hidden), 8e-2);
  }
}

TEST_P(PrefillTest, PiecesThatEndOnChunksGiveTheSameBits) {
  const Left whole = prefilled({300});
  EXPECT_TRUE(prefilled({300}) == whole);
  EXPECT_TRUE(prefilled({64, 236}) == whole);
  EXPECT_TRUE(prefilled({64, 64, 128, 44}) == whole);
}

TEST_P(PrefillTest, OtherPiecesGiveTheSameWithinATolerance) {
  const Left whole = prefilled({300}), pieces = prefilled({70, 1, 100, 129});
  EXPECT_LT(relative_error(pieces.conv, whole.conv), 1e-2);
  EXPECT_LT(relative_error(pieces.recurrent, whole.recurrent), 2e-2);
  EXPECT_LT(relative_error(pieces.hidden, whole.hidden), 8e-2);
}

INSTANTIATE_TEST_SUITE_P(, PrefillTest,
                         testing::Combine(testing::ValuesIn(kShapes),
                                          testing::Values(Recipe::none, Recipe::int8, Recipe::int4,
                                                          Recipe::int4_all)),
                         [](const auto& info) {
                           std::string name = std::get<0>(info.param).name;
                           return concat(name, static_cast<int>(std::get<1>(info.param)));
                         });

}  // namespace
}  // namespace qwen_moe
