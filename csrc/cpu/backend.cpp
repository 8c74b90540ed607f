// The CPU behind the seam: arenas of state, the buffers of a step, and the ops over one shard.
#include "engine/backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/memory.h"
#include "cpu/ops.h"
#include "engine/probe.h"
#include "model/forward.h"
#include "state/places.h"

namespace qwen_moe::cpu {
namespace {

constexpr size_t kAlign = 64;

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options)
      : config_(options.model->config()),
        weights_(options.model->shard(options.shard)),
        places_(declare_state(config_, weights_.span, weights_.last, options.kv_dtype), kAlign),
        pool_(ThreadPool::shared(options.threads)) {
    require(options.kv_dtype == DType::f32 || options.kv_dtype == DType::bf16,
            "kv_dtype must be float32 or bfloat16, got ", dtype_name(options.kv_dtype));
  }

  const StateLayout& layout() const override { return places_.layout(); }

  void reserve(const ReserveOptions& options) override {
    slots_ = static_cast<size_t>(options.slots) + 1;
    pages_ = static_cast<size_t>(options.pages) + 1;
    size_t state = slots_ * places_.slot_bytes() + pages_ * places_.page_bytes(),
           available = available_memory();
    require<Capacity>(available == 0 || state < available, options.slots, " sessions of ",
                      options.max_context, " tokens need ", state >> 20, " MiB of state, of which ",
                      places_.slot_bytes(), " bytes for each session and ",
                      places_.page_bytes() / kPageTokens, " for each token; ", available >> 20,
                      " MiB are available. Lower max_sessions or max_context");
    slot_arena_ = HostBuffer<std::byte>(slots_ * places_.slot_bytes());
    page_arena_ = HostBuffer<std::byte>(pages_ * places_.page_bytes());
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

    for (size_t i = 0; i < weights_.layers.size(); ++i) {
      int layer = weights_.span.begin + static_cast<int>(i);
      state_.push_back(places_.layer(config_.layer_types[static_cast<size_t>(layer)], layer,
                                     slot_arena_.data(), page_arena_.data()));
    }
    if (weights_.last) logits_ = places_.slot_array(slot_arena_.data(), "lm_head.logits");
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
        weights_.first ? nullptr : &zeros, places_.offsets(),
        [&] {
          std::memset(slot_at(slot), kProbePattern, places_.slot_bytes());
          std::memset(page_at(page), kProbePattern, places_.page_bytes());
        },
        [&](BufferKind kind) { return kind == BufferKind::fixed ? slot_at(slot) : page_at(page); });
  }

  void set_generation(int slot, uint32_t generation) override {
    generation_.at(static_cast<size_t>(slot)) = generation;
  }
  void clear_slot(int slot) override { std::memset(slot_at(slot), 0, places_.slot_bytes()); }
  void copy_slot(int to, int from) override {
    std::memcpy(slot_at(to), slot_at(from), places_.slot_bytes());
  }
  void copy_page(int to, int from) override {
    std::memcpy(page_at(to), page_at(from), places_.page_bytes());
  }
  // All bits set is a NaN in float32 and in bfloat16.
  void poison_slot(int slot) override { std::memset(slot_at(slot), 0xff, places_.slot_bytes()); }
  void poison_page(int page) override { std::memset(page_at(page), 0xff, places_.page_bytes()); }

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
    return slot_arena_.data() + static_cast<size_t>(slot) * places_.slot_bytes();
  }
  std::byte* page_at(int page) const {
    return page_arena_.data() + static_cast<size_t>(page) * places_.page_bytes();
  }

  void check_generation(int slot, uint32_t generation) const {
    require_generation(slot, generation_.at(static_cast<size_t>(slot)), generation);
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
    const StateBuffer& b = layout().buffers.at(buffer);
    if (b.kind == BufferKind::fixed)
      return copy(slot_at(slot) + places_.offsets()[buffer], 0, b.bytes());
    auto heads = static_cast<size_t>(b.shape[0]);
    size_t row = b.bytes() / heads;  // one head of one token; a page is [heads, 64, head_dim]
    for (int t = 0; t < tokens; ++t)
      for (size_t h = 0; h < heads; ++h)
        copy(page_at(pages[static_cast<size_t>(t / kPageTokens)]) + places_.offsets()[buffer] +
                 (h * kPageTokens + static_cast<size_t>(t % kPageTokens)) * row,
             (static_cast<size_t>(t) * heads + h) * row, row);
  }

  const ModelConfig& config_;
  ShardWeights weights_;
  StatePlaces places_;
  std::shared_ptr<ThreadPool> pool_;

  size_t slots_ = 0, pages_ = 0;
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
