#include "cuda/prefill.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace qwen_moe::cuda {
namespace {

constexpr int kChunk = kPageTokens;
constexpr int kFewRows = 512;  // up to that, small tiles give more blocks

// Tokens that a block of the router takes.
constexpr int part_of(int rows) { return rows <= kFewRows ? 4 : 16; }

unsigned blocks_of(int64_t count, int size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

const std::byte* codes_of(const WeightView& w) { return w.data + w.spec.scale_bytes(); }
int tile_words(const WeightView& w) { return static_cast<int>(w.spec.tile_bytes() / 4); }

std::string format_of(const WeightSpec& spec) {
  require(!spec.has_zero, "the prefill kernels take int4 without zero points");
  if (spec.format == WeightFormat::bf16) return "bf16";
  require(is_quantized(spec.format) && (spec.group == 64 || spec.group == 128),
          "the prefill kernels take bf16, or int8 and int4 with groups of 64 or 128, got ",
          format_name(spec.format), " with groups of ", spec.group);
  return concat(format_name(spec.format), "_g", spec.group);
}

}  // namespace

PrefillOps::PrefillOps(const ModelConfig& config, const DeviceProperties& device, Images& images,
                       CudaOps& decode, int max_rows)
    : c_(config), device_(device), images_(images), decode_(decode), max_rows_(max_rows) {
  require(c_.hidden_size <= 8192, "the prefill kernels take a hidden_size up to 8192, got ",
          c_.hidden_size);
  require(c_.num_experts <= 512 && c_.num_experts_per_tok <= 16,
          "the prefill kernels take up to 512 experts and 16 per token; this model has ",
          c_.num_experts, " and ", c_.num_experts_per_tok);
  require(c_.rotary_dim() % 32 == 0, "head_dim * partial_rotary_factor must be a multiple of 32 ",
          "for the prefill kernels, got ", c_.rotary_dim());
  proj_stride_ = std::max(c_.conv_dim() + c_.value_dim(), 2 * (c_.attention_dim() + c_.kv_dim()));
  scratch_ = DeviceBuffer<std::byte>(lay_out(nullptr));
  lay_out(scratch_.data());
}

size_t PrefillOps::lay_out(std::byte* base) {
  size_t used = 0;
  const auto rows = static_cast<size_t>(max_rows_);
  auto take = [&]<class T>(T*& to, size_t each, size_t count) {
    to = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (each * count * sizeof(T) + 255) / 256 * 256;
  };
  auto size = [](int n) { return static_cast<size_t>(n); };
  const size_t chunks = rows / kChunk + 2;  // the first and the last may be cut
  const size_t heads = size(c_.linear_num_value_heads), dim = size(c_.linear_value_head_dim);
  const int few = std::min(max_rows_, kFewRows);
  const size_t parts =
      std::max(blocks_of(few, part_of(few)), blocks_of(max_rows_, part_of(max_rows_)));
  const size_t picks = rows * size(c_.num_experts_per_tok), experts = size(c_.num_experts);
  take(normed_, size(c_.hidden_size), rows);
  take(shared_, size(c_.shared_expert_intermediate_size), rows);
  take(shared_scale_, 1, rows);
  // A layer's mixer has ended when its experts begin, so they share what follows.
  const size_t common = used;
  take(proj_, size(proj_stride_), rows);
  take(core_, size(std::max(c_.value_dim(), c_.attention_dim())), rows);
  take(gates_, 2 * heads, rows);
  take(qkv_, size(c_.conv_dim()), rows);
  take(delta_w_, heads * kChunk * dim, chunks);
  take(delta_u_, heads * kChunk * dim, chunks);
  take(delta_sums_, heads * kChunk, chunks);
  take(delta_states_, heads * dim * dim, chunks);
  take(query_, size(c_.attention_dim()), rows);
  const size_t mixer = std::exchange(used, common);
  take(router_, experts, rows);
  take(pick_weight_, 1, picks);
  take(ids_, 1, picks);
  take(ranks_, 1, picks);
  take(order_, 1, picks);
  take(counts_, experts, parts);
  take(places_, experts, parts);
  take(work_, 3, picks / 16 + experts + 1);
  take(expert_act_, size(c_.moe_intermediate_size), picks);
  take(expert_part_, size(c_.hidden_size), picks);
  return std::max(used, mixer);
}

void PrefillOps::begin(cudaStream_t stream, const PrefillRows& rows) {
  require<Error>(rows.rows >= 1 && rows.rows <= max_rows_, "a prefill step takes 1 to ", max_rows_,
                 " rows, got ", rows.rows);
  stream_ = stream;
  rows_ = rows;
}

// The order of a sum does not depend on the tile, so the tile may depend on the number of rows:
// the first of kernels/specs.py that gives most multiprocessors a block.
std::string PrefillOps::tile_of(const std::string& name, std::initializer_list<int> outputs,
                                unsigned& blocks) const {
  constexpr std::pair<int, int> kTiles[] = {{128, 128}, {128, 64}, {64, 64}, {32, 64}, {16, 64}};
  const auto enough = static_cast<unsigned>(device_.sms * 3 / 4);
  std::string chosen;
  for (auto [rows, wide] : kTiles) {
    if (rows > 16 && rows >= 2 * rows_.rows) continue;  // half of it would be no rows
    const std::string tile = concat(name, "_", rows, "x", wide);
    if (!fits(tile)) continue;
    chosen = tile;
    blocks = 0;
    for (int n : outputs) blocks += blocks_of(n, constant(chosen, "BN"));
    blocks *= blocks_of(rows_.rows, rows);
    if (blocks >= enough) break;
  }
  require(!chosen.empty(), "there is no kernel image ", name, " that fits in ",
          device_.shared_bytes, " bytes of shared memory. Compile them again");
  return chosen;
}

std::string PrefillOps::expert_tile(const char* kind, const WeightView& weight, int rows) {
  return concat(kind, "_", format_of(weight.spec), "_m", rows);
}

// By the rows that an expert has on average.
int PrefillOps::expert_rows(const LayerWeights& w) const {
  const int mean = rows_.rows * c_.num_experts_per_tok / c_.num_experts;
  for (auto [more_than, rows] : {std::pair{96, 128}, {32, 64}, {8, 32}})
    if (mean > more_than && fits(expert_tile("expert_gate_up", w.experts_gate_up, rows)) &&
        fits(expert_tile("expert_down", w.experts_down, rows)))
      return rows;
  return 16;
}

// A block of outputs for every block of work that the picks may need.
dim3 PrefillOps::expert_grid(const std::string& name, int outputs, int rows) const {
  const int picks = rows_.rows * c_.num_experts_per_tok;
  check_whole(outputs, name);
  return dim3(blocks_of(outputs, constant(name, "BN")) *
              static_cast<unsigned>(std::min(picks, picks / rows + c_.num_experts)));
}

// Those kernels take whole blocks of outputs.
void PrefillOps::check_whole(int outputs, const std::string& name) const {
  const int block = constant(name, "BN");
  require(outputs % block == 0, "prefill kernel ", name, " takes a multiple of ", block,
          " outputs, got ", outputs);
}

void PrefillOps::rms_norm(const float* hidden, const float* weight) {
  const int block = c_.hidden_size <= 2048 ? 2048 : c_.hidden_size <= 4096 ? 4096 : 8192;
  launch(concat("rms_norm_", block), dim3(static_cast<unsigned>(rows_.rows)),
         {normed_, hidden, weight, c_.hidden_size, static_cast<float>(c_.rms_norm_eps)});
}

void PrefillOps::launch_project(const std::string& name, unsigned blocks, void* out,
                                const bf16* input, const Parts& parts, const float* row_gate) {
  const WeightView& first = *parts[0].weight;
  auto outputs = [&](int i) { return parts[i].weight ? parts[i].weight->spec.n : 0; };
  auto words = [&](int i) -> int64_t {
    return parts[i].weight ? (parts[i].weight->data - first.data) / 4 : 0;
  };
  launch(
      name, dim3(blocks),
      {out, input, codes_of(first), first.data, row_gate, rows_.rows, first.spec.n, first.spec.k,
       tile_words(first), parts[0].stride, parts[0].offset, words(1), outputs(1), parts[1].stride,
       parts[1].offset, words(2), outputs(2), parts[2].stride, parts[2].offset});
}

void PrefillOps::project(const char* kind, void* out, const bf16* input, const Parts& parts,
                         const float* row_gate) {
  auto alike = [](const WeightSpec& a, const WeightSpec& b) {
    return a.format == b.format && a.group == b.group && a.k == b.k;
  };
  std::array<bool, 3> done{};
  for (size_t i = 0; i < parts.size(); ++i) {
    if (done[i] || parts[i].weight == nullptr) continue;
    const WeightSpec& spec = parts[i].weight->spec;
    Parts together{};
    size_t count = 0;
    for (size_t j = i; j < parts.size(); ++j)
      if (!done[j] && parts[j].weight && alike(parts[j].weight->spec, spec)) {
        together[count++] = parts[j];
        done[j] = true;
      }
    auto n = [&](size_t j) { return j < count ? together[j].weight->spec.n : 0; };
    unsigned blocks = 0;
    const std::string name =
        tile_of(concat(kind, "_", format_of(spec)), {n(0), n(1), n(2)}, blocks);
    launch_project(name, blocks, out, input, together, row_gate);
  }
}

void PrefillOps::project_narrow(float* out, const Parts& parts) {
  const bool few = rows_.rows <= kFewRows && c_.hidden_size % 128 == 0;
  const std::string name = few ? "project_narrow_32" : "project_narrow_64";
  unsigned blocks = 0;
  for (const Part& part : parts) {
    if (part.weight == nullptr) continue;
    require(part.weight->spec.format == WeightFormat::bf16,
            "the router and the gates must be bf16, got ", format_name(part.weight->spec.format));
    blocks += blocks_of(part.weight->spec.n, constant(name, "BN"));
  }
  launch_project(name, blocks * blocks_of(rows_.rows, constant(name, "BM")), out, normed_, parts,
                 nullptr);
}

void PrefillOps::norm_in_proj(const NormInProjArgs<float>& args) {
  const LayerWeights& w = args.layer;
  rms_norm(args.hidden, w.input_layernorm);
  if (w.type == LayerType::linear_attention) {
    const int heads = c_.linear_num_value_heads;
    project("project", proj_, normed_,
            {{{&w.in_proj_qkv, proj_stride_, 0}, {&w.in_proj_z, proj_stride_, c_.conv_dim()}}});
    project_narrow(gates_, {{{&w.in_proj_b, 2 * heads, 0}, {&w.in_proj_a, 2 * heads, heads}}});
  } else {
    const int queries = 2 * c_.attention_dim();
    project("project", proj_, normed_,
            {{{&w.q_proj, proj_stride_, 0},
              {&w.k_proj, proj_stride_, queries},
              {&w.v_proj, proj_stride_, queries + c_.kv_dim()}}});
  }
}

void PrefillOps::gated_delta_prefill(const GatedDeltaArgs<float, bf16>& args) {
  const LayerWeights& w = args.layer;
  const int rows = rows_.rows, channels = c_.conv_dim(), dim = c_.linear_key_head_dim;
  const int heads = c_.linear_num_value_heads, key_heads = c_.linear_num_key_heads;
  const int offset = rows_.position % kChunk;
  const unsigned chunks = blocks_of(offset + rows, kChunk), every = static_cast<unsigned>(heads);
  float* window = args.conv_state.at(rows_.slot);
  launch("conv_silu_norm",
         dim3(blocks_of(channels, dim), blocks_of(rows, constant("conv_silu_norm", "BT"))),
         {qkv_, proj_, window, w.conv1d, rows, proj_stride_, channels, key_heads,
          1.0f / std::sqrt(static_cast<float>(dim))});
  launch("conv_window", dim3(blocks_of(channels, constant("conv_window", "BLOCK"))),
         {window, proj_, rows, proj_stride_, channels});
  launch("delta_prepare", dim3(every, chunks),
         {delta_w_, delta_u_, delta_sums_, qkv_, gates_, w.decay_rate, w.dt_bias, rows, offset,
          channels, 2 * heads, key_heads, heads});
  launch("delta_scan", dim3(blocks_of(dim, constant("delta_scan", "BV")), every),
         {args.recurrent_state.at(rows_.slot), delta_states_, delta_u_, delta_w_, delta_sums_, qkv_,
          rows, offset, channels, key_heads, heads});
  launch("delta_output", dim3(every, chunks),
         {core_, delta_states_, delta_u_, delta_sums_, qkv_, proj_ + channels, w.norm, rows, offset,
          channels, proj_stride_, key_heads, heads, static_cast<float>(c_.rms_norm_eps)});
}

void PrefillOps::attention_prefill(const AttentionArgs<float, bf16>& args) {
  require(args.kv.dtype == DType::bf16, "the prefill kernels keep KV in bfloat16, got ",
          dtype_name(args.kv.dtype));
  const int rows = rows_.rows, heads = c_.num_attention_heads, kv_heads = c_.num_key_value_heads;
  const int64_t page_stride = args.kv.page_stride / static_cast<int64_t>(sizeof(bf16));
  launch("attention_append",
         dim3(static_cast<unsigned>(heads + 2 * kv_heads),
              blocks_of(rows, constant("attention_append", "BT"))),
         {query_, args.kv.data, proj_, args.layer.q_norm, args.layer.k_norm,
          decode_.inverse_frequency(), args.rows.pages, rows, rows_.position, proj_stride_,
          page_stride, heads, kv_heads, c_.rotary_dim() / 2, static_cast<float>(c_.rms_norm_eps),
          1.0f / std::sqrt(static_cast<float>(c_.head_dim))});
  // One of the two for all of a device: they add keys up in other pieces.
  const std::string name = fits("attention") ? "attention" : "attention_small";
  const int tokens = constant(name, "BM") / (heads / kv_heads);
  launch(name, dim3(static_cast<unsigned>(kv_heads), blocks_of(rows, tokens)),
         {core_, query_, args.kv.data, proj_, args.rows.pages, rows, rows_.position, proj_stride_,
          page_stride, heads, kv_heads});
}

void PrefillOps::out_proj_residual(const OutProjArgs<float, bf16>& args) {
  project("project_residual", args.hidden, core_, {{{&args.weight, args.weight.spec.n, 0}}});
}

void PrefillOps::norm_router_shared(const NormRouterSharedArgs<float, bf16>& args) {
  const LayerWeights& w = args.layer;
  rms_norm(args.hidden, w.post_attention_layernorm);
  project_narrow(router_,
                 {{{&w.gate, c_.num_experts, 0},
                   {&w.shared_expert_gate, 1, static_cast<int>(shared_scale_ - router_)}}});

  const WeightSpec& spec = w.shared_gate.spec;
  require<Error>(spec == w.shared_up.spec, "shared_gate and shared_up are not of one kind");
  const int64_t up_words = (w.shared_up.data - w.shared_gate.data) / 4;
  unsigned blocks = 0;
  const std::string name = tile_of(concat("project_pair_", format_of(spec)), {spec.n}, blocks);
  check_whole(spec.n, name);
  launch(name, dim3(blocks),
         {shared_, normed_, codes_of(w.shared_gate), w.shared_gate.data, rows_.rows, spec.n, spec.k,
          tile_words(w.shared_gate), up_words});
}

void PrefillOps::routed_gate_up(const RoutedGateUpArgs<float, bf16>& args) {
  const int rows = rows_.rows, experts = c_.num_experts, top_k = c_.num_experts_per_tok;
  const int width = experts <= 64 ? 64 : experts <= 256 ? 256 : 512;
  const int tile = expert_rows(args.layer);
  const std::string top =
      concat("top_experts_", width, "_", top_k <= 8 ? 8 : 16, "_", part_of(rows));
  const int part = part_of(rows);
  const unsigned parts = blocks_of(rows, part);
  launch(top, dim3(parts), {ids_, pick_weight_, ranks_, counts_, router_, rows, experts, top_k});
  launch(concat("plan_experts_", width), dim3(1),
         {places_, work_, counts_, static_cast<int>(parts), experts, tile});
  launch("sort_picks", dim3(blocks_of(rows * top_k, constant("sort_picks", "BLOCK"))),
         {order_, ids_, ranks_, places_, rows * top_k, experts, part * top_k});
  const WeightView& w = args.layer.experts_gate_up;
  const int inner = w.spec.n / 2;
  const std::string name = expert_tile("expert_gate_up", w, tile);
  launch(name, expert_grid(name, inner, tile),
         {expert_act_, normed_, codes_of(w), w.data, order_, work_, inner, w.spec.k, tile_words(w),
          top_k});
}

// The sum over ranks goes to the residual stream first, the shared expert behind it.
void PrefillOps::down_combine_residual(const DownCombineArgs<float, bf16>& args) {
  const WeightView& w = args.layer.experts_down;
  const int tile = expert_rows(args.layer);
  const std::string name = expert_tile("expert_down", w, tile);
  launch(name, expert_grid(name, w.spec.n, tile),
         {expert_part_, expert_act_, codes_of(w), w.data, order_, work_, w.spec.n, w.spec.k,
          tile_words(w)});
  launch("combine_experts",
         dim3(blocks_of(c_.hidden_size, constant("combine_experts", "BLOCK")),
              static_cast<unsigned>(rows_.rows)),
         {args.hidden, expert_part_, pick_weight_, c_.hidden_size, c_.num_experts_per_tok});
  project("project_gated", args.hidden, shared_, {{{&args.layer.shared_down, c_.hidden_size, 0}}},
          shared_scale_);
}

}  // namespace qwen_moe::cuda
