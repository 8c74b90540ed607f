// One GPU behind the seam: steps, their inputs at fixed addresses, and one captured graph for each
// number of rows, over the arenas of state and the draws. Every call enqueues on one stream and
// returns, except those that hand something to the host.
#include "engine/backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>

#include "cuda/arenas.h"
#include "cuda/draws.h"
#include "cuda/graph.h"
#include "cuda/ops.h"
#include "cuda/prompt.h"
#include "cuda/step.h"
#include "model/forward.h"

namespace qwen_moe::cuda {
namespace {

constexpr size_t kGraphReserve = size_t{256} << 20;  // left free for the graphs
constexpr int kRing = 4;                             // steps that may be on their way to the device

int device_of(const std::string& home) {  // "cuda:N"
  require(home.starts_with("cuda:"), "the weights of a CUDA shard are on ", home);
  return std::stoi(home.substr(5));
}

size_t used_memory() {
  size_t free = 0, total = 0;
  QWEN_MOE_CUDA(cudaMemGetInfo(&free, &total));
  return total - free;
}

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const BackendOptions& options)
      : config_(options.model->config()),
        weights_(options.model->shard(options.shard)),
        properties_(device_properties(device_of(options.model->home(options.shard).name()))),
        graphs_wanted_(options.cuda_graph),
        images_(options.prefill_kernels.empty()
                    ? nullptr
                    : std::make_unique<Images>(options.prefill_kernels)),
        max_rows_(static_cast<int>(std::bit_ceil(static_cast<unsigned>(options.max_rows)))),
        arenas_(config_, declare_state(config_, weights_.span, weights_.last, options.kv_dtype),
                properties_.device, stream_) {
    require(options.kv_dtype == DType::bf16, "kv_dtype must be bfloat16 on CUDA, got ",
            dtype_name(options.kv_dtype));
    require(options.max_rows > 0 && options.max_rows <= kMaxRows, "max_rows must be in [1, ",
            kMaxRows, "], got ", options.max_rows);
  }

  ~CudaBackend() override {
    if (cudaSetDevice(properties_.device) != cudaSuccess) return;
    cudaStreamSynchronize(uploads_);
    cudaStreamSynchronize(stream_);
  }

  const StateLayout& layout() const override { return arenas_.layout(); }

  void reserve(const ReserveOptions& options) override {
    DeviceGuard device(properties_.device);
    size_t before = used_memory();
    reserve_scratch(options);
    // The driver hands memory out in blocks, so that small scratch may not show in its figures.
    scratch_bytes_ = std::max(used_memory() - before, input_.bytes());
    for (const auto& buffer : float_scratch_)
      scratch_bytes_ = std::max(scratch_bytes_, buffer.bytes());

    arenas_.reserve(options, kGraphReserve);
    for (size_t i = 0; i < weights_.layers.size(); ++i)
      state_.push_back(arenas_.layer(weights_.span.begin + static_cast<int>(i)));
    if (weights_.last) logits_ = arenas_.logits();

    before = used_memory();
    if (prompt_) prompt_->warm_up(stream_, weights_, state_, logits_);
    capture();
    graph_bytes_ = used_memory() - before;
  }

  std::map<std::string, size_t> memory() const override {
    return {{"session state", arenas_.slot_arena_bytes()},
            {"kv pages", arenas_.page_arena_bytes()},
            {"scratch", scratch_bytes_},
            {"graphs", graph_bytes_}};
  }

  std::map<std::string, int64_t> counters() const override {
    std::map<std::string, int64_t> all{{"graph_captures", captures_},
                                       {"graph_replays", replays_},
                                       {"graph_capture_us", capture_us_}};
    for (int bucket = 1, i = 0; bucket <= max_rows_; bucket *= 2, ++i)
      all[concat("bucket_", bucket)] = bucket_steps_[static_cast<size_t>(i)];
    return all;
  }

  Discovered discover(int slot, int page) override {
    DeviceGuard device(properties_.device);
    DeviceBuffer<float> zeros(2 * static_cast<size_t>(config_.hidden_size));
    QWEN_MOE_CUDA(cudaMemset(zeros.data(), 0, zeros.bytes()));
    Handoff input{zeros.data(), DType::f32, 2, config_.hidden_size};
    return arenas_.discover(*this, slot, page, weights_.first ? nullptr : &input);
  }

