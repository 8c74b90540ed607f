// Grouped-query attention over paged KV on the host.
//
// The query heads that share a KV head are rows of one small product. Tokens are visited page by
// page with a running maximum; decode cuts the timeline every 512 tokens and merges the parts in
// order, so the bits depend on the session's own length alone.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/ops.h"

namespace qwen_moe::cpu {
namespace {

constexpr int kSplit = 512;     // tokens of a decode part
constexpr int kBlockRows = 16;  // prefill tokens of a task
constexpr int kFewRows = 8;     // rows that read bf16 pages without widening them first
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

}  // namespace

// Running softmax of some query rows over one KV head.
struct CpuOps::Attending {
  const float* query;  // [rows, head_dim]
  float* out;          // [rows, head_dim] sum of p * v
  float* max;          // [rows]
  float* sum;          // [rows]
  float* scores;       // [rows, 64]
  int rows;
  int rows_per_token;  // row r belongs to token r / rows_per_token of the block
};

// Norms and rotates q and k of one row, and writes k and v to the row's page.
void CpuOps::append_kv(const AttentionArgs<float>& args, int row) {
  int dim = c_.head_dim, half = c_.rotary_dim() / 2;
  auto eps = static_cast<float>(c_.rms_norm_eps);
  const float* cos = cos_.data() + static_cast<int64_t>(row) * half;
  const float* sin = sin_.data() + static_cast<int64_t>(row) * half;
  auto rotate = [&](float* x) {  // halves of the first rotary_dim dimensions
    for (int i = 0; i < half; ++i) {
      float lo = x[i], hi = x[i + half];
      x[i] = lo * cos[i] - hi * sin[i];
      x[i + half] = hi * cos[i] + lo * sin[i];
    }
  };
  const float* proj = args.proj + row * args.proj_stride;
  float* query = query_.data() + static_cast<int64_t>(row) * c_.attention_dim();
  float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int h = 0; h < c_.num_attention_heads; ++h) {
    k_.rms_norm(query + h * dim, proj + 2 * h * dim, args.layer.q_norm, dim, eps);
    rotate(query + h * dim);
    k_.scale(query + h * dim, scale, dim);
  }
  int position = args.rows.position[row];
  int32_t page = args.rows.pages[row * args.rows.pages_stride + position / kPageTokens];
  std::byte* base = args.kv.data + page * args.kv.page_stride;
  const float* keys = proj + 2 * c_.attention_dim();
  const float* values = keys + c_.kv_dim();
  float key[512];  // validate() bounds head_dim
  for (int h = 0; h < c_.num_key_value_heads; ++h) {
    k_.rms_norm(key, keys + h * dim, args.layer.k_norm, dim, eps);
    rotate(key);
    auto at = static_cast<size_t>((h * kPageTokens + position % kPageTokens) * dim);
    size_t v_at = at + static_cast<size_t>(c_.num_key_value_heads * kPageTokens * dim);
    if (args.kv.dtype == DType::bf16) {
      auto* kv = reinterpret_cast<uint16_t*>(base);
      k_.f32_to_bf16(kv + at, key, dim);
      k_.f32_to_bf16(kv + v_at, values + h * dim, dim);
    } else {
      auto* kv = reinterpret_cast<float*>(base);
      std::copy_n(key, dim, kv + at);
      std::copy_n(values + h * dim, dim, kv + v_at);
    }
  }
}

