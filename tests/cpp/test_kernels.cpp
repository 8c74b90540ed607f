// Every kernel of every instruction set this processor has, against double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "formats.h"

namespace qwen_moe::cpu {
namespace {

// What the kernels of a format take, made from floats, with the values it stands for.
struct Input {
  int rows, k, group;
  Floats x;
  std::vector<int16_t> q;
  Floats scale;
  std::vector<int32_t> sum;

  Input(const Kernels& kernels, int rows_, const WeightSpec& spec, uint32_t seed)
      : rows(rows_),
        k(spec.k),
        group(spec.group),
        x(random_floats(static_cast<size_t>(rows_) * static_cast<size_t>(spec.k), seed)) {
    quantize(kernels);
  }
  void quantize(const Kernels& kernels) {
    if (group == 0) return;
    q.assign(x.size(), 0);
    scale.assign(x.size() / static_cast<size_t>(group), 0);
    sum.assign(scale.size(), 0);
    kernels.quantize_rows(q.data(), scale.data(), sum.data(), x.data(), rows, k, group);
  }
  double value(int row, int i) const {
    const size_t at = static_cast<size_t>(row) * static_cast<size_t>(k) + static_cast<size_t>(i);
    return group ? double{scale[at / static_cast<size_t>(group)]} * q[at] : double{x[at]};
  }
  Activations view() const { return {x.data(), q.data(), scale.data(), sum.data()}; }
};

constexpr float kUntouched = 12345.0f;

Floats run_gemm(const Kernels& kernels, const WeightSpec& spec,
                const std::vector<std::byte>& weight, const Input& input,
                const std::vector<int32_t>& index, int stride, int begin, int end) {
  Floats out(index.size() * static_cast<size_t>(stride), kUntouched);
  kernels.gemm({out.data(), stride, weight.data(), &spec, input.view(), index.data(),
                static_cast<int>(index.size()), begin, end});
  return out;
}

std::vector<int32_t> iota(int n) {
  std::vector<int32_t> index(static_cast<size_t>(n));
  std::iota(index.begin(), index.end(), 0);
  return index;
}

std::vector<WeightSpec> gemm_specs() {
  std::vector<WeightSpec> specs;
  for (WeightFormat f : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16})
    for (int k : {1, 32, 67, 256}) specs.push_back({f, 37, k});
  specs.push_back({WeightFormat::bf16, 160, 1024});
  for (int group : {32, 64, 128}) {
    for (int k : {32, 64, 96, 128, 256, 1024}) {
      if (k % group) continue;
      specs.push_back({WeightFormat::int8, 37, k, 1, group});
      specs.push_back({WeightFormat::int4, 37, k, 1, group});
      specs.push_back({WeightFormat::int4, 37, k, 1, group, true});
    }
  }
  specs.push_back({WeightFormat::int4, 1030, 1024, 1, 128});  // more than one block of tiles
  specs.push_back({WeightFormat::int8, 330, 1024, 1, 128});
  return specs;
}

class KernelsTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!kernels_named(GetParam())) GTEST_SKIP() << "not on this processor";
    kernels_ = kernels_named(GetParam());
    ASSERT_EQ(kernels_->name, GetParam());
  }
  const Kernels* kernels_ = nullptr;
};

TEST_P(KernelsTest, GemmMatchesDouble) {
  for (const WeightSpec& spec : gemm_specs()) {
    SCOPED_TRACE(label(spec));
    const auto weight = random_weight(spec);
    Floats w(static_cast<size_t>(spec.n) * static_cast<size_t>(spec.k));
    unpack(w.data(), spec, weight.data());
    for (int rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
      const Input input(*kernels_, rows, spec, static_cast<uint32_t>(rows));
      const int stride = spec.n + 5;
      const Floats out =
          run_gemm(*kernels_, spec, weight, input, iota(rows), stride, 0, spec.tiles());
      int bad = 0;
      for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < stride; ++o) {
          const float got = out[static_cast<size_t>(r * stride + o)];
          if (o >= spec.n) {
            bad += got != kUntouched;  // padding of the last tile
            continue;
          }
          double sum = 0, size = 0;
          for (int i = 0; i < spec.k; ++i) {
            const double p = w[static_cast<size_t>(o * spec.k + i)] * input.value(r, i);
            sum += p;
            size += std::fabs(p);
          }
          bad += !(std::fabs(got - sum) <= 3e-6 * size);
        }
      }
      EXPECT_EQ(bad, 0) << rows << " rows";
    }
  }
}

