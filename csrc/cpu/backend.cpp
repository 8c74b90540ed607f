// The CPU behind the seam: arenas of state, the buffers of a step, and the ops over one shard.
#include "engine/backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/memory.h"
#include "cpu/ops.h"
#include "engine/probe.h"
#include "model/forward.h"

namespace qwen_moe::cpu {
namespace {

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options)
      : config_(options.model->config()),
        weights_(options.model->shard(options.shard)),
        layout_(declare_state(config_, weights_.span, weights_.last, options.kv_dtype)),
        kv_dtype_(options.kv_dtype),
        pool_(ThreadPool::shared(options.threads)) {
    require(kv_dtype_ == DType::f32 || kv_dtype_ == DType::bf16,
            "kv_dtype must be float32 or bfloat16, got ", dtype_name(kv_dtype_));
    // Fixed buffers follow each other in a slot; k and v of a layer follow each other in a page.
    for (const StateBuffer& b : layout_.buffers) {
      size_t& total = b.kind == BufferKind::fixed ? slot_bytes_ : page_bytes_;
      offsets_.push_back(total);
      total += round_up(b.bytes() * (b.kind == BufferKind::fixed ? 1 : kPageTokens));
    }
  }

  const StateLayout& layout() const override { return layout_; }

  void reserve(const ReserveOptions& options) override {
    slots_ = static_cast<size_t>(options.slots) + 1;
    pages_ = static_cast<size_t>(options.pages) + 1;
    size_t state = slots_ * slot_bytes_ + pages_ * page_bytes_, available = available_memory();
    require<Capacity>(available == 0 || state < available, options.slots, " sessions of ",
                      options.max_context, " tokens need ", state >> 20, " MiB of state, of which ",
                      slot_bytes_, " bytes for each session and ", page_bytes_ / kPageTokens,
                      " for each token; ", available >> 20,
                      " MiB are available. Lower max_sessions or max_context");
    slot_arena_ = HostBuffer<std::byte>(slots_ * slot_bytes_);
    page_arena_ = HostBuffer<std::byte>(pages_ * page_bytes_);
    generation_.assign(slots_, 0);

    rows_ = std::max(kPrefillChunk, kMaxRows);
    auto r = static_cast<size_t>(rows_);
    auto hidden = static_cast<size_t>(config_.hidden_size);
    int delta = config_.conv_dim() + config_.value_dim() + 2 * config_.linear_num_value_heads;
    int attention = 2 * config_.attention_dim() + 2 * config_.kv_dim();
    buffers_.proj_stride = (std::max(delta, attention) + 15) / 16 * 16;
    auto take = [&](size_t count) {
      scratch_.emplace_back(count);
      return scratch_.back().data();
    };
    buffers_.hidden = take(r * hidden);
    buffers_.proj = take(r * static_cast<size_t>(buffers_.proj_stride));
    buffers_.core =
        take(r * static_cast<size_t>(std::max(config_.value_dim(), config_.attention_dim())));
    buffers_.normed = take(r * hidden);
    buffers_.router = take(r * static_cast<size_t>(config_.num_experts));
    buffers_.shared_scale = take(r);
    buffers_.shared = take(r * static_cast<size_t>(config_.shared_expert_intermediate_size));
    buffers_.routed =
        take(r * static_cast<size_t>(config_.num_experts_per_tok * config_.moe_intermediate_size));
    ops_ = std::make_unique<CpuOps>(config_, *pool_, rows_, options.max_context);

    position_.resize(r);
    token_.resize(r);
    slot_.resize(r);
    drawn_.resize(static_cast<size_t>(kMaxRows));
    pages_stride_ = (options.max_context + kPageTokens - 1) / kPageTokens;
    page_table_.resize(static_cast<size_t>(kMaxRows) * static_cast<size_t>(pages_stride_));

    for (size_t i = 0; i < weights_.layers.size(); ++i)
      state_.push_back(layer_state(weights_.span.begin + static_cast<int>(i)));
    if (weights_.last) logits_ = slot_array("lm_head.logits");
  }

