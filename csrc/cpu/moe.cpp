// Router, routed experts and shared expert on the host.
#include <algorithm>
#include <cmath>

#include "cpu/ops.h"

namespace qwen_moe::cpu {

void CpuOps::norm_router_shared(const NormRouterSharedArgs<float>& args) {
  int hidden = c_.hidden_size, shared = c_.shared_expert_intermediate_size;
  const LayerWeights& w = args.layer;
  int group = input_group({&w.shared_gate, &w.shared_up, &w.experts_gate_up});
  each_row(args.rows, [&](int row, int) {
    size_t at = static_cast<size_t>(row) * static_cast<size_t>(hidden);
    k_.rms_norm(args.normed + at, args.hidden + at, w.post_attention_layernorm, hidden,
                static_cast<float>(c_.rms_norm_eps));
    if (group) quantize(in_q_, args.normed + at, row, hidden, group);
  });
  int64_t stride = 2 * static_cast<int64_t>(shared);
  Projection projections[] = {{&w.gate, args.router, c_.num_experts},
                              {&w.shared_gate, shared_gate_up_.data(), stride},
                              {&w.shared_up, shared_gate_up_.data() + shared, stride},
                              {&w.shared_expert_gate, args.shared_scale, 1}};
  project(projections, activations(in_q_, args.normed), args.rows);
  each_row(args.rows, [&](int row, int) {
    const float* gate = shared_gate_up_.data() + row * stride;
    k_.silu_mul(args.shared + static_cast<int64_t>(row) * shared, gate, gate + shared, shared);
  });
}

// Softmax over all experts, the top k of it with ties to the lowest index, renormalised to sum 1.
void CpuOps::route(int row, const float* logits) {
  int experts = c_.num_experts, top_k = c_.num_experts_per_tok;
  int32_t* pick = expert_of_.data() + static_cast<int64_t>(row) * top_k;
  float* weight = weight_of_.data() + static_cast<int64_t>(row) * top_k;
  int picked = 0;
  for (int e = 0; e < experts; ++e) {
    // Insertion into a short sorted list; a NaN never compares larger and so never displaces.
    if (picked == top_k && !(logits[e] > logits[pick[top_k - 1]])) continue;
    int at = picked < top_k ? picked++ : top_k - 1;
    for (; at > 0 && logits[e] > logits[pick[at - 1]]; --at) pick[at] = pick[at - 1];
    pick[at] = e;
  }
  // exp(l - max) over the picks: the softmax's denominator cancels in the renormalisation.
  float sum = 0;
  for (int i = 0; i < top_k; ++i) sum += weight[i] = std::exp(logits[pick[i]] - logits[pick[0]]);
  for (int i = 0; i < top_k; ++i) weight[i] /= sum;
}

// Counting sort of the picks by expert; within an expert rows stay in order.
void CpuOps::group_by_expert(int rows) {
  int picks = rows * c_.num_experts_per_tok;
  std::fill(expert_begin_.begin(), expert_begin_.end(), 0);
  for (int i = 0; i < picks; ++i)
    ++expert_begin_[static_cast<size_t>(expert_of_[static_cast<size_t>(i)]) + 1];
  active_.clear();
  for (int e = 0; e < c_.num_experts; ++e) {
    auto at = static_cast<size_t>(e);
    if (expert_begin_[at + 1] > 0) active_.push_back(e);
    expert_begin_[at + 1] += expert_begin_[at];
  }
  for (int i = 0; i < picks; ++i) {
    int place = expert_begin_[static_cast<size_t>(expert_of_[static_cast<size_t>(i)])]++;
    pair_of_[static_cast<size_t>(i)] = place;
    row_of_[static_cast<size_t>(place)] = i / c_.num_experts_per_tok;
  }
  for (int e = c_.num_experts; e > 0; --e)
    expert_begin_[static_cast<size_t>(e)] = expert_begin_[static_cast<size_t>(e) - 1];
  expert_begin_[0] = 0;
}

void CpuOps::routed_gate_up(const RoutedGateUpArgs<float>& args) {
  int inter = c_.moe_intermediate_size;
  const WeightView& weight = args.layer.experts_gate_up;
  each_row(args.rows.rows, [&](int row, int) {
    route(row, args.router + static_cast<int64_t>(row) * c_.num_experts);
  });
  group_by_expert(args.rows.rows);

  // A task takes some gate tiles and the matching up tiles of one expert.
  Activations in = activations(in_q_, args.normed);
  int half = inter / kTile;
  int chunk = tile_chunk(half * static_cast<int>(active_.size()), args.rows.rows);
  chunk = std::min(chunk, half);
  int parts = (half + chunk - 1) / chunk;
  pool_.run(static_cast<int>(active_.size()) * parts, [&](int task, int) {
    int expert = active_[static_cast<size_t>(task / parts)];
    int first = task % parts * chunk, last = std::min(first + chunk, half);
    int begin = expert_begin_[static_cast<size_t>(expert)],
        end = expert_begin_[static_cast<size_t>(expert) + 1];
    float* out = gate_up_.data() + static_cast<int64_t>(begin) * 2 * inter;
    GemmArgs gemm{.out = out,
                  .out_stride = 2 * inter,
                  .weight = weight.matrix(expert),
                  .spec = &weight.spec,
                  .in = in,
                  .row_index = row_of_.data() + begin,
                  .rows = end - begin,
                  .tile_begin = first,
                  .tile_end = last};
    k_.gemm(gemm);
    gemm.tile_begin += half;
    gemm.tile_end += half;
    k_.gemm(gemm);
    for (int pair = begin; pair < end; ++pair, out += 2 * inter)
      k_.silu_mul(args.routed + static_cast<int64_t>(pair) * inter + first * kTile,
                  out + first * kTile, out + inter + first * kTile, (last - first) * kTile);
  });
}

void CpuOps::down_combine_residual(const DownCombineArgs<float>& args) {
  int hidden = c_.hidden_size, inter = c_.moe_intermediate_size, top_k = c_.num_experts_per_tok;
  const WeightView& routed_down = args.layer.experts_down;
  const WeightView& shared_down = args.layer.shared_down;
  int picks = args.rows.rows * top_k;
  // The shared rows lie behind the routed ones in the quantized scratch.
  struct Block {
    const WeightView& weight;
    const float* x;         // [rows, k]
    size_t values, blocks;  // where it begins in mid_q_
  };
  auto routed_values = static_cast<size_t>(picks) * static_cast<size_t>(inter);
  const Block routed_block{routed_down, args.routed, 0, 0};
  const Block shared_block{shared_down, args.shared, routed_values, routed_values / 32};
  auto rows_from = [&](const Block& b, int row) {
    auto k = static_cast<size_t>(b.weight.spec.k), r = static_cast<size_t>(row);
    size_t block = b.blocks + r * (k / static_cast<size_t>(std::max(b.weight.spec.group, 32)));
    return Activations{.x = b.x + r * k,
                       .q = mid_q_.q.data() + b.values + r * k,
                       .scale = mid_q_.scale.data() + block,
                       .sum = mid_q_.sum.data() + block};
  };
  auto quantize_row = [&](const Block& b, int row) {
    if (!is_quantized(b.weight.spec.format)) return;
    int k = b.weight.spec.k;
    Activations to = rows_from(b, row);
    k_.quantize_rows(const_cast<int16_t*>(to.q), const_cast<float*>(to.scale),
                     const_cast<int32_t*>(to.sum), to.x, 1, k, b.weight.spec.group);
  };
  each_row(picks, [&](int pair, int) { quantize_row(routed_block, pair); });
  each_row(args.rows.rows, [&](int row, int) { quantize_row(shared_block, row); });

  int tiles = routed_down.spec.tiles();
  int chunk =
      std::min(tile_chunk(tiles * static_cast<int>(active_.size() + 1), args.rows.rows), tiles);
  int parts = (tiles + chunk - 1) / chunk;
  pool_.run(static_cast<int>(active_.size() + 1) * parts, [&](int task, int) {
    auto which = static_cast<size_t>(task / parts);
    bool is_shared = which == active_.size();
    int expert = is_shared ? 0 : active_[which];
    int begin = is_shared ? 0 : expert_begin_[static_cast<size_t>(expert)];
    int end = is_shared ? args.rows.rows : expert_begin_[static_cast<size_t>(expert) + 1];
    const Block& block = is_shared ? shared_block : routed_block;
    k_.gemm({.out = (is_shared ? shared_down_.data() : down_.data()) +
                    static_cast<int64_t>(begin) * hidden,
             .out_stride = hidden,
             .weight = block.weight.matrix(expert),
             .spec = &block.weight.spec,
             .in = rows_from(block, begin),
             .row_index = nullptr,
             .rows = end - begin,
             .tile_begin = task % parts * chunk,
             .tile_end = std::min((task % parts + 1) * chunk, tiles)});
  });

  // Ranks in order, then the shared expert, then the residual: the same sum whatever the batch.
  each_row(args.rows.rows, [&](int row, int) {
    float* sum = normed_.data() + static_cast<int64_t>(row) * hidden;
    std::fill_n(sum, hidden, 0.0f);
    for (int rank = 0; rank < top_k; ++rank) {
      auto pick = static_cast<size_t>(row * top_k + rank);
      k_.axpy(sum, weight_of_[pick], down_.data() + static_cast<int64_t>(pair_of_[pick]) * hidden,
              hidden);
    }
    float gate = 1.0f / (1.0f + std::exp(-args.shared_scale[row]));
    k_.axpy(sum, gate, shared_down_.data() + static_cast<int64_t>(row) * hidden, hidden);
    k_.add(args.hidden + static_cast<int64_t>(row) * hidden, sum, hidden);
  });
}

}  // namespace qwen_moe::cpu