  void set_generation(int slot, uint32_t generation) override {
    arenas_.set_generation(slot, generation);
  }
  void clear_slot(int slot) override { arenas_.clear_slot(slot); }
  void copy_slot(int to, int from) override { arenas_.copy_slot(to, from); }
  void copy_page(int to, int from) override { arenas_.copy_page(to, from); }
  void poison_slot(int slot) override { arenas_.poison_slot(slot); }
  void poison_page(int page) override { arenas_.poison_page(page); }
  void read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to) override {
    arenas_.read_buffer(buffer, slot, pages, tokens, to);
  }
  void write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from) override {
    arenas_.write_buffer(buffer, slot, pages, tokens, from);
  }

  PrefillChunk prefill_chunk() const override {
    return images_ ? PrefillChunk{prompt_tokens_, Prompt::kTokensBesideDecode} : PrefillChunk{};
  }

  // Without kernels for prompts their tokens go through the decode step, one by one.
  void prefill(const PrefillStep& step, const Handoff* input) override {
    DeviceGuard device(properties_.device);
    arenas_.check_generation(step.slot, step.generation);
    auto count = static_cast<int>(step.tokens.size());
    int most = prefill_chunk().alone;
    require(count > 0 && count <= most, "a prefill step takes 1 to ", most, " tokens, got ", count);
    if (prompt_) {
      last_hidden_ = prompt_->run(stream_, step, input, weights_, state_, logits_);
      return;
    }
    auto width = static_cast<size_t>(config_.hidden_size);
    for (int i = 0; i < count; ++i) {
      bool last = i + 1 == count;
      DecodeRow row{step.slot, step.generation, step.position + i,
                    step.tokens[static_cast<size_t>(i)], step.pages};
      const auto* from = input ? static_cast<const float*>(input->data) : nullptr;
      enqueue({&row, 1}, from ? from + static_cast<size_t>(i) * width : nullptr,
              weights_.last && last && step.logits);
      if (!weights_.last)
        copy_rows(handoff_.data() + static_cast<size_t>(i) * width, buffers_.hidden, 1);
    }
    last_hidden_ = {handoff_.data(), DType::f32, count, config_.hidden_size};
  }

  void decode(std::span<const DecodeRow> rows, const Handoff* input) override {
    DeviceGuard device(properties_.device);
    for (const DecodeRow& row : rows) arenas_.check_generation(row.slot, row.generation);
    enqueue(rows, input ? static_cast<const float*>(input->data) : nullptr, weights_.last);
    last_hidden_ = {buffers_.hidden, DType::f32, static_cast<int>(rows.size()),
                    config_.hidden_size};
  }

  Handoff hidden() const override {
    stream_.synchronize();  // the next shard reads it on a stream of its own
    return last_hidden_;
  }

  void draw(std::span<const SampleRow> rows) override {
    DeviceGuard device(properties_.device);
    int bucket = bucket_of(rows.size());
    draws_->upload(rows, bucket);
    launch(draw_graphs_, bucket, [&] { launch_draw(bucket); });
    draws_->download(rows.size());
  }

  void collect(std::span<SampleResult> results) override {
    DeviceGuard device(properties_.device);
    draws_->collect(results);
  }

  bool ahead() const override { return weights_.first && weights_.last; }

  void read_logits(int slot, std::span<float> to) override {
    DeviceGuard device(properties_.device);
    QWEN_MOE_CUDA(cudaMemcpyAsync(to.data(), logits_.at(slot), to.size_bytes(),
                                  cudaMemcpyDeviceToHost, stream_));
    stream_.synchronize();
  }

 private:
  struct Inputs {  // a step on its way to the device
    PinnedBuffer<std::byte> data;
    Event uploaded;
  };

  void reserve_scratch(const ReserveOptions& options) {
    prompt_tokens_ = Prompt::tokens_for(options.max_context);
    const int max_context = options.max_context;
    auto rows = static_cast<size_t>(max_rows_);
    auto floats = [&](int64_t count) {
      float_scratch_.emplace_back(rows * static_cast<size_t>(count));
      return float_scratch_.back().data();
    };
    auto halves = [&](int64_t count) {
      half_scratch_.emplace_back(rows * static_cast<size_t>(count));
      return half_scratch_.back().data();
    };
    int delta = config_.conv_dim() + config_.value_dim() + 2 * config_.linear_num_value_heads;
    int attention = 2 * config_.attention_dim() + 2 * config_.kv_dim();
    buffers_.proj_stride = (std::max(delta, attention) + 15) / 16 * 16;
    buffers_.hidden = floats(config_.hidden_size);
    buffers_.proj = floats(buffers_.proj_stride);
    buffers_.router = floats(config_.num_experts);
    buffers_.shared_scale = floats(1);
    buffers_.core = halves(std::max(config_.value_dim(), config_.attention_dim()));
    buffers_.shared = halves(config_.shared_expert_intermediate_size);
    buffers_.routed = halves(config_.num_experts_per_tok * config_.moe_intermediate_size);
    if (!weights_.last)
      handoff_ = DeviceBuffer<float>(static_cast<size_t>(prefill_chunk().alone) *
                                     static_cast<size_t>(config_.hidden_size));
    ops_ = std::make_unique<CudaOps>(config_, properties_, max_rows_, max_context);

    pages_stride_ = (max_context + kPageTokens - 1) / kPageTokens;
    size_t input_bytes = sizeof(StepInput) + rows * static_cast<size_t>(pages_stride_) * 4;
    input_ = DeviceBuffer<std::byte>(input_bytes);
    QWEN_MOE_CUDA(cudaMemsetAsync(input_.data(), 0, input_bytes, stream_));
    step_buffer_ = DeviceBuffer<StepState>(1);
    step_ = step_buffer_.data();
    for (Inputs& in : inputs_) in.data = PinnedBuffer<std::byte>(input_bytes);
    if (images_)
      prompt_ = std::make_unique<Prompt>(config_, properties_, *images_, *ops_, max_context);

    if (!weights_.last) return;
    draws_ = std::make_unique<Draws>(config_.vocab_size, max_rows_, max_context, properties_,
                                     stream_, uploads_);
  }

  // Buckets from the largest down: what the first capture loads serves the others.
  void capture() {
    auto began = std::chrono::steady_clock::now();
    if (graphs_wanted_) {
      for (int bucket = max_rows_; bucket >= 1; bucket /= 2) {
        auto at = static_cast<size_t>(std::countr_zero(static_cast<unsigned>(bucket)));
        step_graphs_[at] = Graph(stream_, [&] { launch_step(bucket, weights_.last); });
        ++captures_;
        if (!weights_.last) continue;
        draw_graphs_[at] = Graph(stream_, [&] { launch_draw(bucket); });
        ++captures_;
      }
      if (weights_.last) {
        prompt_graph_ = Graph(stream_, [&] { launch_step(1, false); });
        ++captures_;
      }
    }
    stream_.synchronize();
    capture_us_ = std::chrono::duration_cast<std::chrono::microseconds>(
                      std::chrono::steady_clock::now() - began)
                      .count();
  }

  int bucket_of(size_t rows) const {
    require<Capacity>(rows > 0 && rows <= static_cast<size_t>(max_rows_),
                      "a decode step takes 1 to ", max_rows_, " rows here, got ", rows);
    return static_cast<int>(std::bit_ceil(static_cast<unsigned>(rows)));
  }

  template <class Graphs, class Enqueue>
  void launch(const Graphs& graphs, int bucket, const Enqueue& enqueue_kernels) {
    if (graphs_wanted_) {
      graphs[static_cast<size_t>(std::countr_zero(static_cast<unsigned>(bucket)))].replay(stream_);
      ++replays_;
      return;
    }
    try {
      enqueue_kernels();
    } catch (...) {  // no event tells the next upload that what was enqueued still reads its input
      cudaStreamSynchronize(stream_);
      throw;
    }
  }

  // Of the residual stream, from here or from another device.
  void copy_rows(float* to, const float* from, size_t rows) {
    size_t bytes = rows * static_cast<size_t>(config_.hidden_size) * sizeof(float);
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }

  // The kernels of one step of `bucket` rows, in order.
  void launch_step(int bucket, bool head) {
    // The guard waits for all before it, and without an embedding so does the phase behind it,
    // which reads what the guard writes before it waits.
    Launcher launcher{stream_, properties_.programmatic_launch(), weights_.first ? 1 : 2};
    guard_step(launcher, step_, reinterpret_cast<const StepInput*>(input_.data()),
               arenas_.generation(), arenas_.last_token(), arenas_.stale(), bucket);
    ops_->begin(launcher);
    StepRows rows{.rows = bucket,
                  .token = step_->token,
                  .position = step_->position,
                  .slot = step_->slot,
                  .pages = reinterpret_cast<const int32_t*>(input_.data() + sizeof(StepInput)),
                  .pages_stride = pages_stride_};
    forward_layers(*ops_, weights_, state_, buffers_, rows, Phase::decode);
    if (head)
      ops_->lm_head({.logits = logits_,
                     .hidden = buffers_.hidden,
                     .norm = weights_.norm,
                     .lm_head = weights_.lm_head,
                     .slot = step_->slot,
                     .rows = bucket});
  }

  void launch_draw(int bucket) {
    draws_->launch({stream_, properties_.programmatic_launch()}, bucket, logits_, arenas_.stale(),
                   arenas_.last_token());
  }

  void enqueue(std::span<const DecodeRow> rows, const float* input, bool head) {
    int bucket = bucket_of(rows.size());
    Inputs& in = inputs_[next_input_++ % kRing];
    in.uploaded.synchronize();
    auto* host = reinterpret_cast<StepInput*>(in.data.data());
    auto* pages = reinterpret_cast<int32_t*>(in.data.data() + sizeof(StepInput));
    for (int i = 0; i < bucket; ++i) {
      auto at = static_cast<size_t>(i);
      bool real = at < rows.size();
      host->slot[i] = real ? rows[at].slot : 0;
      host->generation[i] = real ? rows[at].generation : 0;
      host->position[i] = real ? rows[at].position : 0;
      host->token[i] = real ? rows[at].token : 0;
      if (!real) continue;
      int32_t* to = pages + static_cast<int64_t>(i) * pages_stride_;
      std::copy_n(rows[at].pages.data(), rows[at].position / kPageTokens + 1, to);
    }
    uploads_.wait_for(step_done_);  // which reads the input of before
    QWEN_MOE_CUDA(cudaMemcpyAsync(
        input_.data(), host,
        sizeof(StepInput) + static_cast<size_t>(bucket) * static_cast<size_t>(pages_stride_) * 4,
        cudaMemcpyHostToDevice, uploads_));
    in.uploaded.record(uploads_);
    stream_.wait_for(in.uploaded);
    if (input) copy_rows(buffers_.hidden, input, rows.size());
    ++bucket_steps_[static_cast<size_t>(std::countr_zero(static_cast<unsigned>(bucket)))];
    if (weights_.last && !head && graphs_wanted_) {
      prompt_graph_.replay(stream_);
      ++replays_;
    } else {
      launch(step_graphs_, bucket, [&] { launch_step(bucket, head); });
    }
    step_done_.record(stream_);
  }

  const ModelConfig& config_;
  ShardWeights weights_;
  DeviceProperties properties_;
  bool graphs_wanted_;
  std::unique_ptr<Images> images_;  // null: prompts go through the decode step
  int max_rows_;
  Stream stream_, uploads_;  // of the kernels, and of their inputs, which travel beside them
  Event step_done_;          // the newest step

  Arenas arenas_;
  std::vector<LayerState> state_;
  SlotArray logits_;
  size_t scratch_bytes_ = 0, graph_bytes_ = 0;

  std::vector<DeviceBuffer<float>> float_scratch_;
  std::vector<DeviceBuffer<Input>> half_scratch_;
  Buffers<float, Input> buffers_;
  DeviceBuffer<float> handoff_;  // [prefill_chunk, hidden], not on the last shard
  Handoff last_hidden_;
  std::unique_ptr<CudaOps> ops_;

  int64_t pages_stride_ = 0;
  DeviceBuffer<std::byte> input_;  // StepInput and pages
  DeviceBuffer<StepState> step_buffer_;
  StepState* step_ = nullptr;
  std::array<Inputs, kRing> inputs_;
  size_t next_input_ = 0;

  int prompt_tokens_ = Prompt::kTokens;  // of a step, at most
  std::unique_ptr<Prompt> prompt_;
  std::unique_ptr<Draws> draws_;  // on the last shard

  std::array<Graph, 7> step_graphs_, draw_graphs_;
  Graph prompt_graph_;  // one row, without lm_head
  int64_t captures_ = 0, replays_ = 0, capture_us_ = 0;
  std::array<int64_t, 7> bucket_steps_{};
};

static_assert(OpSet<CudaOps>);

}  // namespace
}  // namespace qwen_moe::cuda

namespace qwen_moe {

bool cuda_available() {
  int count = 0;
  bool any = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  cudaGetLastError();
  return any;
}

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  // Streams and events belong to the device that is current when they are made.
  cuda::DeviceGuard device(cuda::device_of(options.model->home(options.shard).name()));
  return std::make_unique<cuda::CudaBackend>(options);
}

}  // namespace qwen_moe