  std::map<std::string, size_t> memory() const override {
    size_t scratch = ops_ ? ops_->scratch_bytes() : 0;
    for (const auto& buffer : scratch_) scratch += buffer.bytes();
    return {{"session state", slot_arena_.bytes()},
            {"kv pages", page_arena_.bytes()},
            {"scratch", scratch}};
  }

  Discovered discover(int slot, int page) override {
    Handoff zeros{buffers_.hidden, DType::f32, 2, config_.hidden_size};
    return probe_writes(
        *this, slot, generation_[static_cast<size_t>(slot)], page,
        weights_.first ? nullptr : &zeros, offsets_,
        [&] {
          std::memset(slot_at(slot), kProbePattern, slot_bytes_);
          std::memset(page_at(page), kProbePattern, page_bytes_);
        },
        [&](BufferKind kind) { return kind == BufferKind::fixed ? slot_at(slot) : page_at(page); });
  }

  void set_generation(int slot, uint32_t generation) override {
    generation_.at(static_cast<size_t>(slot)) = generation;
  }
  void clear_slot(int slot) override { std::memset(slot_at(slot), 0, slot_bytes_); }
  void copy_slot(int to, int from) override {
    std::memcpy(slot_at(to), slot_at(from), slot_bytes_);
  }
  void copy_page(int to, int from) override {
    std::memcpy(page_at(to), page_at(from), page_bytes_);
  }
  // All bits set is a NaN in float32 and in bfloat16.
  void poison_slot(int slot) override { std::memset(slot_at(slot), 0xff, slot_bytes_); }
  void poison_page(int page) override { std::memset(page_at(page), 0xff, page_bytes_); }

