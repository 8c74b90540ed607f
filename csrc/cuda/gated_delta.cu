// The gated delta rule, one token per row (the formulas: cpu/gated_delta.cpp). The in_proj phase
// has already applied the causal conv and SiLU to q | k | v.
//
// A step reads and writes 64 KiB of state for every row and value head and does little with it, so
// it is a matter of memory traffic. One block owns one head of one row and keeps its whole state in
// registers: every byte is read once and written once. So that one pass over it is enough, the
// output is not taken from the new state but, with r = S^T k and p = S^T q of the old one, from
//   u = beta (v - alpha r),   o = alpha p + (q.k) u,   S' = alpha S + k u^T.
// The L2 norms of q and k are factors of r, p, q.k and k u^T, so nothing waits for them before the
// pass.
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kDim = 128;  // linear_key_head_dim and linear_value_head_dim
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kKeys = kDim / kWarps;  // rows of the state in a warp; a lane has 4 columns of them
constexpr float kL2Eps = 1e-6f;
constexpr float kQueryScale = 0.08838834764831845f;  // 1 / sqrt(kDim)

// Warps that work out the numbers of the whole head while the others are in the pass. They sit on
// different schedulers of the SM.
constexpr int kNormWarp = 4, kGateWarp = 5;

struct Params {
  Input* core;
  const float* proj;
  float* state;
  int64_t core_stride, proj_stride, state_stride;
  const int32_t* slot;
  const float *decay_rate, *dt_bias, *norm;
  int key_dim, heads_per_key;
  float rms_norm_eps;
};

struct Shared {
  alignas(16) float q_k_v_z[4][kDim];          // of this head, as they come
  alignas(16) float partial[kWarps][2][kDim];  // S^T k and S^T q over a warp's key rows
  alignas(16) float update[kDim];              // u, times the factor of k
  float norm[kDim];
  float squares[kDim / 32];             // sums of o^2 over 32 columns
  float q_factor, k_factor, q_times_k;  // of the L2 norms; q_factor with 1 / sqrt(kDim)
  float alpha, beta;
};

__device__ __forceinline__ float dot(float4 a, float4 b) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w)));
}

// to += scale * x
__device__ __forceinline__ void add_scaled(float4& to, float scale, float4 x) {
  to.x = fmaf(scale, x.x, to.x);
  to.y = fmaf(scale, x.y, to.y);
  to.z = fmaf(scale, x.z, to.z);
  to.w = fmaf(scale, x.w, to.w);
}

// The values of a warp's key rows: every lane reads the same addresses.
__device__ __forceinline__ void read_keys(float (&to)[kKeys], const float* from) {
#pragma unroll
  for (int i = 0; i < kKeys; i += 4) {
    float4 x = *reinterpret_cast<const float4*>(from + i);
    to[i] = x.x;
    to[i + 1] = x.y;
    to[i + 2] = x.z;
    to[i + 3] = x.w;
  }
}

