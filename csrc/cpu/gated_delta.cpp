// The gated delta rule on the host: one token at a time for decode, chunks of 64 for prefill.
//
// Per head and token, with S [dk, dv], decay a = exp(g), step size b (Yang et al., "Gated Delta
// Networks", 2024):  S = a S;  u = b (v - S^T k);  S = S + k u^T;  o = S^T q.
// A chunk of n tokens solves for all u at once. With G the running sum of g inside the chunk:
//   (I + A) U = b (V - e^G K S),      A_ij = b_i e^(G_i - G_j) k_i.k_j for j < i
//   O = e^G Q S + P U,                P_ij = e^(G_i - G_j) q_i.k_j for j <= i
//   S' = e^(G_n) S + (e^(G_n - G) K)^T U
#include <algorithm>
#include <cmath>

#include "cpu/ops.h"

namespace qwen_moe::cpu {
namespace {

constexpr int kChunk = kPageTokens;
constexpr int kBlock = 16;  // rows of a chunk's triangular products
constexpr float kL2Eps = 1e-6f;

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace

// proj row -> qkv_ row: conv over the taps (oldest first), SiLU, L2 norm of every q and k head, and
// the log decay and step size of every value head.
void CpuOps::conv_and_norm(const GatedDeltaArgs<float>& args, int row, const float* const* taps) {
  int channels = c_.conv_dim(), dk = c_.linear_key_head_dim, heads = c_.linear_num_value_heads;
  float* out = qkv_.data() + static_cast<int64_t>(row) * channels;
  k_.conv_silu(out, taps, args.layer.conv1d, c_.linear_conv_kernel_dim, channels);
  float query_scale = 1.0f / std::sqrt(static_cast<float>(dk));
  for (int h = 0; h < c_.linear_num_key_heads; ++h) {
    float* q = out + h * dk;
    float* k = out + c_.key_dim() + h * dk;
    k_.l2_norm(q, q, query_scale, dk, kL2Eps);
    k_.l2_norm(k, k, 1.0f, dk, kL2Eps);
  }
  const float* b = args.proj + row * args.proj_stride + channels + c_.value_dim();
  const float* a = b + heads;
  for (int h = 0; h < heads; ++h) {
    log_decay_[static_cast<size_t>(row * heads + h)] =
        args.layer.decay_rate[h] * softplus(a[h] + args.layer.dt_bias[h]);
    beta_[static_cast<size_t>(row * heads + h)] = 1.0f / (1.0f + std::exp(-b[h]));
  }
}

// RMSNorm of one head's output, gated by SiLU of z.
void CpuOps::gate_output(const GatedDeltaArgs<float>& args, int row, int head, float* out) {
  int dv = c_.linear_value_head_dim;
  const float* z = args.proj + row * args.proj_stride + c_.conv_dim() + head * dv;
  k_.gated_rms_norm(args.core + row * args.core_stride + head * dv, out, args.layer.norm, z, dv,
                    static_cast<float>(c_.rms_norm_eps));
}

void CpuOps::gated_delta_step(const GatedDeltaArgs<float>& args) {
  int channels = c_.conv_dim(), kernel = c_.linear_conv_kernel_dim;
  int heads = c_.linear_num_value_heads, dk = c_.linear_key_head_dim, dv = c_.linear_value_head_dim;
  each_row(args.rows.rows, [&](int row, int) {
    float* state = args.conv_state.at(args.rows.slot[row]);  // [kernel - 1, channels]
    const float* now = args.proj + row * args.proj_stride;
    const float* taps[8];
    for (int j = 0; j + 1 < kernel; ++j) taps[j] = state + j * channels;
    taps[kernel - 1] = now;
    conv_and_norm(args, row, taps);
    std::copy(state + channels, state + (kernel - 1) * channels, state);
    std::copy_n(now, channels, state + (kernel - 2) * channels);
  });
  pool_.run(args.rows.rows * heads, [&](int task, int worker) {
    int row = task / heads, head = task % heads;
    const float* qkv = qkv_.data() + static_cast<int64_t>(row) * channels;
    const float* q = qkv + head / (heads / c_.linear_num_key_heads) * dk;
    const float* k = q + c_.key_dim();
    const float* v = qkv + 2 * c_.key_dim() + head * dv;
    float* state =
        args.recurrent_state.at(args.rows.slot[row]) + static_cast<int64_t>(head) * dk * dv;
    float* out = delta_work_.data() + static_cast<size_t>(worker) * delta_work_size_;
    auto at = static_cast<size_t>(task);
    k_.gated_delta_step(state, out, q, k, v, std::exp(log_decay_[at]), beta_[at], dk, dv);
    gate_output(args, row, head, out);
  });
}

// Rows [begin, begin + tokens) of one head.
void CpuOps::delta_chunk(const GatedDeltaArgs<float>& args, int head, int begin, int tokens,
                         float* work) {
  int channels = c_.conv_dim(), heads = c_.linear_num_value_heads;
  int dk = c_.linear_key_head_dim, dv = c_.linear_value_head_dim;
  const float* q = qkv_.data() + static_cast<int64_t>(begin) * channels +
                   head / (heads / c_.linear_num_key_heads) * dk;
  const float* k = q + c_.key_dim();
  const float* v =
      qkv_.data() + static_cast<int64_t>(begin) * channels + 2 * c_.key_dim() + head * dv;
  float* state = args.recurrent_state.at(args.rows.slot[0]) + static_cast<int64_t>(head) * dk * dv;

  float* decay = work;                    // [n, 64] e^(G_i - G_j), j <= i
  float* a = decay + kChunk * kChunk;     // [n, 64] -A
  float* p = a + kChunk * kChunk;         // [n, 64]
  float* key = p + kChunk * kChunk;       // [n, dk] decayed keys
  float* u = key + kChunk * dk;           // [n, dv]
  float* o = u + kChunk * dv;             // [n, dv]
  float* negative = o + kChunk * dv;      // [n] -G
  float* from_start = negative + kChunk;  // [n] e^G

  float sum = 0;
  for (int i = 0; i < tokens; ++i) {
    sum += log_decay_[static_cast<size_t>((begin + i) * heads + head)];
    negative[i] = -sum;
    from_start[i] = std::exp(sum);
  }
  for (int i = 0; i < tokens; ++i) {
    std::copy_n(negative, i + 1, decay + i * kChunk);
    k_.exp_sum(decay + i * kChunk, negative[i], i + 1);
  }

  // Both products are needed on and below the diagonal only: by blocks of 16 rows, as far as that.
  for (int block = 0; block < tokens; block += kBlock) {
    int end = std::min(block + kBlock, tokens);
    const float* q_rows = q + static_cast<int64_t>(block) * channels;
    const float* k_rows = k + static_cast<int64_t>(block) * channels;
    k_.matmul_bt(a + block * kChunk, k_rows, k, end - block, end, dk, kChunk, channels, channels,
                 false);
    k_.matmul_bt(p + block * kChunk, q_rows, k, end - block, end, dk, kChunk, channels, channels,
                 false);
  }
  k_.matmul(u, k, state, tokens, dv, dk, dv, channels, dv, false);
  k_.matmul(o, q, state, tokens, dv, dk, dv, channels, dv, false);
  for (int i = 0; i < tokens; ++i) {
    float beta = beta_[static_cast<size_t>((begin + i) * heads + head)];
    const float* d = decay + i * kChunk;
    for (int j = 0; j < i; ++j) a[i * kChunk + j] *= -beta * d[j];
    for (int j = 0; j <= i; ++j) p[i * kChunk + j] *= d[j];
    std::fill(p + i * kChunk + i + 1, p + (i / kBlock + 1) * kBlock + i * kChunk, 0.0f);
    const float* value = v + static_cast<int64_t>(i) * channels;
    float* row = u + i * dv;
    for (int c = 0; c < dv; ++c) row[c] = beta * (value[c] - from_start[i] * row[c]);
    k_.scale(o + i * dv, from_start[i], dv);
  }
  // Forward substitution by blocks: what lies before the block as a product, the rest by rows.
  for (int block = 0; block < tokens; block += kBlock) {
    int end = std::min(block + kBlock, tokens);
    if (block)
      k_.matmul(u + block * dv, a + block * kChunk, u, end - block, dv, block, dv, kChunk, dv,
                true);
    for (int i = block + 1; i < end; ++i)
      for (int j = block; j < i; ++j) k_.axpy(u + i * dv, a[i * kChunk + j], u + j * dv, dv);
    k_.matmul(o + block * dv, p + block * kChunk, u, end - block, dv, end, dv, kChunk, dv, true);
  }

  for (int i = 0; i < tokens; ++i) {
    std::copy_n(k + static_cast<int64_t>(i) * channels, dk, key + i * dk);
    k_.scale(key + i * dk, decay[(tokens - 1) * kChunk + i], dk);
  }
  k_.scale(state, from_start[tokens - 1], dk * dv);
  k_.matmul_at(state, key, u, dk, dv, tokens, dv, dk, dv, true);
  for (int i = 0; i < tokens; ++i) gate_output(args, begin + i, head, o + i * dv);
}

void CpuOps::gated_delta_prefill(const GatedDeltaArgs<float>& args) {
  int channels = c_.conv_dim(), kernel = c_.linear_conv_kernel_dim, rows = args.rows.rows;
  float* state = args.conv_state.at(args.rows.slot[0]);  // [kernel - 1, channels]
  // Input of the conv at row r, which may lie before the step: in the state.
  auto input = [&](int r) {
    return r < 0 ? state + (kernel - 1 + r) * channels : args.proj + r * args.proj_stride;
  };
  each_row(rows, [&](int row, int) {
    const float* taps[8];
    for (int j = 0; j < kernel; ++j) taps[j] = input(row - (kernel - 1) + j);
    conv_and_norm(args, row, taps);
  });
  // Upwards, so that a short step reads what it shifts before that is overwritten.
  for (int j = 0; j + 1 < kernel; ++j) {
    const float* from = input(rows - (kernel - 1) + j);
    std::copy_n(from, channels, state + j * channels);
  }
  // Chunks end on multiples of 64 from the start of the session.
  pool_.run(c_.linear_num_value_heads, [&](int head, int worker) {
    float* work = delta_work_.data() + static_cast<size_t>(worker) * delta_work_size_;
    for (int begin = 0; begin < rows;) {
      int tokens = std::min(kChunk - args.rows.position[begin] % kChunk, rows - begin);
      delta_chunk(args, head, begin, tokens, work);
      begin += tokens;
    }
  });
}

}  // namespace qwen_moe::cpu