  void read_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                   std::span<std::byte> to) override {
    move(buffer, slot, pages, tokens, [&](std::byte* state, size_t offset, size_t bytes) {
      std::memcpy(to.data() + offset, state, bytes);
    });
  }
  void write_buffer(size_t buffer, int slot, std::span<const int32_t> pages, int tokens,
                    std::span<const std::byte> from) override {
    move(buffer, slot, pages, tokens, [&](std::byte* state, size_t offset, size_t bytes) {
      std::memcpy(state, from.data() + offset, bytes);
    });
  }

  void prefill(const PrefillStep& step, const Handoff* input) override {
    int rows = static_cast<int>(step.tokens.size());
    require(rows > 0 && rows <= rows_, "a prefill step takes 1 to ", rows_, " tokens, got ", rows);
    check_generation(step.slot, step.generation);
    for (int i = 0; i < rows; ++i) {
      auto at = static_cast<size_t>(i);
      token_[at] = step.tokens[at];
      position_[at] = step.position + i;
      slot_[at] = step.slot;
    }
    forward(rows, step.pages.data(), 0, Phase::prefill, input);
    if (weights_.last && step.logits)
      ops_->lm_head(
          {.logits = logits_,
           .hidden = buffers_.hidden + static_cast<int64_t>(rows - 1) * config_.hidden_size,
           .norm = weights_.norm,
           .lm_head = weights_.lm_head,
           .slot = slot_.data(),
           .rows = 1});
  }

  void decode(std::span<const DecodeRow> rows, const Handoff* input) override {
    require(!rows.empty() && rows.size() <= static_cast<size_t>(kMaxRows),
            "a decode step takes 1 to ", kMaxRows, " rows, got ", rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const DecodeRow& row = rows[i];
      check_generation(row.slot, row.generation);
      token_[i] = row.token;
      position_[i] = row.position;
      slot_[i] = row.slot;
      std::copy_n(row.pages.data(), row.position / kPageTokens + 1,
                  page_table_.data() + static_cast<int64_t>(i) * pages_stride_);
    }
    int count = static_cast<int>(rows.size());
    forward(count, page_table_.data(), pages_stride_, Phase::decode, input);
    if (weights_.last)
      ops_->lm_head({.logits = logits_,
                     .hidden = buffers_.hidden,
                     .norm = weights_.norm,
                     .lm_head = weights_.lm_head,
                     .slot = slot_.data(),
                     .rows = count});
  }

  Handoff hidden() const override {
    return {buffers_.hidden, DType::f32, last_rows_, config_.hidden_size};
  }

  // Draws at once, and keeps the results until they are collected.
  void draw(std::span<const SampleRow> rows) override {
    require(rows.size() <= drawn_.size(), "a draw takes up to ", drawn_.size(), " rows, got ",
            rows.size());
    ops_->sample(rows, logits_, {drawn_.data(), rows.size()});
  }
  void collect(std::span<SampleResult> results) override {
    std::copy_n(drawn_.begin(), results.size(), results.begin());
  }

  void read_logits(int slot, std::span<float> to) override {
    std::copy_n(logits_.at(slot), to.size(), to.data());
  }

 private:
  std::byte* slot_at(int slot) const {
    return slot_arena_.data() + static_cast<size_t>(slot) * slot_bytes_;
  }
  std::byte* page_at(int page) const {
    return page_arena_.data() + static_cast<size_t>(page) * page_bytes_;
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
      state.kv = {page_arena_.data() + offset_of(prefix + "self_attn.k_cache"),
                  static_cast<int64_t>(page_bytes_), kv_dtype_};
    }
    return state;
  }

  void check_generation(int slot, uint32_t generation) const {
    require<Error>(generation_.at(static_cast<size_t>(slot)) == generation, "slot ", slot,
                   " is at generation ", generation_[static_cast<size_t>(slot)],
                   ", the step expects ", generation, "; nothing was written");
  }

  void forward(int rows, const int32_t* pages, int64_t pages_stride, Phase phase,
               const Handoff* input) {
    last_rows_ = rows;
    if (input)
      std::memcpy(
          buffers_.hidden, input->data,
          static_cast<size_t>(rows) * static_cast<size_t>(config_.hidden_size) * sizeof(float));
    StepRows step{.rows = rows,
                  .token = token_.data(),
                  .position = position_.data(),
                  .slot = slot_.data(),
                  .pages = pages,
                  .pages_stride = pages_stride};
    ops_->begin(step);
    forward_layers(*ops_, weights_, state_, buffers_, step, phase);
  }

  // Calls copy(state bytes, offset in the row-major form, bytes) for every contiguous run of a
  // buffer.
  template <class Copy>
  void move(size_t buffer, int slot, std::span<const int32_t> pages, int tokens, const Copy& copy) {
    const StateBuffer& b = layout_.buffers.at(buffer);
    if (b.kind == BufferKind::fixed) return copy(slot_at(slot) + offsets_[buffer], 0, b.bytes());
    auto heads = static_cast<size_t>(b.shape[0]);
    size_t row = b.bytes() / heads;  // one head of one token; a page is [heads, 64, head_dim]
    for (int t = 0; t < tokens; ++t)
      for (size_t h = 0; h < heads; ++h)
        copy(page_at(pages[static_cast<size_t>(t / kPageTokens)]) + offsets_[buffer] +
                 (h * kPageTokens + static_cast<size_t>(t % kPageTokens)) * row,
             (static_cast<size_t>(t) * heads + h) * row, row);
  }

  const ModelConfig& config_;
  ShardWeights weights_;
  StateLayout layout_;
  DType kv_dtype_;
  std::shared_ptr<ThreadPool> pool_;

  std::vector<size_t> offsets_;  // of every buffer, in its slot or page
  size_t slot_bytes_ = 0, page_bytes_ = 0, slots_ = 0, pages_ = 0;
  HostBuffer<std::byte> slot_arena_;  // [slots, slot_bytes]
  HostBuffer<std::byte> page_arena_;  // [pages, page_bytes]
  std::vector<uint32_t> generation_;  // [slots]
  std::vector<LayerState> state_;
  SlotArray logits_;

  std::unique_ptr<CpuOps> ops_;
  std::vector<HostBuffer<float>> scratch_;
  Buffers<float> buffers_;
  int rows_ = 0, last_rows_ = 0;
  std::vector<int32_t> token_, position_, slot_, page_table_;
  std::vector<SampleResult> drawn_;
  int64_t pages_stride_ = 0;
};

static_assert(OpSet<CpuOps>);

}  // namespace
}  // namespace qwen_moe::cpu

namespace qwen_moe {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options);
}

}  // namespace qwen_moe