TEST_P(KernelsTest, GemmRowsDoNotDependOnCompany) {
  for (const WeightSpec& spec : gemm_specs()) {
    SCOPED_TRACE(label(spec));
    const auto weight = random_weight(spec);
    const Input input(*kernels_, 19, spec, 3);
    const int n = spec.n, tiles = spec.tiles();
    std::vector<Floats> alone;
    for (int r = 0; r < 19; ++r)
      alone.push_back(run_gemm(*kernels_, spec, weight, input, {r}, n, 0, tiles));
    for (int rows = 2; rows <= 19; ++rows) {
      std::vector<int32_t> index = iota(19);
      std::shuffle(index.begin(), index.end(), std::mt19937(static_cast<uint32_t>(rows)));
      index.resize(static_cast<size_t>(rows));
      index.back() = index.front();  // a row may come twice
      const Floats out = run_gemm(*kernels_, spec, weight, input, index, n, 0, tiles);
      for (size_t r = 0; r < index.size(); ++r) {
        ASSERT_EQ(std::memcmp(&out[r * static_cast<size_t>(n)],
                              alone[static_cast<size_t>(index[r])].data(),
                              static_cast<size_t>(n) * sizeof(float)),
                  0)
            << "row " << r << " of " << rows;
      }
    }
    // No index means rows 0, 1, 2, ...; parts of the tiles give parts of the columns.
    Floats out(static_cast<size_t>(3 * n), kUntouched);
    GemmArgs args{out.data(), n, weight.data(), &spec, input.view(), nullptr, 3, 1, tiles - 1};
    kernels_->gemm(args);
    for (int r = 0; r < 3; ++r) {
      for (int o = 0; o < n; ++o) {
        const float expected = o / kTile >= 1 && o / kTile < tiles - 1
                                   ? alone[static_cast<size_t>(r)][static_cast<size_t>(o)]
                                   : kUntouched;
        ASSERT_EQ(out[static_cast<size_t>(r * n + o)], expected) << r << " " << o;
      }
    }
  }
}

// With every scale 1 the result is the integer sum itself, which must not saturate or be rounded.
TEST_P(KernelsTest, GemmIntegersAreExactAtTheExtremes) {
  for (bool int4 : {true, false}) {
    WeightSpec spec{int4 ? WeightFormat::int4 : WeightFormat::int8, 16, 128, 1, 128};
    std::mt19937 engine(5);
    for (int trial = 0; trial < 50; ++trial) {
      auto weight = random_weight(spec, static_cast<uint64_t>(trial));
      for (size_t i = 0; i < 32; i += 2) {
        const uint16_t one = 0x3c00;
        std::memcpy(&weight[i], &one, 2);
      }
      for (size_t i = 64; trial % 2 && i < weight.size(); ++i)
        weight[i] = std::byte{
            static_cast<uint8_t>(int4 ? (engine() % 2 ? 0xff : 0) : (engine() % 2 ? 0x80 : 0x7f))};
      Floats w(16 * 128);
      unpack(w.data(), spec, weight.data());
      std::vector<int16_t> q(128);
      int32_t sum = 0;
      for (int16_t& v : q) {
        v = static_cast<int16_t>(trial < 2 ? (trial ? -32767 : 32767) : engine() % 65535 - 32767);
        sum += v;
      }
      const float one = 1.0f;
      Floats out(16);
      kernels_->gemm({out.data(),
                      16,
                      weight.data(),
                      &spec,
                      {nullptr, q.data(), &one, &sum},
                      nullptr,
                      1,
                      0,
                      1});
      for (size_t o = 0; o < 16; ++o) {
        int64_t exact = 0;
        for (size_t i = 0; i < 128; ++i) exact += static_cast<int64_t>(w[o * 128 + i]) * q[i];
        ASSERT_EQ(out[o], static_cast<float>(exact)) << int4 << " " << trial << " " << o;
      }
    }
  }
}