// One page of `tokens` written tokens. Row r of the block sees those up to causal_from + its token.
// `next` is the page and head that the worker comes to after this one.
void CpuOps::attend_page(const AttentionArgs<float>& args, PageHead at, PageHead next, int tokens,
                         int causal_from, Attending& s, float* work) {
  int dim = c_.head_dim;
  const std::byte* base = args.kv.data + at.page * args.kv.page_stride;
  auto k_at = static_cast<size_t>(at.kv_head * kPageTokens * dim);
  size_t v_at = k_at + static_cast<size_t>(c_.num_key_value_heads * kPageTokens * dim);
  // Many rows are worth widening the page once; few read it as it is. The bits are the same.
  const auto* half = reinterpret_cast<const uint16_t*>(base);
  const auto* keys = reinterpret_cast<const float*>(base) + k_at;
  const auto* values = reinterpret_cast<const float*>(base) + v_at;
  bool narrow = args.kv.dtype == DType::bf16 && s.rows <= kFewRows;
  if (args.kv.dtype == DType::bf16 && !narrow) {
    k_.bf16_to_f32(work, half + k_at, static_cast<int64_t>(tokens) * dim);
    k_.bf16_to_f32(work + kPageTokens * dim, half + v_at, static_cast<int64_t>(tokens) * dim);
    keys = work;
    values = work + kPageTokens * dim;
  }
  if (narrow)  // the values come while the scores are computed
    k_.matmul_bt_bf16(s.scores, s.query, half + k_at, s.rows, tokens, dim, kPageTokens, dim, dim,
                      false, half + v_at);
  else
    k_.matmul_bt(s.scores, s.query, keys, s.rows, tokens, dim, kPageTokens, dim, dim, false);
  for (int r = 0; r < s.rows; ++r) {
    float* score = s.scores + r * kPageTokens;
    int seen = std::clamp(causal_from + r / s.rows_per_token + 1, 0, tokens);
    std::fill(score + seen, score + tokens, 0.0f);
    if (seen == 0) continue;
    float top = std::max(s.max[r], k_.max(score, seen));
    float shrink = std::exp(s.max[r] - top);
    s.sum[r] = s.sum[r] * shrink + k_.exp_sum(score, top, seen);
    s.max[r] = top;
    k_.scale(s.out + r * dim, shrink, dim);
  }
  if (narrow)  // and the next keys while the values are summed
    k_.matmul_bf16(
        s.out, s.scores, half + v_at, s.rows, dim, tokens, dim, kPageTokens, dim, true,
        reinterpret_cast<const uint16_t*>(args.kv.data + next.page * args.kv.page_stride) +
            next.kv_head * kPageTokens * dim);
  else
    k_.matmul(s.out, s.scores, values, s.rows, dim, tokens, dim, kPageTokens, dim, true);
}

void CpuOps::attention_step(const AttentionArgs<float>& args) {
  int dim = c_.head_dim, kv_heads = c_.num_key_value_heads;
  int group = c_.num_attention_heads / kv_heads, rows = args.rows.rows;
  each_row(rows, [&](int row, int) { append_kv(args, row); });

  int splits = 0;
  for (int row = 0; row < rows; ++row)
    splits = std::max(splits, args.rows.position[row] / kSplit + 1);
  auto part = [&](int row, int kv_head, int split) {  // [group, head_dim + 2]: out, max, sum
    return partial_.data() +
           static_cast<int64_t>((row * kv_heads + kv_head) * max_splits_ + split) * group *
               (dim + 2);
  };
  auto page_of = [&](int row, int position) {
    return args.rows.pages[row * args.rows.pages_stride + position / kPageTokens];
  };
  int tasks = rows * kv_heads * splits;
  // Where a task begins; the last one stands for those that there are not.
  auto first_of = [&](int task) {
    task = std::min(task, tasks - 1);
    int row = task / splits / kv_heads, position = task % splits * kSplit;
    if (position > args.rows.position[row]) position = 0;
    return PageHead{page_of(row, position), task / splits % kv_heads};
  };
  pool_.run(tasks, [&](int task, int worker) {
    int split = task % splits, kv_head = task / splits % kv_heads, row = task / splits / kv_heads;
    int length = args.rows.position[row] + 1;
    if (split * kSplit >= length) return;
    float* work = attention_work_.data() + static_cast<size_t>(worker) * attention_work_size_;
    float* out = part(row, kv_head, split);
    Attending s{.query = query_.data() + static_cast<int64_t>(row) * c_.attention_dim() +
                         kv_head * group * dim,
                .out = out,
                .max = out + group * dim,
                .sum = out + group * (dim + 1),
                .scores = work + 2 * kPageTokens * dim,
                .rows = group,
                .rows_per_token = group};
    std::fill_n(s.out, group * dim, 0.0f);
    std::fill_n(s.max, group, kNegInf);
    std::fill_n(s.sum, group, 0.0f);
    int end = std::min((split + 1) * kSplit, length);
    for (int from = split * kSplit; from < end; from += kPageTokens) {
      int tokens = std::min(kPageTokens, length - from);
      PageHead next = from + kPageTokens < end ? PageHead{page_of(row, from + kPageTokens), kv_head}
                                               : first_of(task + 1);
      attend_page(args, {page_of(row, from), kv_head}, next, tokens, kPageTokens, s, work);
    }
  });
  // Merge the parts in order, divide, and gate.
  each_row(rows * kv_heads, [&](int task, int) {
    int row = task / kv_heads, kv_head = task % kv_heads;
    int parts = args.rows.position[row] / kSplit + 1;
    for (int g = 0; g < group; ++g) {
      float* total = part(row, kv_head, 0) + g * dim;
      float max = part(row, kv_head, 0)[group * dim + g];
      float sum = part(row, kv_head, 0)[group * (dim + 1) + g];
      for (int i = 1; i < parts; ++i) {
        const float* other = part(row, kv_head, i);
        float top = std::max(max, other[group * dim + g]);
        float shrink = std::exp(max - top), grow = std::exp(other[group * dim + g] - top);
        k_.scale(total, shrink, dim);
        k_.axpy(total, grow, other + g * dim, dim);
        sum = sum * shrink + other[group * (dim + 1) + g] * grow;
        max = top;
      }
      int head = kv_head * group + g;
      k_.scale(total, 1.0f / sum, dim);
      k_.sigmoid_mul(args.core + row * args.core_stride + head * dim, total,
                     args.proj + row * args.proj_stride + (2 * head + 1) * dim, dim);
    }
  });
}

