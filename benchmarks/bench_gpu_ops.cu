// What every phase of a decode step takes at the shapes of Qwen3.5-35B-A3B with random weights: one
// op in a graph over all layers, so that its weights are cold, then the whole step and the draw.
// Bytes are those that must move: weights of the experts that are taken, state both ways.
//   bench_gpu_ops [--recipe int4|int8|int4_all|none] [--rows 1,2,8] [--context N] [--others N]
//                 [--only OP] [--json FILE]
// The first row has `context` tokens, and so have the others where nothing else is said.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/graph.h"
#include "cuda/ops.h"
#include "cuda/sample.h"
#include "engine/backend.h"
#include "gpu_timing.h"
#include "model/forward.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kReplays = 15;

ModelConfig config_35b() {
  ModelConfig c{.vocab_size = 248320,
                .hidden_size = 2048,
                .num_hidden_layers = 40,
                .layer_types = {},
                .num_attention_heads = 16,
                .num_key_value_heads = 2,
                .head_dim = 256,
                .rope_theta = 1e7,
                .partial_rotary_factor = 0.25,
                .linear_num_key_heads = 16,
                .linear_num_value_heads = 32,
                .linear_key_head_dim = 128,
                .linear_value_head_dim = 128,
                .linear_conv_kernel_dim = 4,
                .num_experts = 256,
                .num_experts_per_tok = 8,
                .moe_intermediate_size = 512,
                .shared_expert_intermediate_size = 512,
                .rms_norm_eps = 1e-6,
                .max_position_embeddings = 262144};
  for (int i = 0; i < c.num_hidden_layers; ++i)
    c.layer_types.push_back(i % 4 == 3 ? LayerType::full_attention : LayerType::linear_attention);
  return c;
}

template <class T>
DeviceBuffer<T> to_device(const std::vector<T>& host) {
  DeviceBuffer<T> buffer(host.size());
  QWEN_MOE_CUDA(cudaMemcpy(buffer.data(), host.data(), buffer.bytes(), cudaMemcpyDefault));
  return buffer;
}

DeviceBuffer<float> normal_floats(size_t count, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return to_device(values);
}

struct Figure {
  std::string op;
  int rows, count;  // launches of it in a step
  double us, bytes;
};

