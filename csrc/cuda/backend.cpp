// One GPU behind the seam: arenas of state, the inputs of a step at fixed addresses, and one
// captured graph for each number of rows. Every call enqueues on one stream and returns, except
// those that hand something to the host.
#include "engine/backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstring>
#include <utility>

#include "cuda/graph.h"
#include "cuda/ops.h"
#include "cuda/prompt.h"
#include "cuda/sample.h"
#include "cuda/step.h"
#include "engine/probe.h"
#include "model/forward.h"

namespace qwen_moe::cuda {
namespace {

constexpr size_t kAlign = 256;
constexpr size_t kGraphReserve = size_t{256} << 20;  // left free for the graphs
constexpr int kRing = 4;                             // steps that may be on their way to the device

size_t round_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

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
        layout_(declare_state(config_, weights_.span, weights_.last, options.kv_dtype)),
        properties_(device_properties(device_of(options.model->home(options.shard).name()))),
        graphs_wanted_(options.cuda_graph),
        images_(options.prefill_kernels.empty()
                    ? nullptr
                    : std::make_unique<Images>(options.prefill_kernels)),
        max_rows_(static_cast<int>(std::bit_ceil(static_cast<unsigned>(options.max_rows)))) {
    require(options.kv_dtype == DType::bf16, "kv_dtype must be bfloat16 on CUDA, got ",
            dtype_name(options.kv_dtype));
    require(options.max_rows > 0 && options.max_rows <= kMaxRows, "max_rows must be in [1, ",
            kMaxRows, "], got ", options.max_rows);
    for (const StateBuffer& b : layout_.buffers) {
      size_t& total = b.kind == BufferKind::fixed ? slot_bytes_ : page_bytes_;
      offsets_.push_back(total);
      total += round_up(b.bytes() * (b.kind == BufferKind::fixed ? 1 : kPageTokens));
    }
  }

  ~CudaBackend() override {
    if (cudaSetDevice(properties_.device) == cudaSuccess) cudaStreamSynchronize(stream_);
  }

  const StateLayout& layout() const override { return layout_; }

  void reserve(const ReserveOptions& options) override {
    DeviceGuard device(properties_.device);
    slots_ = static_cast<size_t>(options.slots) + 1;
    pages_ = static_cast<size_t>(options.pages) + 1;
    size_t before = used_memory();
    reserve_scratch(options.max_context);
    // The driver hands memory out in blocks, so that small scratch may not show in its figures.
    scratch_bytes_ = std::max(used_memory() - before, input_.bytes());
    for (const auto& buffer : float_scratch_)
      scratch_bytes_ = std::max(scratch_bytes_, buffer.bytes());

    size_t state = slots_ * slot_bytes_ + pages_ * page_bytes_, free = 0, total = 0;
    QWEN_MOE_CUDA(cudaMemGetInfo(&free, &total));
    size_t room = free > kGraphReserve ? free - kGraphReserve : 0;
    size_t each = slot_bytes_ + page_bytes_ * static_cast<size_t>(pages_stride_);
    require<Capacity>(
        state <= room, options.slots, " sessions of ", options.max_context, " tokens need ",
        state >> 20, " MiB of state (", slot_bytes_ >> 20, " MiB for each session and ",
        page_bytes_ / kPageTokens, " bytes for each token); of ", total >> 20,
        " MiB on cuda:", properties_.device, " ", room >> 20,
        " MiB are left beside weights, scratch and graphs, which fit ",
        room / std::max<size_t>(each, 1), " such sessions. Lower max_sessions or max_context");
    slot_arena_ = DeviceBuffer<std::byte>(slots_ * slot_bytes_);
    page_arena_ = DeviceBuffer<std::byte>(pages_ * page_bytes_);
    QWEN_MOE_CUDA(cudaMemsetAsync(slot_arena_.data(), 0, slot_arena_.bytes(), stream_));
    QWEN_MOE_CUDA(cudaMemsetAsync(page_arena_.data(), 0, page_arena_.bytes(), stream_));
    generation_.assign(slots_, 0);
    device_generation_ = DeviceBuffer<uint32_t>(slots_);
    last_token_ = DeviceBuffer<int32_t>(slots_);
    stale_ = DeviceBuffer<int32_t>(slots_);
    for (Drawing& d : drawings_) d.stale = PinnedBuffer<int32_t>(slots_);
    QWEN_MOE_CUDA(cudaMemsetAsync(stale_.data(), 0, stale_.bytes(), stream_));
    QWEN_MOE_CUDA(
        cudaMemsetAsync(device_generation_.data(), 0, device_generation_.bytes(), stream_));
    QWEN_MOE_CUDA(cudaMemsetAsync(last_token_.data(), 0, last_token_.bytes(), stream_));
    for (size_t i = 0; i < weights_.layers.size(); ++i)
      state_.push_back(layer_state(weights_.span.begin + static_cast<int>(i)));
    if (weights_.last) logits_ = slot_array("lm_head.logits");

    before = used_memory();
    if (prompt_) prompt_->warm_up(stream_, options.max_context, weights_, state_, logits_);
    capture();
    graph_bytes_ = used_memory() - before;
  }

