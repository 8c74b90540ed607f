// The decode step of the gated delta rule on the GPU, against the host's ops and float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/ops.h"
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

using Floats = std::vector<float>;

constexpr int kDim = 128, kTaps = 4, kSteps = 8, kMaxRows = 64;
constexpr int kPadding = -1;  // in place of a session
constexpr uint16_t kUntouched = 0xabab;
// A NaN with a payload: arithmetic on it would leave other bits.
constexpr uint32_t kPoison = 0x7fc01234;

// A session is known by its number, wherever in a step its row stands.
using Sessions = std::vector<int>;
enum class Mode { plain, programmatic, graph };

ModelConfig make_config(int key_heads, int value_heads) {
  ModelConfig c{.vocab_size = 512,
                .hidden_size = 2048,
                .num_hidden_layers = 1,
                .layer_types = {LayerType::linear_attention},
                .num_attention_heads = 16,
                .num_key_value_heads = 2,
                .head_dim = 256,
                .rope_theta = 1e7,
                .partial_rotary_factor = 0.25,
                .linear_num_key_heads = key_heads,
                .linear_num_value_heads = value_heads,
                .linear_key_head_dim = kDim,
                .linear_value_head_dim = kDim,
                .linear_conv_kernel_dim = kTaps,
                .num_experts = 256,
                .num_experts_per_tok = 8,
                .moe_intermediate_size = 512,
                .shared_expert_intermediate_size = 512,
                .rms_norm_eps = 1e-6,
                .tie_word_embeddings = false,
                .max_position_embeddings = 4096};
  c.validate();
  return c;
}

bool have_gpu(std::string& why) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  why = status != cudaSuccess ? cudaGetErrorString(status) : "the driver lists none";
  return status == cudaSuccess && count > 0;
}
#define SKIP_WITHOUT_GPU() \
  if (std::string why; !have_gpu(why)) GTEST_SKIP() << "no GPU: " << why

template <class T>
DeviceBuffer<T> to_device(const std::vector<T>& host) {
  DeviceBuffer<T> device(host.size());
  QWEN_MOE_CUDA(cudaMemcpy(device.data(), host.data(), device.bytes(), cudaMemcpyHostToDevice));
  return device;
}

