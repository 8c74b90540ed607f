// Norms, projections, embedding and head on the host.
#include <algorithm>
#include <cmath>

#include "cpu/ops.h"
#include "cpu/pack.h"

namespace qwen_moe::cpu {

namespace {
constexpr int kTileChunk = 8;  // tiles whose output passes through per-worker scratch
}

CpuOps::CpuOps(const ModelConfig& config, ThreadPool& pool, int rows, int max_context)
    : c_(config), pool_(pool), k_(kernels()), max_rows_(rows) {
  auto r = static_cast<size_t>(rows);
  auto workers = static_cast<size_t>(pool.size());
  auto hidden = static_cast<size_t>(c_.hidden_size);
  auto picks = r * static_cast<size_t>(c_.num_experts_per_tok);
  auto inter = static_cast<size_t>(c_.moe_intermediate_size);
  auto shared = static_cast<size_t>(c_.shared_expert_intermediate_size);
  auto core = static_cast<size_t>(std::max(c_.value_dim(), c_.attention_dim()));
  auto vocab = static_cast<size_t>(c_.vocab_size);

  normed_ = HostBuffer<float>(r * hidden);
  in_q_ = QuantizedRows(r * hidden);
  mid_q_ = QuantizedRows(std::max(r * core, picks * inter + r * shared));
  tile_ = HostBuffer<float>(workers * r * kTileChunk * kTile);
  cos_ = HostBuffer<float>(r * static_cast<size_t>(c_.rotary_dim() / 2));
  sin_ = HostBuffer<float>(r * static_cast<size_t>(c_.rotary_dim() / 2));

  qkv_ = HostBuffer<float>(r * static_cast<size_t>(c_.conv_dim()));
  log_decay_ = HostBuffer<float>(r * static_cast<size_t>(c_.linear_num_value_heads));
  beta_ = HostBuffer<float>(r * static_cast<size_t>(c_.linear_num_value_heads));
  auto dk = static_cast<size_t>(c_.linear_key_head_dim),
       dv = static_cast<size_t>(c_.linear_value_head_dim);
  delta_work_size_ = kPageTokens * (3 * kPageTokens + dk + 2 * dv + 2);
  delta_work_ = HostBuffer<float>(workers * delta_work_size_);

  query_ = HostBuffer<float>(r * static_cast<size_t>(c_.attention_dim()));
  auto group = static_cast<size_t>(c_.num_attention_heads / c_.num_key_value_heads);
  auto dim = static_cast<size_t>(c_.head_dim);
  max_splits_ = (max_context + 511) / 512;
  partial_ =
      HostBuffer<float>(64 * static_cast<size_t>(c_.num_attention_heads * max_splits_) * (dim + 2));
  attention_work_size_ = 2 * kPageTokens * dim + 16 * group * (2 * dim + kPageTokens + 2);
  attention_work_ = HostBuffer<float>(workers * attention_work_size_);

  expert_of_ = HostBuffer<int32_t>(picks);
  weight_of_ = HostBuffer<float>(picks);
  pair_of_ = HostBuffer<int32_t>(picks);
  row_of_ = HostBuffer<int32_t>(picks);
  expert_begin_.resize(static_cast<size_t>(c_.num_experts) + 1);
  active_.reserve(static_cast<size_t>(c_.num_experts));
  gate_up_ = HostBuffer<float>(picks * 2 * inter);
  shared_gate_up_ = HostBuffer<float>(r * 2 * shared);
  down_ = HostBuffer<float>(picks * hidden);
  shared_down_ = HostBuffer<float>(r * hidden);

  candidates_ = HostBuffer<Candidate>(workers * vocab);
  adjusted_ = HostBuffer<float>(workers * vocab);
  counts_ = HostBuffer<int32_t>(workers * vocab);
}

size_t CpuOps::scratch_bytes() const {
  size_t bytes = in_q_.bytes() + mid_q_.bytes() + candidates_.bytes();
  for (const HostBuffer<float>* b :
       {&normed_, &tile_, &cos_, &sin_, &qkv_, &log_decay_, &beta_, &delta_work_, &query_,
        &partial_, &attention_work_, &weight_of_, &gate_up_, &shared_gate_up_, &down_,
        &shared_down_, &adjusted_})
    bytes += b->bytes();
  for (const HostBuffer<int32_t>* b : {&expert_of_, &pair_of_, &row_of_, &counts_})
    bytes += b->bytes();
  return bytes;
}

void CpuOps::begin(const StepRows& rows) {
  int half = c_.rotary_dim() / 2;
  for (int i = 0; i < half; ++i) {
    float frequency = c_.inverse_frequency(i);
    for (int row = 0; row < rows.rows; ++row) {
      float angle = static_cast<float>(rows.position[row]) * frequency;
      cos_[static_cast<size_t>(row * half + i)] = std::cos(angle);
      sin_[static_cast<size_t>(row * half + i)] = std::sin(angle);
    }
  }
}

Activations CpuOps::activations(const QuantizedRows& rows, const float* x) const {
  return {.x = x, .q = rows.q.data(), .scale = rows.scale.data(), .sum = rows.sum.data()};
}

int input_group(std::initializer_list<const WeightView*> weights) {
  int group = 0;
  for (const WeightView* w : weights)
    if (is_quantized(w->spec.format)) group = w->spec.group;
  return group;
}

void CpuOps::quantize(QuantizedRows& to, const float* x, int row, int k, int group) {
  size_t at = static_cast<size_t>(row) * static_cast<size_t>(k);
  size_t block = at / static_cast<size_t>(group);
  k_.quantize_rows(to.q.data() + at, to.scale.data() + block, to.sum.data() + block, x, 1, k,
                   group);
}

int CpuOps::tile_chunk(int tiles, int rows) const {
  // Few rows read each weight once: small tasks keep the threads level to the end. Many rows are
  // read again for every task: large tasks, as many as balance needs.
  if (rows <= 8) return std::min(tiles, 4);
  return std::clamp(tiles / (pool_.size() * 4), 1, 32);
}

void CpuOps::project(std::span<const Projection> projections, const Activations& in, int rows) {
  int tiles = 0;
  for (const Projection& p : projections) tiles += p.weight->spec.tiles();
  int chunk = tile_chunk(tiles, rows);
  pool_.run((tiles + chunk - 1) / chunk, [&](int task, int) {
    int begin = task * chunk, end = std::min(begin + chunk, tiles);
    for (const Projection& p : projections) {
      int count = p.weight->spec.tiles();
      int first = std::max(begin, 0), last = std::min(end, count);
      if (first < last)
        k_.gemm({.out = p.out,
                 .out_stride = p.out_stride,
                 .weight = p.weight->data,
                 .spec = &p.weight->spec,
                 .in = in,
                 .row_index = nullptr,
                 .rows = rows,
                 .tile_begin = first,
                 .tile_end = last});
      begin -= count;
      end -= count;
    }
  });
}

void CpuOps::embed(const EmbedArgs<float>& args) {
  auto hidden = static_cast<size_t>(c_.hidden_size);
  each_row(args.rows.rows, [&](int row, int) {
    unpack_row(args.hidden + static_cast<size_t>(row) * hidden, args.embed_tokens.spec,
               args.embed_tokens.data, args.rows.token[row]);
  });
}

void CpuOps::norm_in_proj(const NormInProjArgs<float>& args) {
  int hidden = c_.hidden_size;
  const LayerWeights& w = args.layer;
  bool linear = w.type == LayerType::linear_attention;
  int group = linear ? input_group({&w.in_proj_qkv, &w.in_proj_z})
                     : input_group({&w.q_proj, &w.k_proj, &w.v_proj});
  each_row(args.rows.rows, [&](int row, int) {
    size_t at = static_cast<size_t>(row) * static_cast<size_t>(hidden);
    k_.rms_norm(normed_.data() + at, args.hidden + at, w.input_layernorm, hidden,
                static_cast<float>(c_.rms_norm_eps));
    if (group) quantize(in_q_, normed_.data() + at, row, hidden, group);
  });
  Activations in = activations(in_q_, normed_.data());
  float* out = args.proj;
  if (linear) {
    float* z = out + c_.conv_dim();
    float* b = z + c_.value_dim();
    float* a = b + c_.linear_num_value_heads;
    Projection projections[] = {{&w.in_proj_qkv, out, args.proj_stride},
                                {&w.in_proj_z, z, args.proj_stride},
                                {&w.in_proj_b, b, args.proj_stride},
                                {&w.in_proj_a, a, args.proj_stride}};
    project(projections, in, args.rows.rows);
  } else {
    float* k = out + 2 * c_.attention_dim();
    float* v = k + c_.kv_dim();
    Projection projections[] = {{&w.q_proj, out, args.proj_stride},
                                {&w.k_proj, k, args.proj_stride},
                                {&w.v_proj, v, args.proj_stride}};
    project(projections, in, args.rows.rows);
  }
}

// As project() for one weight, but every piece of a row goes to sink(row, first output, values, n)
// instead of to memory: to be added, or scattered.
template <class Sink>
void CpuOps::project_into(const WeightView& weight, const Activations& in, int rows,
                          const Sink& sink) {
  const WeightSpec& spec = weight.spec;
  int tiles = spec.tiles(), chunk = std::min(tile_chunk(tiles, rows), kTileChunk);
  pool_.run((tiles + chunk - 1) / chunk, [&](int task, int worker) {
    int first = task * chunk, last = std::min(first + chunk, tiles);
    int64_t width = static_cast<int64_t>(chunk) * kTile;
    size_t share = static_cast<size_t>(max_rows_) * kTileChunk * kTile;
    float* tile = tile_.data() + static_cast<size_t>(worker) * share;
    // `out` is shifted so that output n of row r lands at tile[r, n - 16 * first].
    k_.gemm({.out = tile - static_cast<int64_t>(first) * kTile,
             .out_stride = width,
             .weight = weight.data,
             .spec = &spec,
             .in = in,
             .row_index = nullptr,
             .rows = rows,
             .tile_begin = first,
             .tile_end = last});
    int n = std::min(last * kTile, spec.n) - first * kTile;
    for (int row = 0; row < rows; ++row) sink(row, first * kTile, tile + row * width, n);
  });
}

void CpuOps::out_proj_residual(const OutProjArgs<float>& args) {
  const WeightSpec& spec = args.weight.spec;
  if (is_quantized(spec.format))
    each_row(args.rows, [&](int row, int) {
      quantize(mid_q_, args.core + row * args.core_stride, row, spec.k, spec.group);
    });
  project_into(args.weight, activations(mid_q_, args.core), args.rows,
               [&](int row, int first, const float* values, int n) {
                 k_.add(args.hidden + static_cast<int64_t>(row) * spec.n + first, values, n);
               });
}

void CpuOps::lm_head(const LmHeadArgs<float>& args) {
  int hidden = c_.hidden_size;
  const WeightSpec& spec = args.lm_head.spec;
  each_row(args.rows, [&](int row, int) {
    size_t at = static_cast<size_t>(row) * static_cast<size_t>(hidden);
    k_.rms_norm(normed_.data() + at, args.hidden + at, args.norm, hidden,
                static_cast<float>(c_.rms_norm_eps));
    if (is_quantized(spec.format)) quantize(in_q_, normed_.data() + at, row, hidden, spec.group);
  });
  project_into(args.lm_head, activations(in_q_, normed_.data()), args.rows,
               [&](int row, int first, const float* values, int n) {
                 std::copy_n(values, n, args.logits.at(args.slot[row]) + first);
               });
}

}  // namespace qwen_moe::cpu