TEST_P(KernelsTest, GemmPassesNanOn) {
  for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16,
                              WeightFormat::int8, WeightFormat::int4}) {
    const WeightSpec spec{format, 33, 256, 1, is_quantized(format) ? 64 : 0};
    const auto weight = random_weight(spec);
    for (float bad : {kNan, kInf, -kInf}) {
      Input input(*kernels_, 3, spec, 1);
      input.x[256 + 131] = bad;
      input.quantize(*kernels_);
      const Floats out = run_gemm(*kernels_, spec, weight, input, iota(3), 33, 0, 3);
      for (size_t i = 0; i < out.size(); ++i)
        EXPECT_EQ(std::isfinite(out[i]), i / 33 != 1) << format_name(format) << " " << i;
    }
  }
}

TEST_P(KernelsTest, QuantizeRows) {
  for (int group : {32, 64, 128}) {
    const WeightSpec spec{WeightFormat::int8, 16, 256, 1, group};
    Input input(*kernels_, 5, spec, 9);
    for (size_t i = 0; i < 256; ++i) input.x[i] = 0.0f;       // a row of zeros
    for (size_t i = 256; i < 512; ++i) input.x[i] *= 1e-36f;  // far too small to matter
    for (size_t i = 512; i < 768; ++i) input.x[i] *= 1e30f;
    input.x[768] = kNan;
    input.quantize(*kernels_);
    for (size_t block = 0; block < input.scale.size(); ++block) {
      const size_t begin = block * static_cast<size_t>(group);
      const size_t end = begin + static_cast<size_t>(group);
      if (begin <= 768 && 768 < end) {
        EXPECT_TRUE(std::isnan(input.scale[block]));
        continue;
      }
      double top = 0;
      for (size_t i = begin; i < end; ++i) top = std::max(top, std::fabs(double{input.x[i]}));
      int32_t sum = 0;
      for (size_t i = begin; i < end; ++i) {
        sum += input.q[i];
        const double miss = std::fabs(double{input.scale[block]} * input.q[i] - input.x[i]);
        EXPECT_LE(miss, std::max(top / 32768, 0x1p-100)) << i;
      }
      EXPECT_EQ(input.sum[block], sum);
    }
    const Input same(*kernels_named("portable"), 5, spec, 9), again(*kernels_, 5, spec, 9);
    EXPECT_EQ(same.q, again.q);
    EXPECT_EQ(same.scale, again.scale);
    EXPECT_EQ(same.sum, again.sum);
  }
}