void CpuOps::attention_prefill(const AttentionArgs<float>& args) {
  int dim = c_.head_dim, kv_heads = c_.num_key_value_heads;
  int group = c_.num_attention_heads / kv_heads, rows = args.rows.rows;
  each_row(rows, [&](int row, int) { append_kv(args, row); });

  int blocks = (rows + kBlockRows - 1) / kBlockRows;
  pool_.run(blocks * kv_heads, [&](int task, int worker) {
    // Last blocks first: they see the most tokens.
    int block = blocks - 1 - task / kv_heads, kv_head = task % kv_heads;
    int begin = block * kBlockRows, count = std::min(kBlockRows, rows - begin);
    int first = args.rows.position[begin], length = first + count;
    float* work = attention_work_.data() + static_cast<size_t>(worker) * attention_work_size_;
    float* query = work + 2 * kPageTokens * dim;    // [count * group, head_dim]
    float* out = query + kBlockRows * group * dim;  // alike
    float* max = out + kBlockRows * group * dim;
    float* sum = max + kBlockRows * group;
    Attending s{.query = query,
                .out = out,
                .max = max,
                .sum = sum,
                .scores = sum + kBlockRows * group,
                .rows = count * group,
                .rows_per_token = group};
    for (int t = 0; t < count; ++t)
      std::copy_n(query_.data() + static_cast<int64_t>(begin + t) * c_.attention_dim() +
                      kv_head * group * dim,
                  group * dim, query + t * group * dim);
    std::fill_n(out, s.rows * dim, 0.0f);
    std::fill_n(max, s.rows, kNegInf);
    std::fill_n(sum, s.rows, 0.0f);
    for (int from = 0; from < length; from += kPageTokens) {
      PageHead at{args.rows.pages[from / kPageTokens], kv_head};
      attend_page(args, at, at, std::min(kPageTokens, length - from), first - from, s, work);
    }
    for (int r = 0; r < s.rows; ++r) {
      int row = begin + r / group, head = kv_head * group + r % group;
      k_.scale(out + r * dim, 1.0f / sum[r], dim);
      k_.sigmoid_mul(args.core + row * args.core_stride + head * dim, out + r * dim,
                     args.proj + row * args.proj_stride + (2 * head + 1) * dim, dim);
    }
  });
}

}  // namespace qwen_moe::cpu