  std::map<std::string, size_t> memory() const override {
    return {{"session state", slot_arena_.bytes()},
            {"kv pages", page_arena_.bytes()},
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
    std::vector<std::byte> after(std::max(slot_bytes_, page_bytes_));
    return probe_writes(
        *this, slot, generation_[static_cast<size_t>(slot)], page,
        weights_.first ? nullptr : &input, offsets_,
        [&] {
          fill(slot_at(slot), kProbePattern, slot_bytes_);
          fill(page_at(page), kProbePattern, page_bytes_);
        },
        [&](BufferKind kind) {
          bool fixed = kind == BufferKind::fixed;
          if (size_t bytes = fixed ? slot_bytes_ : page_bytes_)
            download(after.data(), fixed ? slot_at(slot) : page_at(page), bytes);
          return after.data();
        });
  }

  void set_generation(int slot, uint32_t generation) override {
    DeviceGuard device(properties_.device);
    generation_.at(static_cast<size_t>(slot)) = generation;
    cuda::set_generation(stream_, device_generation_.data(), slot, generation);
  }
  void clear_slot(int slot) override { fill(slot_at(slot), 0, slot_bytes_); }
  void copy_slot(int to, int from) override {
    copy(slot_at(to), slot_at(from), slot_bytes_);
    copy(last_token_.data() + to, last_token_.data() + from, sizeof(int32_t));
  }
  void copy_page(int to, int from) override { copy(page_at(to), page_at(from), page_bytes_); }
  // All bits set is a NaN in float32 and in bfloat16.
  void poison_slot(int slot) override { fill(slot_at(slot), 0xff, slot_bytes_); }
  void poison_page(int page) override { fill(page_at(page), 0xff, page_bytes_); }

  void read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to) override {
    move(buffer, slot, pages, tokens, [&](std::byte* state, size_t at, const Run& run) {
      QWEN_MOE_CUDA(cudaMemcpy2DAsync(to.data() + at, run.row_pitch, state, run.width, run.width,
                                      run.rows, cudaMemcpyDeviceToHost, stream_));
    });
  }
  void write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from) override {
    move(buffer, slot, pages, tokens, [&](std::byte* state, size_t at, const Run& run) {
      QWEN_MOE_CUDA(cudaMemcpy2DAsync(state, run.width, from.data() + at, run.row_pitch, run.width,
                                      run.rows, cudaMemcpyHostToDevice, stream_));
    });
  }

  PrefillChunk prefill_chunk() const override {
    return images_ ? PrefillChunk{Prompt::kTokens, Prompt::kTokensBesideDecode} : PrefillChunk{};
  }