class Bench {
 public:
  Bench(Recipe recipe, int max_rows, int context, int others, std::string only)
      : c_(config_35b()),
        only_(std::move(only)),
        max_rows_(max_rows),
        context_(context),
        others_(others),
        pages_stride_((context + kPageTokens - 1) / kPageTokens),
        properties_(device_properties(0)),
        model_(c_, recipe, DType::bf16, "bench",
               {make_cuda_weight_home(0, make_cpu_weight_home(16))}, {}),
        ops_(c_, properties_, max_rows, context),
        sampler_(c_.vocab_size, max_rows, properties_) {
    for (const Model::Entry& e : model_.entries())
      model_.fill_random(e.tensor->slot().fqn, std::hash<std::string>{}(e.tensor->slot().fqn));
    weights_ = model_.shard(0);
    // One norm for all: an op by itself finds its rows weighed, as it does in a step.
    alone_ = weights_;
    for (LayerWeights& w : alone_.layers)
      w.input_layernorm = w.post_attention_layernorm = weights_.norm;
    auto rows = static_cast<size_t>(max_rows);
    auto width = [&](int n) { return rows * static_cast<size_t>(n); };
    // Slots and pages of every row and layer, as in the engine: state is cold as well.
    size_t slot_floats = static_cast<size_t>(c_.linear_num_value_heads) * 128 * 128;
    size_t conv_floats = static_cast<size_t>(3 * c_.conv_dim());
    size_t page_bytes = static_cast<size_t>(2 * c_.num_key_value_heads * kPageTokens * 256 * 2);
    size_t pages = rows * static_cast<size_t>(pages_stride_) + 1;
    for (LayerType type : c_.layer_types) {
      LayerState state;
      if (type == LayerType::linear_attention) {
        floats_.push_back(zeros<float>((rows + 1) * slot_floats));
        state.recurrent_state = {floats_.back().data(), static_cast<int64_t>(slot_floats)};
        floats_.push_back(zeros<float>((rows + 1) * conv_floats));
        state.conv_state = {floats_.back().data(), static_cast<int64_t>(conv_floats)};
      } else {
        kv_.push_back(zeros<std::byte>(pages * page_bytes));
        state.kv = {kv_.back().data(), static_cast<int64_t>(page_bytes), DType::bf16};
      }
      state_.push_back(state);
    }
    auto scratch = [&](size_t count, float scale) {
      floats_.push_back(normal_floats(count, scale, static_cast<unsigned>(floats_.size())));
      return floats_.back().data();
    };
    auto halves = [&](size_t count) {
      halves_.push_back(zeros<Input>(count));
      return halves_.back().data();
    };
    int proj = std::max(c_.conv_dim() + c_.value_dim() + 2 * c_.linear_num_value_heads,
                        2 * c_.attention_dim() + 2 * c_.kv_dim());
    b_.hidden = scratch(width(c_.hidden_size), 1);
    b_.proj = scratch(width(proj), 1);
    b_.proj_stride = proj;
    b_.core = halves(width(std::max(c_.value_dim(), c_.attention_dim())));
    b_.router = scratch(width(c_.num_experts), 1);
    b_.shared_scale = scratch(rows, 1);
    b_.shared = halves(width(c_.shared_expert_intermediate_size));
    b_.routed = halves(width(c_.num_experts_per_tok * c_.moe_intermediate_size));
    logits_ = zeros<float>((rows + 1) * static_cast<size_t>(c_.vocab_size));

    std::vector<int32_t> token(rows), position(rows), slot(rows), page(pages - 1);
    for (size_t i = 0; i < rows; ++i) {
      token[i] = static_cast<int32_t>(i * 977 + 5);
      position[i] = (i == 0 ? context : others) - 1;
      slot[i] = static_cast<int32_t>(i + 1);
    }
    std::iota(page.begin(), page.end(), 1);
    token_ = to_device(token);
    position_ = to_device(position);
    slot_ = to_device(slot);
    page_ = to_device(page);
    std::vector<DrawRow> draw(rows);
    for (size_t i = 0; i < rows; ++i) {
      draw[i].slot = slot[i];
      draw[i].draw = 1;
    }
    greedy_ = to_device(draw);
    for (DrawRow& d : draw) d.temperature = 0.7, d.top_p = 0.8, d.top_k = 20, d.seed = 7;
    sampled_ = to_device(draw);
    last_token_ = zeros<int32_t>(rows + 1);
    stale_ = zeros<int32_t>(rows + 1);
    results_ = zeros<DrawResult>(rows);
    ceiling_ = cuda_read_bandwidth(0);
  }