template <class T>
std::vector<T> to_host(const void* device, size_t count) {
  std::vector<T> host(count);
  QWEN_MOE_CUDA(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

// Stands for the in_proj phase: lets the next kernel start at once and is late with its result.
__global__ void deliver(float* to, const float* from, int64_t count) {
  wait_for_predecessor();
  launch_dependents();
  const long long until = clock64() + 20000;
  while (clock64() < until) {
  }
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    to[i] = from[i];
}

// What differs from `reference`, as a part of its length.
struct Difference {
  double of = 0, total = 0;
  void add(double value, double reference) {
    of += (value - reference) * (value - reference);
    total += reference * reference;
  }
  double relative() const { return std::sqrt(of / total); }
};

struct Output {
  std::vector<uint16_t> core;  // [steps, rows, core_stride]
  Floats state;                // [slots, state_stride]
};

// One layer, some sessions with state and inputs for kSteps steps, and slots that nobody has.
class Rig {
 public:
  Rig(int key_heads, int value_heads, int sessions)
      : c(make_config(key_heads, value_heads)),
        sessions(sessions),
        slots(sessions + 3),
        width(c.conv_dim() + c.value_dim() + 2 * value_heads),
        proj_stride(width + 3),
        state_stride(int64_t{value_heads} * kDim * kDim + 64),
        core_stride(c.value_dim() + 8),
        conv1d(random(size_t{kTaps} * static_cast<size_t>(c.conv_dim()), 0.5f)),
        dt_bias(random(static_cast<size_t>(value_heads), 1.0f)),
        norm(random(kDim, 0.2f)) {
    for (float& w : norm) w += 1.0f;
    for (float x : random(static_cast<size_t>(value_heads), 1.0f))
      decay_rate.push_back(-std::exp(x - 2.5f));

    std::vector<int> order(static_cast<size_t>(slots - 1));
    std::iota(order.begin(), order.end(), 1);
    std::shuffle(order.begin(), order.end(), engine_);
    slot_of.assign(order.begin(), order.begin() + sessions);
    // The sink and one more slot that nobody has are poisoned, the last one holds numbers.
    state = random(static_cast<size_t>(slots * state_stride), 0.3f);
    for (int slot : {0, order.back()})
      for (int64_t i = 0; i < state_stride; ++i)
        std::memcpy(&state[static_cast<size_t>(slot * state_stride + i)], &kPoison, sizeof(float));

    conv_state = random(static_cast<size_t>(slots * conv_stride()), 1.0f);
    for (int session = 0; session < sessions; ++session) make_inputs(session);

    if (std::string why; !have_gpu(why)) return;
    ops = std::make_unique<CudaOps>(c, device_properties(0), kMaxRows, 4096);
    device_state_ = DeviceBuffer<float>(state.size());
    initial_state_ = to_device(state);
    device_decay_rate_ = to_device(decay_rate);
    device_dt_bias_ = to_device(dt_bias);
    device_norm_ = to_device(norm);
  }

  int64_t conv_stride() const { return int64_t{kTaps - 1} * c.conv_dim(); }
  const float* raw(int session, int step) const { return at(raw_, session, step); }
  const float* ready(int session, int step) const { return at(ready_, session, step); }
  const float* state_of(const Floats& all, int session) const {
    return all.data() + slot_of[static_cast<size_t>(session)] * state_stride;
  }

  // Runs the steps from the initial state, one row for each entry.
  Output run(const Sessions& rows, Mode mode = Mode::plain, int steps = kSteps) {
    const auto n = static_cast<int>(rows.size());
    const size_t step_floats = rows.size() * static_cast<size_t>(proj_stride);
    const size_t step_core = rows.size() * static_cast<size_t>(core_stride);
    Floats inputs(static_cast<size_t>(steps) * step_floats,
                  std::numeric_limits<float>::quiet_NaN());
    std::vector<int32_t> slot;
    for (int session : rows)
      slot.push_back(session == kPadding ? 0 : slot_of[static_cast<size_t>(session)]);
    for (int step = 0; step < steps; ++step)
      for (int row = 0; row < n; ++row)
        if (int session = rows[static_cast<size_t>(row)]; session != kPadding)
          std::copy_n(ready(session, step), width,
                      inputs.data() + (int64_t{step} * n + row) * proj_stride);

    const DeviceBuffer<float> source = to_device(inputs);
    const DeviceBuffer<float> proj(step_floats);
    const DeviceBuffer<Input> core(static_cast<size_t>(steps) * step_core);
    const DeviceBuffer<int32_t> device_slot = to_device(slot);
    QWEN_MOE_CUDA(cudaMemset(proj.data(), 0xff, proj.bytes()));  // NaN
    QWEN_MOE_CUDA(cudaMemset(core.data(), kUntouched & 0xff, core.bytes()));
    QWEN_MOE_CUDA(cudaMemcpy(device_state_.data(), initial_state_.data(), initial_state_.bytes(),
                             cudaMemcpyDeviceToDevice));
    QWEN_MOE_CUDA(cudaDeviceSynchronize());

    LayerWeights layer;
    layer.decay_rate = device_decay_rate_.data();
    layer.dt_bias = device_dt_bias_.data();
    layer.norm = device_norm_.data();
    const StepRows step_rows{.rows = n, .slot = device_slot.data()};
    const Stream stream;
    const bool programmatic = mode != Mode::plain && device_properties(0).programmatic_launch();
    const Launcher launch{.stream = stream, .programmatic = programmatic};
    auto enqueue = [&] {
      ops->begin(launch);
      for (int step = 0; step < steps; ++step) {
        launch(deliver, dim3(8), 256, 0, proj.data(),
               static_cast<const float*>(source.data() + static_cast<size_t>(step) * step_floats),
               static_cast<int64_t>(step_floats));
        ops->gated_delta_step({.core = core.data() + static_cast<size_t>(step) * step_core,
                               .core_stride = core_stride,
                               .proj = proj.data(),
                               .proj_stride = proj_stride,
                               .conv_state = {},
                               .recurrent_state = {device_state_.data(), state_stride},
                               .layer = layer,
                               .rows = step_rows});
      }
    };
    if (mode == Mode::graph) {
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t executable = nullptr;
      QWEN_MOE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      enqueue();
      QWEN_MOE_CUDA(cudaStreamEndCapture(stream, &graph));
      QWEN_MOE_CUDA(cudaGraphInstantiate(&executable, graph, 0));
      QWEN_MOE_CUDA(cudaGraphLaunch(executable, stream));
      stream.synchronize();
      QWEN_MOE_CUDA(cudaGraphExecDestroy(executable));
      QWEN_MOE_CUDA(cudaGraphDestroy(graph));
    } else {
      enqueue();
      stream.synchronize();
    }
    return {to_host<uint16_t>(core.data(), core.size()),
            to_host<float>(device_state_.data(), device_state_.size())};
  }

  // The row's part of `core` at a step, without the gap after it.
  std::vector<uint16_t> core_of(const Output& out, const Sessions& rows, int row, int step) const {
    auto from =
        out.core.begin() + (int64_t{step} * static_cast<int64_t>(rows.size()) + row) * core_stride;
    return {from, from + c.value_dim()};
  }

  const ModelConfig c;
  const int sessions, slots, width;
  const int64_t proj_stride, state_stride, core_stride;

 private:
  std::mt19937 engine_{7};

 public:
  Floats conv1d, dt_bias, norm, decay_rate, state, conv_state;
  std::vector<int> slot_of;  // [sessions]
  std::unique_ptr<CudaOps> ops;

 private:
  // Uniform, with this standard deviation.
  Floats random(size_t count, float deviation) {
    Floats values(count);
    const float factor = deviation * std::sqrt(12.0f) / 4294967296.0f;
    for (float& v : values) v = (static_cast<float>(engine_()) - 2147483648.0f) * factor;
    return values;
  }

  const float* at(const Floats& all, int session, int step) const {
    return all.data() + (int64_t{session} * kSteps + step) * width;
  }

  // What in_proj gives, before and after the conv and SiLU over q | k | v.
  void make_inputs(int session) {
    const int channels = c.conv_dim(), heads = c.linear_num_value_heads;
    Floats raw = random(size_t{kSteps} * static_cast<size_t>(width), 1.0f);
    for (int step = 0; step < kSteps; ++step) {
      float* row = raw.data() + int64_t{step} * width;
      // Where softplus turns linear.
      for (int h = 0; h < heads; ++h)
        if ((session + h + step) % 7 == 0) row[width - heads + h] += 20.0f;
    }
    Floats ready = raw;
    const float* before = conv_state.data() + slot_of[static_cast<size_t>(session)] * conv_stride();
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < channels; ++i) {
        double sum = 0;
        for (int tap = 0; tap < kTaps; ++tap) {
          const int from = step - (kTaps - 1) + tap;
          const float x = from < 0 ? before[int64_t{from + kTaps - 1} * channels + i]
                                   : raw[static_cast<size_t>(int64_t{from} * width + i)];
          sum += double{conv1d[static_cast<size_t>(int64_t{tap} * channels + i)]} * x;
        }
        ready[static_cast<size_t>(int64_t{step} * width + i)] =
            static_cast<float>(sum / (1.0 + std::exp(-sum)));
      }
    }
    raw_.insert(raw_.end(), raw.begin(), raw.end());
    ready_.insert(ready_.end(), ready.begin(), ready.end());
  }

  Floats raw_, ready_;  // [sessions, kSteps, width]
  DeviceBuffer<float> device_state_, initial_state_;
  DeviceBuffer<float> device_decay_rate_, device_dt_bias_, device_norm_;
};