// A block for (value head, row). Two of them share an SM: while one is between its loads and its
// stores, the other keeps the memory busy.
__global__ void __launch_bounds__(kThreads, 2) gated_delta_kernel(const Params p) {
  __shared__ Shared sh;
  const int head = static_cast<int>(blockIdx.x), row = static_cast<int>(blockIdx.y);
  const int heads = static_cast<int>(gridDim.x);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  Input* core = p.core + row * p.core_stride + head * kDim;

  const int slot = load_cg(p.slot + row);
  if (slot == 0) {  // padding, the same for the whole block
    wait_for_predecessor();
    launch_dependents();
    if (thread < kDim) core[thread] = input_of(0.0f);
    return;
  }

  // An earlier step wrote the state, so it need not wait for the predecessor. It is read and
  // written once a step and all of it does not fit the L2: marked to leave the caches first.
  float* state = p.state + slot * p.state_stride + static_cast<int64_t>(head) * (kDim * kDim) +
                 warp * (kKeys * kDim) + lane * 4;
  float4 s[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) s[i] = __ldcs(reinterpret_cast<const float4*>(state + i * kDim));
  // Kept in registers until the wait is over: storing would stall on the loads before it.
  const float norm = thread < kDim ? __ldg(p.norm + thread) : 0;
  float decay_rate = 0, dt_bias = 0, a = 0, b = 0;
  if (warp == kGateWarp) {
    decay_rate = __ldg(p.decay_rate + head);
    dt_bias = __ldg(p.dt_bias + head);
  }

  // A thread carries one value: 128 each of q, k, v and z, whose strides differ.
  const int part = thread / kDim, at = thread % kDim;
  const int value_begin = 2 * p.key_dim, gate_begin = value_begin + 2 * heads * kDim;
  const float* proj = p.proj + row * p.proj_stride;
  const float* own = proj + at +
                     (part < 2 ? part * p.key_dim + head / p.heads_per_key * kDim
                               : value_begin + ((part - 2) * heads + head) * kDim);

  const bool one_row = gridDim.y == 1;
  if (one_row) launch_dependents();
  wait_for_predecessor();
  const float x = load_cg(own);
  if (warp == kGateWarp) {
    b = load_cg(proj + gate_begin + head);
    a = load_cg(proj + gate_begin + heads + head);
  }
  if (!one_row) launch_dependents();
  sh.q_k_v_z[part][at] = x;
  if (thread < kDim) sh.norm[thread] = norm;
  __syncthreads();
  const float *q_raw = sh.q_k_v_z[0], *k_raw = sh.q_k_v_z[1];
  const float *v = sh.q_k_v_z[2], *z = sh.q_k_v_z[3];

  if (warp == kNormWarp) {
    const float4 q = reinterpret_cast<const float4*>(q_raw)[lane];
    const float4 k = reinterpret_cast<const float4*>(k_raw)[lane];
    const float qq = warp_sum(dot(q, q)), kk = warp_sum(dot(k, k)), qk = warp_sum(dot(q, k));
    if (lane == 0) {
      const float q_factor = kQueryScale * rsqrtf(qq + kL2Eps), k_factor = rsqrtf(kk + kL2Eps);
      sh.q_factor = q_factor;
      sh.k_factor = k_factor;
      sh.q_times_k = qk * q_factor * k_factor;
    }
  } else if (warp == kGateWarp) {
    // One number each, on which every later step builds: the accurate functions.
    const float step = a + dt_bias;
    const float softplus_step = step > 20.0f ? step : log1pf(expf(step));
    if (lane == 0) {
      sh.alpha = expf(decay_rate * softplus_step);
      sh.beta = 1.0f / (1.0f + expf(-b));
    }
  }

  // The pass: four columns over the warp's key rows.
  {
    float4 by_k{}, by_q{};
    float k[kKeys], q[kKeys];
    read_keys(k, k_raw + warp * kKeys);
    read_keys(q, q_raw + warp * kKeys);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      add_scaled(by_k, k[i], s[i]);
      add_scaled(by_q, q[i], s[i]);
    }
    reinterpret_cast<float4*>(sh.partial[warp][0])[lane] = by_k;
    reinterpret_cast<float4*>(sh.partial[warp][1])[lane] = by_q;
  }
  __syncthreads();

  // A thread for a column: the sums in the order of the key rows, u and o.
  float o = 0;
  if (thread < kDim) {
    float by_k = 0, by_q = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      by_k += sh.partial[w][0][thread];
      by_q += sh.partial[w][1][thread];
    }
    const float alpha = sh.alpha, k_factor = sh.k_factor;
    const float u = sh.beta * (v[thread] - alpha * (k_factor * by_k));
    o = alpha * (sh.q_factor * by_q) + sh.q_times_k * u;
    sh.update[thread] = k_factor * u;
    const float squares = warp_sum(o * o);
    if (lane == 0) sh.squares[warp] = squares;
  }
  __syncthreads();

  {
    const float alpha = sh.alpha;
    const float4 u = reinterpret_cast<const float4*>(sh.update)[lane];
    float k[kKeys];
    read_keys(k, k_raw + warp * kKeys);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      float4 x{alpha * s[i].x, alpha * s[i].y, alpha * s[i].z, alpha * s[i].w};
      add_scaled(x, k[i], u);
      __stcs(reinterpret_cast<float4*>(state + i * kDim), x);
    }
  }
  if (thread < kDim) {
    const float mean =
        (sh.squares[0] + sh.squares[1] + sh.squares[2] + sh.squares[3]) * (1.0f / kDim);
    const float normed = o * rsqrtf(mean + p.rms_norm_eps) * sh.norm[thread];
    core[thread] = input_of(normed * silu(z[thread]));
  }
}

void exactly(const char* field, int value, int expected) {
  require(value == expected, field, " must be ", expected, " for the CUDA kernels, got ", value);
}

}  // namespace

void CudaOps::reserve_gated_delta() {
  exactly("linear_key_head_dim", c_.linear_key_head_dim, kDim);
  exactly("linear_value_head_dim", c_.linear_value_head_dim, kDim);
  exactly("linear_conv_kernel_dim", c_.linear_conv_kernel_dim, 4);
  allow_shared(gated_delta_kernel, 0);
}

void CudaOps::gated_delta_step(const GatedDeltaArgs<float, Input>& args) {
  const SlotArray& state = args.recurrent_state;
  require<Error>(reinterpret_cast<uintptr_t>(state.data) % 16 == 0 && state.stride % 4 == 0,
                 "recurrent_state of a slot must be 16-byte aligned, got a stride of ",
                 state.stride, " floats");
  launch_(
      gated_delta_kernel,
      dim3(static_cast<unsigned>(c_.linear_num_value_heads), static_cast<unsigned>(args.rows.rows)),
      kThreads, 0,
      Params{.core = args.core,
             .proj = args.proj,
             .state = state.data,
             .core_stride = args.core_stride,
             .proj_stride = args.proj_stride,
             .state_stride = state.stride,
             .slot = args.rows.slot,
             .decay_rate = args.layer.decay_rate,
             .dt_bias = args.layer.dt_bias,
             .norm = args.layer.norm,
             .key_dim = c_.key_dim(),
             .heads_per_key = c_.linear_num_value_heads / c_.linear_num_key_heads,
             .rms_norm_eps = static_cast<float>(c_.rms_norm_eps)});
}

}  // namespace qwen_moe::cuda