  void measure(int rows) {
    StepRows r{rows, token_.data(), position_.data(), slot_.data(), page_.data(), pages_stride_};
    const Buffers<float, Input>& b = b_;
    auto bytes_of = [](std::initializer_list<const WeightView*> views) {
      double sum = 0;
      for (const WeightView* v : views) sum += static_cast<double>(v->spec.matrix_bytes());
      return sum;
    };
    const LayerWeights &delta = weights_.layers[0], &full = weights_.layers[3];
    auto over = [&](LayerType type, auto&& run) {
      return [this, type, run] {
        for (size_t i = 0; i < alone_.layers.size(); ++i)
          if (alone_.layers[i].type == type) run(alone_.layers[i], state_[i]);
      };
    };
    auto every = [&](auto&& run) {
      return [this, run] {
        for (size_t i = 0; i < alone_.layers.size(); ++i) run(alone_.layers[i], state_[i]);
      };
    };
    constexpr LayerType kDelta = LayerType::linear_attention, kFull = LayerType::full_attention;
    auto in_proj = [this, &b, r](const LayerWeights& w, const LayerState& s) {
      ops_.norm_in_proj({.proj = b.proj,
                         .proj_stride = b.proj_stride,
                         .hidden = b.hidden,
                         .layer = w,
                         .conv_state = s.conv_state,
                         .rows = r});
    };
    auto out_proj = [this, &b, r](const LayerWeights& w, const LayerState&) {
      ops_.out_proj_residual({.hidden = b.hidden,
                              .core = b.core,
                              .core_stride = w.out_proj.spec.k,
                              .weight = w.out_proj,
                              .rows = r.rows,
                              .next_norm = weights_.norm});
    };
    auto delta_step = [this, &b, r](const LayerWeights& w, const LayerState& s) {
      ops_.gated_delta_step({.core = b.core,
                             .core_stride = w.out_proj.spec.k,
                             .proj = b.proj,
                             .proj_stride = b.proj_stride,
                             .conv_state = s.conv_state,
                             .recurrent_state = s.recurrent_state,
                             .layer = w,
                             .rows = r});
    };
    auto attention = [this, &b, r](const LayerWeights& w, const LayerState& s) {
      ops_.attention_step({.core = b.core,
                           .core_stride = w.out_proj.spec.k,
                           .proj = b.proj,
                           .proj_stride = b.proj_stride,
                           .kv = s.kv,
                           .layer = w,
                           .rows = r});
    };
    auto router_shared = [this, &b, r](const LayerWeights& w, const LayerState&) {
      ops_.norm_router_shared({.router = b.router,
                               .shared_scale = b.shared_scale,
                               .shared = b.shared,
                               .hidden = b.hidden,
                               .layer = w,
                               .rows = r.rows});
    };
    double n = rows;
    time("in_proj, delta", rows, 30, 30,
         bytes_of({&delta.in_proj_qkv, &delta.in_proj_z, &delta.in_proj_b, &delta.in_proj_a}),
         over(kDelta, in_proj));
    time("in_proj, attention", rows, 10, 10, bytes_of({&full.q_proj, &full.k_proj, &full.v_proj}),
         over(kFull, in_proj));
    time("delta step", rows, 30, 30, n * 32 * 128 * 128 * 8, over(kDelta, delta_step));
    double tokens = context_ + (n - 1) * others_;
    time("attention", rows, 10, 10, tokens * c_.num_key_value_heads * 256 * 4,
         over(kFull, attention));
    time("out_proj", rows, 40, 40, bytes_of({&delta.out_proj}), every(out_proj));
    time("router and shared", rows, 40, 40,
         bytes_of({&delta.gate, &delta.shared_expert_gate, &delta.shared_gate, &delta.shared_up}),
         every(router_shared));
    // From here on the router's logits are random numbers.
    DeviceBuffer<float> router = normal_floats(static_cast<size_t>(rows * c_.num_experts), 1, 11);
    const float* logits = router.data();
    double experts = experts_taken(router, rows);
    auto gate_up = [this, &b, r, logits](const LayerWeights& w, const LayerState&) {
      ops_.routed_gate_up({.routed = b.routed, .router = logits, .layer = w, .rows = r});
    };
    auto down = [this, &b, r, logits](const LayerWeights& w, const LayerState&) {
      ops_.down_combine_residual({.hidden = b.hidden,
                                  .routed = b.routed,
                                  .router = logits,
                                  .shared_scale = b.shared_scale,
                                  .shared = b.shared,
                                  .layer = w,
                                  .rows = r,
                                  .next_norm = weights_.norm});
    };
    ops_.begin(launcher());
    gate_up(delta, state_[0]);  // makes the plan that `down` reads
    time("gate/up", rows, 40, 40, experts * bytes_of({&delta.experts_gate_up}), every(gate_up));
    time("down", rows, 40, 40,
         experts * bytes_of({&delta.experts_down}) + bytes_of({&delta.shared_down}), every(down));
    auto head = [this, &b, r] {
      ops_.lm_head({.logits = {logits_.data(), c_.vocab_size},
                    .hidden = b.hidden,
                    .norm = weights_.norm,
                    .lm_head = weights_.lm_head,
                    .slot = r.slot,
                    .rows = r.rows});
    };
    constexpr int kHeads = 4;  // the first has the norm to itself
    time("lm_head", rows, 1, kHeads, bytes_of({&weights_.lm_head}), [head] {
      for (int i = 0; i < kHeads; ++i) head();
    });
    for (bool greedy : {true, false})
      time(greedy ? "draw, greedy" : "draw, top-k and top-p", rows, 1, 1, n * c_.vocab_size * 4,
           [this, rows, greedy] {
             sampler_.launch(launcher(), greedy ? greedy_.data() : sampled_.data(), nullptr, rows,
                             logits_.data(), c_.vocab_size, stale_.data(), last_token_.data(),
                             results_.data());
           });
    double all = 0;
    for (const Figure& f : figures_)
      if (f.rows == rows && f.op.find("draw") == std::string::npos) all += f.bytes * f.count;
    // What follows each other in a step; the sum of single ops leaves out how well they overlap.
    auto chain = [](auto first, auto second, auto third) {
      return [=](const LayerWeights& w, const LayerState& s) {
        first(w, s);
        second(w, s);
        third(w, s);
      };
    };
    auto bytes_in = [this, rows](std::initializer_list<const char*> ops) {
      double sum = 0;
      for (const Figure& f : figures_)
        if (f.rows == rows && std::find(ops.begin(), ops.end(), f.op) != ops.end()) sum += f.bytes;
      return sum;
    };
    time("delta mixer", rows, 0, 30, bytes_in({"in_proj, delta", "delta step", "out_proj"}),
         over(kDelta, chain(in_proj, delta_step, out_proj)));
    time("attention mixer", rows, 0, 10, bytes_in({"in_proj, attention", "attention", "out_proj"}),
         over(kFull, chain(in_proj, attention, out_proj)));
    time("experts", rows, 0, 40, bytes_in({"router and shared", "gate/up", "down"}),
         every(chain(router_shared, gate_up, down)));
    time("layers and lm_head", rows, 1, 1, all, [this, &b, r, head] {
      forward_layers(ops_, weights_, state_, b, r, Phase::decode);
      head();
    });
  }