float input_value(uint16_t bits) { return from_input(__ushort_as_half(bits)); }

// The definition, in float64: one token of one head. `s` is [128 keys, 128 values].
void plain_step(const Rig& rig, const float* row, int head, double* s, double* out) {
  const ModelConfig& c = rig.c;
  const int heads = c.linear_num_value_heads;
  const float* q_in = row + head / (heads / c.linear_num_key_heads) * kDim;
  const float* k_in = q_in + c.key_dim();
  const float* v = row + 2 * c.key_dim() + head * kDim;
  const float* z = v + c.value_dim();
  const float b = row[c.conv_dim() + c.value_dim() + head];
  const float a = row[c.conv_dim() + c.value_dim() + heads + head];
  const auto h = static_cast<size_t>(head);

  double qq = 0, kk = 0, q[kDim], k[kDim], u[kDim];
  for (int i = 0; i < kDim; ++i) {
    qq += double{q_in[i]} * q_in[i];
    kk += double{k_in[i]} * k_in[i];
  }
  for (int i = 0; i < kDim; ++i) {
    q[i] = q_in[i] / std::sqrt(qq + 1e-6) / std::sqrt(double{kDim});
    k[i] = k_in[i] / std::sqrt(kk + 1e-6);
  }
  const double step = double{a} + rig.dt_bias[h];
  const double alpha = std::exp(rig.decay_rate[h] * std::log1p(std::exp(step)));
  const double beta = 1.0 / (1.0 + std::exp(-double{b}));

  std::fill_n(u, kDim, 0.0);
  for (int i = 0; i < kDim; ++i) {
    for (int j = 0; j < kDim; ++j) {
      s[i * kDim + j] *= alpha;
      u[j] += s[i * kDim + j] * k[i];
    }
  }
  for (int j = 0; j < kDim; ++j) u[j] = beta * (v[j] - u[j]);
  std::fill_n(out, kDim, 0.0);
  for (int i = 0; i < kDim; ++i) {
    for (int j = 0; j < kDim; ++j) {
      s[i * kDim + j] += k[i] * u[j];
      out[j] += s[i * kDim + j] * q[i];
    }
  }
  double mean = 0;
  for (int j = 0; j < kDim; ++j) mean += out[j] * out[j] / kDim;
  for (int j = 0; j < kDim; ++j)
    out[j] *= rig.norm[static_cast<size_t>(j)] / std::sqrt(mean + c.rms_norm_eps) * z[j] /
              (1.0 + std::exp(-double{z[j]}));
}