  // Without kernels for prompts their tokens go through the decode step, one by one.
  void prefill(const PrefillStep& step, const Handoff* input) override {
    DeviceGuard device(properties_.device);
    check_generation(step.slot, step.generation);
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
        copy(handoff_.data() + static_cast<size_t>(i) * width, buffers_.hidden, width * 4);
    }
    last_hidden_ = {handoff_.data(), DType::f32, count, config_.hidden_size};
  }

  void decode(std::span<const DecodeRow> rows, const Handoff* input) override {
    DeviceGuard device(properties_.device);
    for (const DecodeRow& row : rows) check_generation(row.slot, row.generation);
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
    Drawing& d = drawings_[next_draw_ % kRing];
    require<Error>(next_draw_ - next_collect_ < kRing, "too many draws are not collected");
    d.uploaded.synchronize();
    int bucket = bucket_of(rows.size());
    int used = 0;
    if (std::any_of(rows.begin(), rows.end(),
                    [](const SampleRow& row) { return row.sampling->penalized(); }))
      penalties_uploaded_.synchronize();
    DrawRow* host = d.rows.data();
    for (int i = 0; i < bucket; ++i)
      host[i] = i < static_cast<int>(rows.size())
                    ? to_draw_row(rows[static_cast<size_t>(i)],
                                  {penalties_host_.data(), penalties_host_.size()}, used, counts_)
                    : DrawRow{};
    upload(draw_rows_.data(), host, static_cast<size_t>(bucket) * sizeof(DrawRow));
    if (used > 0) {
      upload(penalties_.data(), penalties_host_.data(),
             static_cast<size_t>(used) * sizeof(PenaltyEntry));
      penalties_uploaded_.record(stream_);
    }
    d.uploaded.record(stream_);
    launch(draw_graphs_, bucket, [&] { launch_draw(bucket); });
    d.count = static_cast<int>(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) d.slot[i] = rows[i].slot;
    QWEN_MOE_CUDA(cudaMemcpyAsync(d.results.data(), draw_results_.data(),
                                  static_cast<size_t>(d.count) * sizeof(DrawResult),
                                  cudaMemcpyDeviceToHost, stream_));
    QWEN_MOE_CUDA(cudaMemcpyAsync(d.stale.data(), stale_.data(), stale_.bytes(),
                                  cudaMemcpyDeviceToHost, stream_));
    d.done.record(stream_);
    ++next_draw_;  // a draw that threw before did not happen
  }

  void collect(std::span<SampleResult> results) override {
    DeviceGuard device(properties_.device);
    Drawing& d = drawings_[next_collect_++ % kRing];
    require<Error>(d.count == static_cast<int>(results.size()), "a draw of ", d.count,
                   " rows is collected as ", results.size());
    d.done.synchronize();
    for (size_t i = 0; i < results.size(); ++i) {
      const DrawResult& from = d.results.data()[i];
      SampleResult& to = results[i];
      to.token = from.token;
      to.finite = from.finite != 0;
      to.stale = d.stale.data()[d.slot[i]] != 0;
      to.logprob = from.logprob;
      to.top_count = from.top_count;
      for (int j = 0; j < from.top_count; ++j) to.top[j] = {from.top_token[j], from.top_logprob[j]};
    }
  }

  bool ahead() const override { return weights_.first && weights_.last; }

  void read_logits(int slot, std::span<float> to) override {
    DeviceGuard device(properties_.device);
    download(to.data(), logits_.at(slot), to.size_bytes());
  }

 private:
  struct Inputs {  // a step on its way to the device
    PinnedBuffer<std::byte> data;
    Event uploaded;
  };
  struct Drawing {  // a draw on its way there and back
    PinnedBuffer<DrawRow> rows{kMaxRows};
    PinnedBuffer<DrawResult> results{kMaxRows};
    PinnedBuffer<int32_t> stale;  // [slots]
    std::array<int, kMaxRows> slot{};
    Event uploaded, done;
    int count = 0;
  };
  struct Run {  // rows of `width` bytes, `row_pitch` apart in the row-major form
    size_t width, rows, row_pitch;
  };

  std::byte* slot_at(int slot) const {
    return slot_arena_.data() + static_cast<size_t>(slot) * slot_bytes_;
  }
  std::byte* page_at(int page) const {
    return page_arena_.data() + static_cast<size_t>(page) * page_bytes_;
  }

  void fill(std::byte* at, int value, size_t bytes) {
    DeviceGuard device(properties_.device);
    QWEN_MOE_CUDA(cudaMemsetAsync(at, value, bytes, stream_));
  }
  void copy(void* to, const void* from, size_t bytes) {
    DeviceGuard device(properties_.device);
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }
  void upload(void* to, const void* from, size_t bytes) {
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
  }
  void download(void* to, const void* from, size_t bytes) {
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    stream_.synchronize();
  }

  size_t offset_of(const std::string& fqn) const {
    for (size_t i = 0; i < layout_.buffers.size(); ++i)
      if (layout_.buffers[i].fqn == fqn) return offsets_[i];
    throw InvalidArgument(concat("no state buffer named ", fqn));
  }
  SlotArray slot_array(const std::string& fqn) const {
    return {reinterpret_cast<float*>(slot_arena_.data() + offset_of(fqn)),
            static_cast<int64_t>(slot_bytes_ / sizeof(float))};
  }
  LayerState layer_state(int layer) const {
    std::string prefix = concat("layers.", layer, ".");
    LayerState state;
    if (config_.layer_types[static_cast<size_t>(layer)] == LayerType::linear_attention) {
      state.conv_state = slot_array(prefix + "linear_attn.conv_state");
      state.recurrent_state = slot_array(prefix + "linear_attn.recurrent_state");
    } else {
      // The kernels find V behind K.
      size_t k = offset_of(prefix + "self_attn.k_cache"),
             v = offset_of(prefix + "self_attn.v_cache");
      require<Error>(v - k == static_cast<size_t>(config_.kv_dim()) * kPageTokens * 2,
                     "k_cache and v_cache of layer ", layer, " are not neighbours");
      state.kv = {page_arena_.data() + k, static_cast<int64_t>(page_bytes_), DType::bf16};
    }
    return state;
  }

  void check_generation(int slot, uint32_t generation) const {
    require<Error>(generation_.at(static_cast<size_t>(slot)) == generation, "slot ", slot,
                   " is at generation ", generation_[static_cast<size_t>(slot)],
                   ", the step expects ", generation, "; nothing was written");
  }

  void reserve_scratch(int max_context) {
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
    buffers_.normed = halves(config_.hidden_size);
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
      prompt_ = std::make_unique<Prompt>(config_, properties_, *images_, *ops_, pages_stride_);

    if (!weights_.last) return;
    sampler_ = std::make_unique<Sampler>(config_.vocab_size, max_rows_, properties_);
    draw_rows_ = DeviceBuffer<DrawRow>(rows);
    QWEN_MOE_CUDA(cudaMemsetAsync(draw_rows_.data(), 0, draw_rows_.bytes(), stream_));
    draw_results_ = DeviceBuffer<DrawResult>(rows);
    size_t entries = rows * static_cast<size_t>(std::min(max_context, config_.vocab_size));
    penalties_ = DeviceBuffer<PenaltyEntry>(entries);
    penalties_host_ = PinnedBuffer<PenaltyEntry>(entries);
    counts_.assign(static_cast<size_t>(config_.vocab_size), 0);
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
    if (!graphs_wanted_) return enqueue_kernels();
    graphs[static_cast<size_t>(std::countr_zero(static_cast<unsigned>(bucket)))].replay(stream_);
    ++replays_;
  }

  // The kernels of one step of `bucket` rows, in order.
  void launch_step(int bucket, bool head) {
    // The guard waits for all before it, and without an embedding so does the phase behind it,
    // which reads what the guard writes before it waits.
    Launcher launcher{stream_, properties_.programmatic_launch(), weights_.first ? 1 : 2};
    guard_step(launcher, step_, reinterpret_cast<const StepInput*>(input_.data()),
               device_generation_.data(), last_token_.data(), stale_.data(), bucket);
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
    Launcher launcher{stream_, properties_.programmatic_launch()};
    sampler_->launch(launcher, draw_rows_.data(), penalties_.data(), bucket, logits_.data,
                     logits_.stride, last_token_.data(), draw_results_.data());
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
    upload(
        input_.data(), host,
        sizeof(StepInput) + static_cast<size_t>(bucket) * static_cast<size_t>(pages_stride_) * 4);
    in.uploaded.record(stream_);
    if (input)
      copy(buffers_.hidden, input,
           rows.size() * static_cast<size_t>(config_.hidden_size) * sizeof(float));
    ++bucket_steps_[static_cast<size_t>(std::countr_zero(static_cast<unsigned>(bucket)))];
    if (weights_.last && !head) {
      if (!graphs_wanted_) return launch_step(bucket, false);
      prompt_graph_.replay(stream_);
      ++replays_;
      return;
    }
    launch(step_graphs_, bucket, [&] { launch_step(bucket, head); });
  }

  // Calls copy_run(state bytes, offset in the row-major form, run) for every run of a buffer.
  template <class CopyRun>
  void move(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
            const CopyRun& copy_run) {
    DeviceGuard device(properties_.device);
    const StateBuffer& b = layout_.buffers.at(buffer);
    if (b.kind == BufferKind::fixed) {
      copy_run(slot_at(slot) + offsets_[buffer], 0, Run{b.bytes(), 1, b.bytes()});
    } else {
      auto heads = static_cast<size_t>(b.shape[0]);
      size_t width = b.bytes() / heads;  // one head of one token; a page is [heads, 64, head_dim]
      for (int t = 0; t < tokens; t += kPageTokens)
        for (size_t h = 0; h < heads; ++h)
          copy_run(
              page_at(pages[static_cast<size_t>(t / kPageTokens)]) + offsets_[buffer] +
                  h * kPageTokens * width,
              (static_cast<size_t>(t) * heads + h) * width,
              Run{width, static_cast<size_t>(std::min(kPageTokens, tokens - t)), heads * width});
    }
    stream_.synchronize();
  }

  const ModelConfig& config_;
  ShardWeights weights_;
  StateLayout layout_;
  DeviceProperties properties_;
  bool graphs_wanted_;
  std::unique_ptr<Images> images_;  // null: prompts go through the decode step
  int max_rows_;
  Stream stream_;

  std::vector<size_t> offsets_;  // of every buffer, in its slot or page
  size_t slot_bytes_ = 0, page_bytes_ = 0, slots_ = 0, pages_ = 0;
  size_t scratch_bytes_ = 0, graph_bytes_ = 0;
  DeviceBuffer<std::byte> slot_arena_;  // [slots, slot_bytes]
  DeviceBuffer<std::byte> page_arena_;  // [pages, page_bytes]
  std::vector<uint32_t> generation_;    // [slots]
  DeviceBuffer<uint32_t> device_generation_;
  DeviceBuffer<int32_t> last_token_;  // [slots] drawn last
  DeviceBuffer<int32_t> stale_;       // [slots] 1: the last step named an old generation
  std::vector<LayerState> state_;
  SlotArray logits_;

  std::vector<DeviceBuffer<float>> float_scratch_;
  std::vector<DeviceBuffer<bf16>> half_scratch_;
  Buffers<float, bf16> buffers_;
  DeviceBuffer<float> handoff_;  // [prefill_chunk, hidden], not on the last shard
  Handoff last_hidden_;
  std::unique_ptr<CudaOps> ops_;

  int64_t pages_stride_ = 0;
  DeviceBuffer<std::byte> input_;  // StepInput and pages
  DeviceBuffer<StepState> step_buffer_;
  StepState* step_ = nullptr;
  std::array<Inputs, kRing> inputs_;
  size_t next_input_ = 0;

  std::unique_ptr<Prompt> prompt_;

  std::unique_ptr<Sampler> sampler_;
  DeviceBuffer<DrawRow> draw_rows_;
  DeviceBuffer<DrawResult> draw_results_;
  DeviceBuffer<PenaltyEntry> penalties_;
  PinnedBuffer<PenaltyEntry> penalties_host_;
  Event penalties_uploaded_;
  std::vector<int32_t> counts_;  // [vocab], zero between draws
  std::array<Drawing, kRing> drawings_;
  size_t next_draw_ = 0, next_collect_ = 0;

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