// The three products share this check; `which` 0: A B, 1: A B^T, 2: A^T B.
TEST_P(KernelsTest, SmallMatrixProducts) {
  struct Size {
    int m, n, k;
  };
  std::vector<Size> sizes = {{64, 128, 128}, {64, 64, 128}, {64, 77, 256}, {13, 1, 3}, {5, 3, 1}};
  for (int m = 1; m <= 17; ++m) sizes.push_back({m, 15 + m * 7, 19 + m * 5});
  for (const auto& [m, n, k] : sizes) {
    for (int which : {0, 1, 2}) {
      SCOPED_TRACE(concat("m ", m, " n ", n, " k ", k, " which ", which));
      const int64_t lda = (which == 2 ? m : k) + 3, ldb = (which == 1 ? k : n) + 2, ldc = n + 4;
      const Floats a = random_floats(static_cast<size_t>(lda * (which == 2 ? k : m)), 1);
      const Floats b = random_floats(static_cast<size_t>(ldb * (which == 1 ? n : k)), 2);
      const auto call = which == 0   ? kernels_->matmul
                        : which == 1 ? kernels_->matmul_bt
                                     : kernels_->matmul_at;
      for (bool accumulate : {false, true}) {
        const Floats before = random_floats(static_cast<size_t>(ldc * m), 3);
        Floats c = before;
        call(c.data(), a.data(), b.data(), m, n, k, ldc, lda, ldb, accumulate);
        int bad = 0;
        for (int i = 0; i < m; ++i) {
          for (int j = 0; j < ldc; ++j) {
            const size_t at = static_cast<size_t>(i * ldc + j);
            if (j >= n) {
              bad += c[at] != before[at];
              continue;
            }
            double sum = accumulate ? before[at] : 0, size = std::fabs(sum);
            for (int l = 0; l < k; ++l) {
              const int64_t in_a = which == 2 ? l * lda + i : i * lda + l;
              const int64_t in_b = which == 1 ? j * ldb + l : l * ldb + j;
              const double p = double{a[static_cast<size_t>(in_a)]} * b[static_cast<size_t>(in_b)];
              sum += p;
              size += std::fabs(p);
            }
            bad += !(std::fabs(c[at] - sum) <= 3e-6 * size);
          }
          // The same row alone.
          Floats row(before.begin() + i * ldc, before.begin() + (i + 1) * ldc);
          call(row.data(), a.data() + (which == 2 ? i : i * lda), b.data(), 1, n, k, ldc, lda, ldb,
               accumulate);
          bad += std::memcmp(row.data(), &c[static_cast<size_t>(i * ldc)], row.size() * 4) != 0;
        }
        EXPECT_EQ(bad, 0) << accumulate;
      }
    }
  }
}

TEST_P(KernelsTest, ProductsWithBf16HaveTheBitsOfWidenedOnes) {
  for (int m : {1, 2, 4, 7, 8}) {
    const int n = 64, k = 256;  // queries by keys, then scores by values
    const Floats wide = random_floats(static_cast<size_t>(n * k), 1);
    std::vector<uint16_t> half(wide.size());
    Floats widened(wide.size());
    kernels_->f32_to_bf16(half.data(), wide.data(), n * k);
    kernels_->bf16_to_f32(widened.data(), half.data(), n * k);
    const Floats query = random_floats(static_cast<size_t>(m * k), 2);
    const Floats scores = random_floats(static_cast<size_t>(m * n), 3);
    for (bool accumulate : {false, true}) {
      Floats a(static_cast<size_t>(m * n), 0.5f), b = a;
      kernels_->matmul_bt(a.data(), query.data(), widened.data(), m, n, k, n, k, k, accumulate);
      kernels_->matmul_bt_bf16(b.data(), query.data(), half.data(), m, n, k, n, k, k, accumulate,
                               half.data());
      EXPECT_EQ(a, b) << m;
      Floats c(static_cast<size_t>(m * k), 0.5f), d = c;
      kernels_->matmul(c.data(), scores.data(), widened.data(), m, k, n, k, n, k, accumulate);
      kernels_->matmul_bf16(d.data(), scores.data(), half.data(), m, k, n, k, n, k, accumulate,
                            nullptr);
      EXPECT_EQ(c, d) << m;
    }
  }
}

TEST_P(KernelsTest, ProductsPassNanOn) {
  Floats a(8 * 24, 1.0f), b(40 * 40, 0.0f), c(8 * 40);
  a[3 * 24 + 23] = kNan;
  kernels_->matmul(c.data(), a.data(), b.data(), 8, 40, 24, 40, 24, 40, false);
  for (size_t i = 0; i < c.size(); ++i) EXPECT_EQ(std::isnan(c[i]), i / 40 == 3);
  kernels_->matmul_bt(c.data(), a.data(), b.data(), 8, 40, 24, 40, 24, 24, false);
  for (size_t i = 0; i < c.size(); ++i) EXPECT_EQ(std::isnan(c[i]), i / 40 == 3);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void expect_close(const Floats& got, const std::vector<double>& expected, double relative) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(got[i], expected[i], relative * std::fabs(expected[i]) + 1e-37) << i;
}