void expect_same(const Output& a, const Output& b, const char* what) {
  EXPECT_EQ(a.core, b.core) << what;
  ASSERT_EQ(a.state.size(), b.state.size());
  EXPECT_EQ(std::memcmp(a.state.data(), b.state.data(), a.state.size() * sizeof(float)), 0) << what;
}

// Every slot of no session, and the gaps between slots, as they were.
void expect_others_untouched(const Rig& rig, const Output& out, const Sessions& rows) {
  const auto heads_floats = int64_t{rig.c.linear_num_value_heads} * kDim * kDim;
  for (int slot = 0; slot < rig.slots; ++slot) {
    const bool used = std::any_of(rows.begin(), rows.end(), [&](int session) {
      return session != kPadding && rig.slot_of[static_cast<size_t>(session)] == slot;
    });
    const int64_t from = slot * rig.state_stride + (used ? heads_floats : 0);
    const int64_t count = rig.state_stride - (used ? heads_floats : 0);
    EXPECT_EQ(std::memcmp(out.state.data() + from, rig.state.data() + from,
                          static_cast<size_t>(count) * sizeof(float)),
              0)
        << "slot " << slot;
  }
  const int64_t value_dim = rig.c.value_dim();
  for (size_t i = 0; i < out.core.size(); ++i)
    if (static_cast<int64_t>(i) % rig.core_stride >= value_dim)
      ASSERT_EQ(out.core[i], kUntouched)
          << "after row " << static_cast<int64_t>(i) / rig.core_stride;
}

Sessions first_sessions(int count) {
  Sessions all(static_cast<size_t>(count));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

using HeadsAndRows = std::tuple<std::pair<int, int>, int>;
class CudaGatedDelta : public testing::TestWithParam<HeadsAndRows> {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_GPU();
    const auto [heads, rows] = GetParam();
    rig_ = std::make_unique<Rig>(heads.first, heads.second, rows);
    rows_ = first_sessions(rows);
  }
  std::unique_ptr<Rig> rig_;
  Sessions rows_;
};