  bool write(const char* path) const {
    std::ofstream file(path);
    cudaDeviceProp device{};
    QWEN_MOE_CUDA(cudaGetDeviceProperties(&device, 0));
    file << "{\"device\": \"" << device.name << "\", \"context\": " << context_
         << ", \"read_gb_per_s\": " << ceiling_ * 1e-9 << ", \"figures\": [";
    for (size_t i = 0; i < figures_.size(); ++i) {
      const Figure& f = figures_[i];
      file << (i ? "," : "") << "\n {\"op\": \"" << f.op << "\", \"rows\": " << f.rows
           << ", \"us\": " << f.us << ", \"bytes\": " << f.bytes
           << ", \"share\": " << f.bytes / (f.us * 1e-6) / ceiling_ << "}";
    }
    file << "\n]}\n";
    return file.good();
  }

  double ceiling() const { return ceiling_; }

 private:
  template <class T>
  static DeviceBuffer<T> zeros(size_t count) {
    DeviceBuffer<T> buffer(count);
    QWEN_MOE_CUDA(cudaMemset(buffer.data(), 0, buffer.bytes()));
    return buffer;
  }

  Launcher launcher() const { return {stream_, properties_.programmatic_launch(), 1}; }

  // Distinct experts among the top_k of every row.
  double experts_taken(const DeviceBuffer<float>& router, int rows) const {
    std::vector<float> host(router.size());
    QWEN_MOE_CUDA(cudaMemcpy(host.data(), router.data(), router.bytes(), cudaMemcpyDefault));
    std::set<int> taken;
    for (int r = 0; r < rows; ++r) {
      std::vector<int> order(static_cast<size_t>(c_.num_experts));
      std::iota(order.begin(), order.end(), 0);
      const float* logits = host.data() + r * c_.num_experts;
      std::partial_sort(order.begin(), order.begin() + c_.num_experts_per_tok, order.end(),
                        [&](int a, int b) { return logits[a] > logits[b]; });
      taken.insert(order.begin(), order.begin() + c_.num_experts_per_tok);
    }
    return static_cast<double>(taken.size());
  }