TEST_P(KernelsTest, VectorFunctions) {
  for (size_t n : {1u, 3u, 4u, 7u, 16u, 17u, 31u, 33u, 64u, 100u, 128u, 200u, 256u, 2048u, 2051u}) {
    SCOPED_TRACE(n);
    const int count = static_cast<int>(n);
    const Floats x = random_floats(n, 1, 3.0f), y = random_floats(n, 2);
    const Floats z = random_floats(n, 3, 9.0f);
    double square = 0, product = 0, size = 0;
    for (size_t i = 0; i < n; ++i) {
      square += double{x[i]} * x[i];
      product += double{x[i]} * y[i];
      size += std::fabs(double{x[i]} * y[i]);
    }
    EXPECT_NEAR(kernels_->dot(x.data(), y.data(), count), product, 1e-6 * size);
    EXPECT_EQ(kernels_->max(x.data(), count), *std::max_element(x.begin(), x.end()));

    const double rms = 1 / std::sqrt(square / static_cast<double>(n) + 1e-6);
    const double l2 = 0.25 / std::sqrt(square + 1e-6);
    Floats out(n + 1, kUntouched);  // one past the end must stay
    std::vector<double> expected(n + 1, kUntouched);
    const auto check = [&](const char* name, const auto& of, double relative) {
      SCOPED_TRACE(name);
      for (size_t i = 0; i < n; ++i) expected[i] = of(i);
      expect_close(out, expected, relative);
    };
    const auto fill = [&](const Floats& v) { std::copy(v.begin(), v.end(), out.begin()); };
    fill(y);
    kernels_->axpy(out.data(), 0.0f, x.data(), count);
    check("axpy 0", [&](size_t i) { return y[i]; }, 0);
    fill(y);
    kernels_->axpy(out.data(), 0.75f, x.data(), count);
    for (size_t i = 0; i < n; ++i) ASSERT_NEAR(out[i], y[i] + 0.75 * x[i], 2e-6);
    fill(y);
    kernels_->scale(out.data(), 0.3f, count);
    check("scale", [&](size_t i) { return double{0.3f} * y[i]; }, 1e-7);
    fill(y);
    kernels_->add(out.data(), x.data(), count);
    check("add", [&](size_t i) { return x[i] + y[i]; }, 0);
    fill(x);
    const float total = kernels_->exp_sum(out.data(), 1.5f, count);
    check("exp_sum", [&](size_t i) { return std::exp(double{x[i] - 1.5f}); }, 2.4e-7);
    EXPECT_NEAR(total, std::accumulate(expected.begin(), expected.end() - 1, 0.0), 1e-6 * total);
    kernels_->rms_norm(out.data(), x.data(), y.data(), count, 1e-6f);
    check("rms_norm", [&](size_t i) { return x[i] * rms * y[i]; }, 1e-6);
    kernels_->gated_rms_norm(out.data(), x.data(), y.data(), z.data(), count, 1e-6f);
    check("gated", [&](size_t i) { return x[i] * rms * y[i] * z[i] * sigmoid(z[i]); }, 2e-6);
    kernels_->l2_norm(out.data(), x.data(), 0.25f, count, 1e-6f);
    check("l2_norm", [&](size_t i) { return x[i] * l2; }, 1e-6);
    kernels_->silu_mul(out.data(), z.data(), y.data(), count);
    check("silu_mul", [&](size_t i) { return z[i] * sigmoid(z[i]) * y[i]; }, 1e-6);
    kernels_->sigmoid_mul(out.data(), y.data(), z.data(), count);
    check("sigmoid_mul", [&](size_t i) { return y[i] * sigmoid(z[i]); }, 1e-6);
    const Floats weight = random_floats(4 * n, 4);
    const float* taps[] = {x.data(), y.data(), z.data(), y.data()};
    kernels_->conv_silu(out.data(), taps, weight.data(), 4, count);
    for (size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (size_t j = 0; j < 4; ++j) sum += double{taps[j][i]} * weight[j * n + i];
      ASSERT_NEAR(out[i], sum * sigmoid(sum), 2e-5);
    }
    EXPECT_EQ(out[n], kUntouched);
  }
}