TEST_P(CudaGatedDelta, MatchesFloat64) {
  const Rig& rig = *rig_;
  const Output out = rig_->run(rows_);
  expect_others_untouched(rig, out, rows_);
  const int heads = rig.c.linear_num_value_heads, rows = rig.sessions;

  cpu::ThreadPool pool(8);
  std::vector<Difference> core(static_cast<size_t>(rows * heads * kSteps));
  std::vector<Difference> state(static_cast<size_t>(rows * heads));
  pool.run(rows * heads, [&](int task, int) {
    const int row = task / heads, head = task % heads;
    const int64_t at = int64_t{head} * kDim * kDim;
    const float* before = rig.state_of(rig.state, row) + at;
    std::vector<double> s(before, before + kDim * kDim), expected(kDim);
    for (int step = 0; step < kSteps; ++step) {
      plain_step(rig, rig.ready(row, step), head, s.data(), expected.data());
      const uint16_t* got =
          out.core.data() + (int64_t{step} * rows + row) * rig.core_stride + head * kDim;
      for (int j = 0; j < kDim; ++j)
        core[static_cast<size_t>(task * kSteps + step)].add(input_value(got[j]),
                                                            expected[static_cast<size_t>(j)]);
    }
    const float* after = rig.state_of(out.state, row) + at;
    for (size_t i = 0; i < s.size(); ++i) state[static_cast<size_t>(task)].add(after[i], s[i]);
  });
  // A head's output can cancel to almost nothing before the norm, so the heads of a row together.
  for (int row = 0; row < rows; ++row) {
    for (int step = 0; step < kSteps; ++step) {
      Difference all;
      for (int head = 0; head < heads; ++head) {
        const Difference& one = core[static_cast<size_t>((row * heads + head) * kSteps + step)];
        all.of += one.of;
        all.total += one.total;
      }
      EXPECT_LE(all.relative(), 5e-4) << "core of row " << row << " at step " << step;
    }
    for (int head = 0; head < heads; ++head)
      EXPECT_LE(state[static_cast<size_t>(row * heads + head)].relative(), 1e-5)
          << "state of row " << row << ", head " << head;
  }
}

TEST_P(CudaGatedDelta, MatchesTheHost) {
  const Rig& rig = *rig_;
  const Output out = rig_->run(rows_);
  const int rows = rig.sessions;
  const int64_t value_dim = rig.c.value_dim();

  cpu::ThreadPool pool(8);
  cpu::CpuOps ops(rig.c, pool, rows, 512);
  Floats state = rig.state, conv_state = rig.conv_state;
  Floats core(static_cast<size_t>(rows * value_dim)), proj(static_cast<size_t>(rows * rig.width));
  const std::vector<int32_t> position(static_cast<size_t>(rows), 0);
  const std::vector<int32_t> slot(rig.slot_of.begin(), rig.slot_of.end());
  LayerWeights layer;
  layer.conv1d = rig.conv1d.data();
  layer.decay_rate = rig.decay_rate.data();
  layer.dt_bias = rig.dt_bias.data();
  layer.norm = rig.norm.data();
  const StepRows step_rows{.rows = rows, .position = position.data(), .slot = slot.data()};
  ops.begin(step_rows);
  for (int step = 0; step < kSteps; ++step) {
    for (int row = 0; row < rows; ++row)
      std::copy_n(rig.raw(row, step), rig.width, proj.data() + int64_t{row} * rig.width);
    ops.gated_delta_step({.core = core.data(),
                          .core_stride = value_dim,
                          .proj = proj.data(),
                          .proj_stride = rig.width,
                          .conv_state = {conv_state.data(), rig.conv_stride()},
                          .recurrent_state = {state.data(), rig.state_stride},
                          .layer = layer,
                          .rows = step_rows});
    for (int row = 0; row < rows; ++row) {
      const auto got = rig.core_of(out, rows_, row, step);
      Difference difference;
      for (size_t i = 0; i < got.size(); ++i)
        difference.add(input_value(got[i]), core[static_cast<size_t>(row * value_dim) + i]);
      EXPECT_LE(difference.relative(), 5e-4) << "core of row " << row << " at step " << step;
    }
  }
  for (int row = 0; row < rows; ++row) {
    Difference difference;
    for (int64_t i = 0; i < value_dim * kDim; ++i)
      difference.add(rig.state_of(out.state, row)[i], rig.state_of(state, row)[i]);
    EXPECT_LE(difference.relative(), 1e-5) << "state of row " << row;
  }
}

