// Small fp32 matrix products and the recurrent state. See kernels_impl.h for how this is compiled.
#pragma once

#include "cpu/kernels.h"
#include "cpu/math_impl.h"

namespace qwen_moe::cpu {
namespace {

// B is float, or bf16 as uint16_t, which is widened on the way into registers: the same bits as
// widening it beforehand.
template <class T>
struct Product {
  float* c;
  const float* a;
  const T* b;
  int k;
  int64_t ldc, a_row, a_k, ldb;  // element (i, k) of A is at a[i * a_row + k * a_k]
  bool accumulate;
  const T* next = nullptr;  // of the shape of B: fetched into L2 meanwhile
};

// Asks for what `next` has where B has `at`, once for every line of 64 bytes.
template <class T>
inline void fetch_next(const Product<T>& p, const T* at) {
  const auto offset = at - p.b;
  if (p.next && offset % static_cast<int>(64 / sizeof(T)) == 0)
    __builtin_prefetch(p.next + offset, 0, 2);
}

inline F load_b(const float* p) { return load(p); }
inline F load_b(const uint16_t* p) { return load_bf16(p); }

// Of bf16 there are whole vectors only.
inline F load_b_n(const float* p, int lanes) { return load_n(p, lanes); }
inline F load_b_n(const uint16_t* p, int) { return load_bf16(p); }
inline F load_b_some(const float* p, int lanes) { return load_some(p, lanes); }
inline F load_b_some(const uint16_t* p, int) { return load_bf16(p); }

// kRows by kCols vectors of C, one chain over k per element whatever the block. kTail: the last
// vector has only `lanes` columns.
template <int kRows, int kCols, bool kTail, class T>
void product_block(const Product<T>& p, int64_t row, int64_t col, int lanes) {
  F acc[kRows][kCols];
  const auto load_last = [&](const float* at, int j) {
    return kTail && j == kCols - 1 ? load_n(at + j * kW, lanes) : load(at + j * kW);
  };
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kCols; ++j)
      acc[r][j] = p.accumulate ? load_last(p.c + (row + r) * p.ldc + col, j) : zero();
  }
  const float* a = p.a + row * p.a_row;
  const T* b = p.b + col;
  for (int i = 0; i < p.k; ++i, a += p.a_k, b += p.ldb) {
    F bv[kCols];
    for (int j = 0; j < kCols; ++j) {
      if constexpr (sizeof(T) == 2) fetch_next(p, b + j * kW);
      bv[j] = kTail && j == kCols - 1 ? load_b_n(b + j * kW, lanes) : load_b(b + j * kW);
    }
    for (int r = 0; r < kRows; ++r) {
      const F av = set1(a[r * p.a_row]);
      for (int j = 0; j < kCols; ++j) acc[r][j] = fma(av, bv[j], acc[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = p.c + (row + r) * p.ldc + col;
    for (int j = 0; j < kCols; ++j) {
      if (kTail && j == kCols - 1) {
        store_n(out + j * kW, acc[r][j], lanes);
      } else {
        store(out + j * kW, acc[r][j]);
      }
    }
  }
}

// All rows of one strip of columns.
template <int kCols, bool kTail, class T>
void product_strip(const Product<T>& p, int m, int64_t col, int lanes) {
  int row = 0;
  for (; row + kMmRows <= m; row += kMmRows)
    product_block<kMmRows, kCols, kTail>(p, row, col, lanes);
  if constexpr (kMmRows > 4) {
    if (row + 4 <= m) {
      product_block<4, kCols, kTail>(p, row, col, lanes);
      row += 4;
    }
  }
  if (row + 2 <= m) {
    product_block<2, kCols, kTail>(p, row, col, lanes);
    row += 2;
  }
  if (row < m) product_block<1, kCols, kTail>(p, row, col, lanes);
}

template <class T>
void product(const Product<T>& p, int m, int n) {
  int col = 0;
  for (; col + kMmVecs * kW <= n; col += kMmVecs * kW) product_strip<kMmVecs, false>(p, m, col, kW);
  if constexpr (kMmVecs > 2) {
    for (; col + 2 * kW <= n; col += 2 * kW) product_strip<2, false>(p, m, col, kW);
  }
  for (; col + kW <= n; col += kW) product_strip<1, false>(p, m, col, kW);
  if (col < n) product_strip<1, true>(p, m, col, n - col);
}

void matmul(float* c, const float* a, const float* b, int m, int n, int k, int64_t ldc, int64_t lda,
            int64_t ldb, bool accumulate) {
  product<float>({c, a, b, k, ldc, lda, 1, ldb, accumulate}, m, n);
}

void matmul_bf16(float* c, const float* a, const uint16_t* b, int m, int n, int k, int64_t ldc,
                 int64_t lda, int64_t ldb, bool accumulate, const uint16_t* next) {
  product<uint16_t>({c, a, b, k, ldc, lda, 1, ldb, accumulate, next}, m, n);
}

void matmul_at(float* c, const float* a, const float* b, int m, int n, int k, int64_t ldc,
               int64_t lda, int64_t ldb, bool accumulate) {
  product<float>({c, a, b, k, ldc, 1, lda, ldb, accumulate}, m, n);
}

// kRows by kCols dot products, one vector chain over k each.
template <int kRows, int kCols, class T>
void dot_block(const Product<T>& p, int64_t row, int64_t col) {
  F acc[kRows][kCols];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kCols; ++j) acc[r][j] = zero();
  const float* a = p.a + row * p.a_row;
  const T* b = p.b + col * p.ldb;
  const auto step = [&](int i, int lanes) {
    F av[kRows];
    for (int r = 0; r < kRows; ++r) av[r] = load_some(a + r * p.a_row + i, lanes);
    for (int j = 0; j < kCols; ++j) {
      if constexpr (sizeof(T) == 2) fetch_next(p, b + j * p.ldb + i);
      const F bv = load_b_some(b + j * p.ldb + i, lanes);
      for (int r = 0; r < kRows; ++r) acc[r][j] = fma(av[r], bv, acc[r][j]);
    }
  };
  int i = 0;
  for (; i + kW <= p.k; i += kW) step(i, kW);
  if (i < p.k) step(i, p.k - i);
  for (int r = 0; r < kRows; ++r) {
    float* out = p.c + (row + r) * p.ldc + col;
    if constexpr (kCols == 4) {
      Quad sums = sum_lanes4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
      Quad old{};
      if (p.accumulate) __builtin_memcpy(&old, out, sizeof(old));
      sums = p.accumulate ? old + sums : sums;
      __builtin_memcpy(out, &sums, sizeof(sums));
    } else {
      for (int j = 0; j < kCols; ++j) {
        const float sum = sum_lanes(acc[r][j]);
        out[j] = p.accumulate ? out[j] + sum : sum;
      }
    }
  }
}

template <int kCols, class T>
void dot_strip(const Product<T>& p, int m, int64_t col) {
  int row = 0;
  for (; row + kDotRows <= m; row += kDotRows) dot_block<kDotRows, kCols>(p, row, col);
  if constexpr (kDotRows > 2) {
    if (row + 2 <= m) {
      dot_block<2, kCols>(p, row, col);
      row += 2;
    }
  }
  if (row < m) dot_block<1, kCols>(p, row, col);
}

template <class T>
void dots(const Product<T>& p, int m, int n) {
  int col = 0;
  for (; col + 4 <= n; col += 4) dot_strip<4>(p, m, col);
  for (; col < n; ++col) dot_strip<1>(p, m, col);
}

void matmul_bt(float* c, const float* a, const float* b, int m, int n, int k, int64_t ldc,
               int64_t lda, int64_t ldb, bool accumulate) {
  dots<float>({c, a, b, k, ldc, lda, 1, ldb, accumulate}, m, n);
}

void matmul_bt_bf16(float* c, const float* a, const uint16_t* b, int m, int n, int k, int64_t ldc,
                    int64_t lda, int64_t ldb, bool accumulate, const uint16_t* next) {
  dots<uint16_t>({c, a, b, k, ldc, lda, 1, ldb, accumulate, next}, m, n);
}

struct DeltaStep {
  float* state;
  float* out;
  const float* q;
  const float* k;
  const float* v;
  float decay, beta, kq;
  int dk, dv;
};

// kCols vectors of columns. One read of the old state gives both S^T k and S^T q, since
// out = decay S^T q + (k q) delta. The second sweep goes backwards, to begin with what the first
// left in the nearest cache.
template <int kCols>
void delta_columns(const DeltaStep& d, int col) {
  F sk[kCols], sq[kCols], delta[kCols];
  for (int j = 0; j < kCols; ++j) sk[j] = sq[j] = zero();
  float* row = d.state + col;
  for (int i = 0; i < d.dk; ++i, row += d.dv) {
    const F k = set1(d.k[i]), q = set1(d.q[i]);
    for (int j = 0; j < kCols; ++j) {
      const F s = load(row + j * kW);
      sk[j] = fma(s, k, sk[j]);
      sq[j] = fma(s, q, sq[j]);
    }
  }
  const F decay = set1(d.decay), beta = set1(d.beta), kq = set1(d.kq);
  for (int j = 0; j < kCols; ++j) {
    delta[j] = mul(beta, sub(load(d.v + col + j * kW), mul(decay, sk[j])));
    store(d.out + col + j * kW, fma(kq, delta[j], mul(decay, sq[j])));
  }
  for (int i = d.dk - 1; i >= 0; --i) {
    row -= d.dv;
    const F k = set1(d.k[i]);
    for (int j = 0; j < kCols; ++j)
      store(row + j * kW, fma(k, delta[j], mul(decay, load(row + j * kW))));
  }
}

void gated_delta_step(float* state, float* out, const float* q, const float* k, const float* v,
                      float decay, float beta, int dk, int dv) {
  const DeltaStep d = {state, out, q, k, v, decay, beta, dot(k, q, dk), dk, dv};
  int col = 0;
  for (; col + kStateVecs * kW <= dv; col += kStateVecs * kW) delta_columns<kStateVecs>(d, col);
  for (; col + kTile <= dv; col += kTile) delta_columns<kTile / kW>(d, col);
}

}  // namespace
}  // namespace qwen_moe::cpu