TEST_P(KernelsTest, VectorFunctionsPassNanOn) {
  for (size_t n : {1u, 5u, 16u, 37u, 64u, 131u}) {
    for (size_t at = 0; at < n; at += 3) {
      SCOPED_TRACE(concat(n, " ", at));
      const int count = static_cast<int>(n);
      const Floats one(n, 1.0f);
      Floats bad = one, out(n);
      bad[at] = kNan;
      const auto only_at = [&] {
        for (size_t i = 0; i < n; ++i)
          if (std::isnan(out[i]) != (i == at)) return false;
        return true;
      };
      const auto everywhere = [&] {
        return std::all_of(out.begin(), out.end(), [](float v) { return std::isnan(v); });
      };
      EXPECT_TRUE(std::isnan(kernels_->dot(bad.data(), one.data(), count)));
      EXPECT_TRUE(std::isnan(kernels_->max(bad.data(), count)));
      out = bad;
      EXPECT_TRUE(std::isnan(kernels_->exp_sum(out.data(), 0.0f, count)) && only_at());
      kernels_->silu_mul(out.data(), bad.data(), one.data(), count);
      EXPECT_TRUE(only_at());
      kernels_->sigmoid_mul(out.data(), one.data(), bad.data(), count);
      EXPECT_TRUE(only_at());
      kernels_->gated_rms_norm(out.data(), one.data(), one.data(), bad.data(), count, 1e-6f);
      EXPECT_TRUE(only_at());
      kernels_->rms_norm(out.data(), bad.data(), one.data(), count, 1e-6f);
      EXPECT_TRUE(everywhere());
      kernels_->l2_norm(out.data(), bad.data(), 1.0f, count, 1e-6f);
      EXPECT_TRUE(everywhere());
    }
  }
}

TEST_P(KernelsTest, ExpOverTheFullRange) {
  Floats x, got;
  for (float v = -110.0f; v < 95.0f; v += 0.00137f) x.push_back(v);
  got = x;
  kernels_->exp_sum(got.data(), 0.0f, static_cast<int>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(double{x[i]});
    if (exact > std::numeric_limits<float>::max()) {
      ASSERT_EQ(got[i], kInf) << x[i];
      continue;
    }
    const float near = static_cast<float>(exact);
    const double ulp = std::nextafter(near, kInf) - double{near};
    ASSERT_LE(std::fabs(got[i] - exact), 2 * ulp) << x[i];
  }
  Floats special = {-kInf, kInf, kNan, 0.0f, -0.0f, -1000.0f, 1000.0f};
  kernels_->exp_sum(special.data(), 0.0f, 7);
  EXPECT_EQ(special[0], 0.0f);
  EXPECT_EQ(special[1], kInf);
  EXPECT_TRUE(std::isnan(special[2]));
  EXPECT_EQ(special[3], 1.0f);
  EXPECT_EQ(special[4], 1.0f);
  EXPECT_EQ(special[5], 0.0f);
  EXPECT_EQ(special[6], kInf);
  // silu neither overflows nor loses its sign far out.
  const Floats gate = {-200.0f, -90.0f, 90.0f, 1e30f, -1e30f}, one(5, 1.0f);
  Floats out(5);
  kernels_->silu_mul(out.data(), gate.data(), one.data(), 5);
  EXPECT_EQ(out[0], 0.0f);
  EXPECT_NEAR(out[1], -90 * std::exp(-90.0), 1e-42);
  EXPECT_EQ(out[2], 90.0f);
  EXPECT_EQ(out[3], 1e30f);
  EXPECT_EQ(out[4], 0.0f);
}