// A race would show here: the same bits twice, with kernels that overlap, and from a graph.
TEST_P(CudaGatedDelta, SameBitsHoweverLaunched) {
  const Output out = rig_->run(rows_);
  expect_same(rig_->run(rows_), out, "again");
  expect_same(rig_->run(rows_, Mode::programmatic), out, "programmatic");
  expect_same(rig_->run(rows_, Mode::graph), out, "graph");
}

std::string shape_name(const testing::TestParamInfo<HeadsAndRows>& info) {
  const auto [heads, rows] = info.param;
  return concat("heads_", heads.first, "_", heads.second, "_rows_", rows);
}
INSTANTIATE_TEST_SUITE_P(Shapes, CudaGatedDelta,
                         testing::Combine(testing::Values(std::pair(16, 32), std::pair(1, 2),
                                                          std::pair(16, 64), std::pair(4, 4)),
                                          testing::Values(1, 2, 5, kMaxRows)),
                         shape_name);

// The session's output and state have the same bits in both runs.
void expect_same_session(const Rig& rig, int session, const Output& a, const Sessions& rows_a,
                         const Output& b, const Sessions& rows_b) {
  auto row_in = [session](const Sessions& rows) {
    return static_cast<int>(std::find(rows.begin(), rows.end(), session) - rows.begin());
  };
  for (int step = 0; step < kSteps; ++step)
    EXPECT_EQ(rig.core_of(a, rows_a, row_in(rows_a), step),
              rig.core_of(b, rows_b, row_in(rows_b), step))
        << "session " << session << " at step " << step;
  EXPECT_EQ(std::memcmp(rig.state_of(a.state, session), rig.state_of(b.state, session),
                        static_cast<size_t>(rig.state_stride) * sizeof(float)),
            0)
      << "session " << session;
}

TEST(CudaGatedDeltaRows, BitsDoNotDependOnCompany) {
  SKIP_WITHOUT_GPU();
  Rig rig(16, 32, kMaxRows);
  const Sessions all = first_sessions(kMaxRows);
  const Output together = rig.run(all);
  Sessions turned(all.rbegin(), all.rend());
  std::rotate(turned.begin(), turned.begin() + 17, turned.end());
  const Output permuted = rig.run(turned);
  for (int session : all) expect_same_session(rig, session, together, all, permuted, turned);
  for (int session : {0, 1, 31, 63}) {
    const Output alone = rig.run({session});
    expect_others_untouched(rig, alone, {session});
    expect_same_session(rig, session, together, all, alone, {session});
  }
}

// The sink is poisoned: a padding row that read it would not write zeros, and one that wrote it
// would leave other bits.
TEST(CudaGatedDeltaRows, PaddingWritesZerosAndNoState) {
  SKIP_WITHOUT_GPU();
  Rig rig(16, 32, 3);
  const Sessions all = first_sessions(3), padded = {2, kPadding, 1, kPadding, 0, kPadding};
  const Output expected = rig.run(all);
  for (Mode mode : {Mode::plain, Mode::programmatic, Mode::graph}) {
    const Output out = rig.run(padded, mode);
    expect_others_untouched(rig, out, padded);
    for (int session : all) expect_same_session(rig, session, out, padded, expected, all);
    for (int step = 0; step < kSteps; ++step)
      for (int row : {1, 3, 5})
        for (uint16_t bits : rig.core_of(out, padded, row, step)) ASSERT_EQ(bits, 0);
  }
}

TEST(CudaGatedDeltaRows, RefusesOtherDimensionsByName) {
  SKIP_WITHOUT_GPU();
  auto refusal = [](void (*change)(ModelConfig&)) -> std::string {
    ModelConfig c = make_config(16, 32);
    change(c);
    try {
      CudaOps ops(c, device_properties(0), kMaxRows, 4096);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no refusal";
  };
  auto expect_named = [](const std::string& text, const char* field) {
    EXPECT_NE(text.find(field), std::string::npos) << text;
  };
  expect_named(refusal([](ModelConfig& c) { c.linear_key_head_dim = 64; }), "linear_key_head_dim");
  expect_named(refusal([](ModelConfig& c) { c.linear_value_head_dim = 64; }),
               "linear_value_head_dim");
  expect_named(refusal([](ModelConfig& c) { c.linear_conv_kernel_dim = 3; }),
               "linear_conv_kernel_dim");
}

}  // namespace
}  // namespace qwen_moe::cuda