  void time(const char* op, int rows, int count, int launches, double bytes,
            const std::function<void()>& run) {
    if (std::string(op).find(only_) == std::string::npos) return;
    Graph graph(stream_, [&] {
      ops_.begin(launcher());
      run();
    });
    std::vector<float> times;
    for (int i = 0; i < kReplays; ++i) {
      times.push_back(stopwatch_(stream_, [&] { graph.replay(stream_); }));
    }
    double us = median(times) * 1e3 / launches;
    figures_.push_back({op, rows, count, us, bytes});
    std::printf("%5d  %-22s %9.2f us %9.2f MB %7.0f GB/s %5.0f %%\n", rows, op, us, bytes * 1e-6,
                bytes / us * 1e-3, 100 * bytes / (us * 1e-6) / ceiling_);
    std::fflush(stdout);
  }

  ModelConfig c_;
  std::string only_;  // measure the ops with this in their name
  int max_rows_, context_, others_;
  int64_t pages_stride_;
  DeviceProperties properties_;
  Stream stream_;
  Stopwatch stopwatch_;
  Model model_;
  CudaOps ops_;
  Sampler sampler_;
  ShardWeights weights_, alone_;
  std::vector<LayerState> state_;
  std::vector<DeviceBuffer<float>> floats_;
  std::vector<DeviceBuffer<Input>> halves_;
  std::vector<DeviceBuffer<std::byte>> kv_;
  Buffers<float, Input> b_;
  DeviceBuffer<float> logits_;
  DeviceBuffer<int32_t> token_, position_, slot_, page_, last_token_, stale_;
  DeviceBuffer<DrawRow> greedy_, sampled_;
  DeviceBuffer<DrawResult> results_;
  double ceiling_ = 0;
  std::vector<Figure> figures_;
};

int run(int argc, char** argv) {
  Recipe recipe = Recipe::int4;
  std::vector<int> rows{1, 2, 4, 8, 16, 32, 64};
  int context = 512, others = 0;
  const char* json = nullptr;
  std::string only;
  for (int i = 1; i < argc; i += 2) {
    std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--recipe") {
      recipe = value == "none"       ? Recipe::none
               : value == "int8"     ? Recipe::int8
               : value == "int4_all" ? Recipe::int4_all
                                     : Recipe::int4;
    } else if (name == "--rows") {
      rows.clear();
      std::stringstream list(value);
      for (std::string one; std::getline(list, one, ',');) rows.push_back(std::stoi(one));
    } else if (name == "--context") {
      context = std::stoi(value);
    } else if (name == "--others") {
      others = std::stoi(value);
    } else if (name == "--only") {
      only = value;
    } else if (name == "--json" && i + 1 < argc) {
      json = argv[i + 1];
    } else {
      throw InvalidArgument(concat(
          "usage: ", argv[0],
          " [--recipe R] [--rows 1,2] [--context N] [--others N] [--only OP] [--json FILE]"));
    }
  }
  require(others <= context, "--others must be at most --context");
  Bench bench(recipe, *std::max_element(rows.begin(), rows.end()), context,
              others > 0 ? others : context, only);
  std::printf("plain read %.0f GB/s, context %d\n", bench.ceiling() * 1e-9, context);
  for (int r : rows) bench.measure(r);
  return !json || bench.write(json) ? 0 : 1;
}

}  // namespace
}  // namespace qwen_moe::cuda

int main(int argc, char** argv) {
  return qwen_moe::cuda::run_program(argc, argv, qwen_moe::cuda::run);
}