TEST_P(KernelsTest, GatedDeltaStep) {
  for (auto [dk, dv] : {std::pair{128, 128}, {64, 48}, {5, 16}, {128, 208}}) {
    SCOPED_TRACE(concat(dk, " by ", dv));
    const size_t m = static_cast<size_t>(dk), n = static_cast<size_t>(dv);
    Floats state = random_floats(m * n, 1), out(n);
    const Floats q = random_floats(m, 2, 0.1f), k = random_floats(m, 3, 0.1f);
    const Floats v = random_floats(n, 4);
    const float decay = 0.9f, beta = 0.6f;
    std::vector<double> expected(state.begin(), state.end());
    for (int step = 0; step < 3; ++step) {
      kernels_->gated_delta_step(state.data(), out.data(), q.data(), k.data(), v.data(), decay,
                                 beta, dk, dv);
      for (size_t c = 0; c < n; ++c) {
        double read = 0, result = 0;
        for (size_t r = 0; r < m; ++r) read += (expected[r * n + c] *= decay) * k[r];
        const double delta = beta * (v[c] - read);
        for (size_t r = 0; r < m; ++r) result += (expected[r * n + c] += k[r] * delta) * q[r];
        ASSERT_NEAR(out[c], result, 1e-5) << c;
      }
      for (size_t i = 0; i < state.size(); ++i) ASSERT_NEAR(state[i], expected[i], 3e-6) << i;
    }
    state[n] = kNan;  // row 1, column 0
    kernels_->gated_delta_step(state.data(), out.data(), q.data(), k.data(), v.data(), decay, beta,
                               dk, dv);
    for (size_t c = 0; c < n; ++c) ASSERT_EQ(std::isnan(out[c]), c == 0);
  }
}

TEST_P(KernelsTest, Conversions) {
  std::vector<uint16_t> halves(65536 + 5);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  Floats out(halves.size());
  const auto same = [](float a, float b) {
    return std::isnan(b) ? std::isnan(a) : a == b && std::signbit(a) == std::signbit(b);
  };
  const int64_t n = static_cast<int64_t>(halves.size());
  kernels_->f16_to_f32(out.data(), halves.data(), n);
  for (size_t i = 0; i < halves.size(); ++i) ASSERT_TRUE(same(out[i], f16_value(halves[i]))) << i;
  kernels_->bf16_to_f32(out.data(), halves.data(), n);
  for (size_t i = 0; i < halves.size(); ++i) ASSERT_TRUE(same(out[i], bf16_value(halves[i]))) << i;

  std::mt19937 engine(1);
  Floats x(100003);
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits = static_cast<uint32_t>(engine());
    if (i % 3 == 0) bits = (bits & 0xffff0000u) | 0x8000u;  // a tie
    std::memcpy(&x[i], &bits, 4);
  }
  std::vector<uint16_t> words(x.size());
  kernels_->f32_to_bf16(words.data(), x.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(words[i], bf16_of(x[i])) << x[i];
}

TEST_P(KernelsTest, ReadBytesReadsEverything) {
  std::vector<std::byte> data(1003);
  std::mt19937 engine(1);
  for (std::byte& b : data) b = static_cast<std::byte>(engine());
  uint64_t sum = 0, word;
  size_t i = 0;
  for (; i + 8 <= data.size(); i += 8) sum += (std::memcpy(&word, &data[i], 8), word);
  for (; i < data.size(); ++i) sum += static_cast<uint64_t>(data[i]);
  EXPECT_EQ(kernels_->read_bytes(data.data(), data.size()), sum);
}

INSTANTIATE_TEST_SUITE_P(Isa, KernelsTest, testing::Values("portable", "avx2", "avx512"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Dispatch, NamesAndDefault) {
  EXPECT_EQ(kernels_named("avx1024"), nullptr);
  EXPECT_EQ(kernels_named(""), nullptr);
  EXPECT_EQ(&kernels(), kernels_named(kernels().name));
}

}  // namespace
}  // namespace qwen_moe::cpu
