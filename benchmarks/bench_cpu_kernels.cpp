// Inner loops against the ceilings of the machine: bytes per second of weights read, and
// multiply-adds per second. `read` is the bandwidth ceiling to compare with.
//   bench_cpu_kernels --benchmark_filter='gemm/int4/large.*threads:2'
// QWEN_MOE_ISA=avx2 or portable measures the other tables.
#include <benchmark/benchmark.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"

namespace qwen_moe::cpu {
namespace {

using benchmark::Counter;
using benchmark::State;

struct Shape {
  const char* name;
  WeightFormat format;
  int n, k, group;
  bool has_zero;
};

// `large` is far beyond the caches, so that every pass streams from memory; `small` stays in L2.
constexpr Shape kShapes[] = {
    {"bf16/large", WeightFormat::bf16, 65536, 2048, 0, false},
    {"int8/large", WeightFormat::int8, 65536, 2048, 128, false},
    {"int4/large", WeightFormat::int4, 131072, 2048, 128, false},
    {"int4g32/large", WeightFormat::int4, 131072, 2048, 32, false},
    {"int4zero/large", WeightFormat::int4, 131072, 2048, 128, true},
    {"f32/small", WeightFormat::f32, 64, 1024, 0, false},
    {"f16/small", WeightFormat::f16, 128, 1024, 0, false},
    {"bf16/small", WeightFormat::bf16, 128, 1024, 0, false},
    {"int8/small", WeightFormat::int8, 256, 1024, 128, false},
    {"int4/small", WeightFormat::int4, 256, 1024, 128, false},
    {"int4g32/small", WeightFormat::int4, 256, 1024, 32, false},
    {"int4/prefill", WeightFormat::int4, 1024, 2048, 128, false},
    {"int4k4096/prefill", WeightFormat::int4, 1024, 4096, 128, false},
    {"int8/prefill", WeightFormat::int8, 1024, 2048, 128, false},
    {"bf16/prefill", WeightFormat::bf16, 1024, 2048, 0, false},
};

// Zeroed, aligned and on huge pages where the system has them, as weights should be.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    data_ = static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_));
#if defined(__linux__)
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, bytes_);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
  size_t bytes_;
  std::byte* data_;
};

// Calls body(begin, end) over [0, count) in pieces, on all threads of the pool.
template <class Body>
void share(ThreadPool& pool, int count, const Body& body) {
  const int pieces = pool.size() == 1 ? 1 : std::min(count, 64);
  pool.run(pieces, [&](int i, int) {
    body(static_cast<int>(int64_t{count} * i / pieces),
         static_cast<int>(int64_t{count} * (i + 1) / pieces));
  });
}

void gemm(State& state, const Shape& shape) {
  const int rows = static_cast<int>(state.range(0));
  const auto pool = ThreadPool::shared(static_cast<int>(state.range(1)));
  const WeightSpec spec{shape.format, shape.n, shape.k, 1, shape.group, shape.has_zero};
  const Buffer weight(spec.matrix_bytes());
  share(*pool, spec.tiles(),
        [&](int begin, int end) { fill_random(weight.data(), spec, 1, 0.05f, begin, end); });
  const std::vector<float> x(static_cast<size_t>(rows) * static_cast<size_t>(shape.k), 0.5f);
  std::vector<int16_t> q(x.size());
  std::vector<float> scale(x.size() / 32),
      out(static_cast<size_t>(rows) * static_cast<size_t>(shape.n));
  std::vector<int32_t> sum(scale.size());
  if (shape.group > 0)
    kernels().quantize_rows(q.data(), scale.data(), sum.data(), x.data(), rows, shape.k,
                            shape.group);
  const Activations in = {x.data(), q.data(), scale.data(), sum.data()};
  for (auto _ : state) {
    share(*pool, spec.tiles(), [&](int begin, int end) {
      kernels().gemm({out.data(), shape.n, weight.data(), &spec, in, nullptr, rows, begin, end});
    });
    benchmark::ClobberMemory();
  }
  const double passes = static_cast<double>(state.iterations()) * 1e-9;
  state.counters["GB/s"] =
      Counter(passes * static_cast<double>(spec.matrix_bytes()), Counter::kIsRate);
  state.counters["GMAC/s"] = Counter(passes * rows * shape.n * shape.k, Counter::kIsRate);
}

void read(State& state) {
  const auto pool = ThreadPool::shared(static_cast<int>(state.range(0)));
  constexpr int kPieces = 256;
  constexpr size_t kPiece = size_t{1} << 20;
  const Buffer data(kPieces * kPiece);
  for (auto _ : state) {
    share(*pool, kPieces, [&](int begin, int end) {
      benchmark::DoNotOptimize(
          kernels().read_bytes(data.data() + static_cast<size_t>(begin) * kPiece,
                               static_cast<size_t>(end - begin) * kPiece));
    });
  }
  const double bytes = static_cast<double>(state.iterations()) * kPieces * kPiece;
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsRate);
}

using Product = decltype(Kernels::matmul);

void product(State& state, Product Kernels::* which) {
  const int m = static_cast<int>(state.range(0)), n = static_cast<int>(state.range(1));
  const int k = static_cast<int>(state.range(2));
  const size_t size = static_cast<size_t>(m + n) * static_cast<size_t>(k + 1);
  const std::vector<float> a(size, 0.5f), b(size, 0.25f);
  std::vector<float> c(static_cast<size_t>(m) * static_cast<size_t>(n));
  const bool at = which == &Kernels::matmul_at, bt = which == &Kernels::matmul_bt;
  for (auto _ : state) {
    (kernels().*which)(c.data(), a.data(), b.data(), m, n, k, n, at ? m : k, bt ? k : n, false);
    benchmark::ClobberMemory();
  }
  const double macs = static_cast<double>(state.iterations()) * m * n * k;
  state.counters["GMAC/s"] = Counter(macs * 1e-9, Counter::kIsRate);
}

void delta_step(State& state) {
  const size_t heads = static_cast<size_t>(state.range(0)), d = 128;
  std::vector<float> states(heads * d * d, 0.1f), out(d), q(d, 0.01f), k(d, 0.02f), v(d, 0.5f);
  for (auto _ : state) {
    for (size_t h = 0; h < heads; ++h)
      kernels().gated_delta_step(states.data() + h * d * d, out.data(), q.data(), k.data(),
                                 v.data(), 0.9f, 0.5f, 128, 128);
    benchmark::ClobberMemory();
  }
  const double bytes = static_cast<double>(state.iterations() * heads * d * d) * 8;
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsRate);  // read and written
  state.counters["heads/s"] =
      Counter(static_cast<double>(state.iterations() * heads), Counter::kIsRate);
}

void elements(State& state, const char* name) {
  const int n = 2048;
  std::vector<float> x(n, 0.5f), y(n, 0.25f), z(n, -0.5f), scale(n / 128);
  std::vector<int16_t> q(n);
  std::vector<int32_t> sum(n / 128);
  const std::string_view which = name;
  for (auto _ : state) {
    if (which == "quantize_rows")
      kernels().quantize_rows(q.data(), scale.data(), sum.data(), x.data(), 1, n, 128);
    if (which == "rms_norm") kernels().rms_norm(y.data(), x.data(), z.data(), n, 1e-6f);
    if (which == "silu_mul") kernels().silu_mul(y.data(), x.data(), z.data(), n);
    if (which == "dot") benchmark::DoNotOptimize(kernels().dot(x.data(), z.data(), n));
    if (which == "exp_sum") {
      benchmark::DoNotOptimize(kernels().exp_sum(x.data(), 1.0f, n));
    }
    benchmark::ClobberMemory();
  }
  state.counters["G/s"] =
      Counter(static_cast<double>(state.iterations()) * n * 1e-9, Counter::kIsRate);
}

void pack(State& state, WeightFormat format) {
  const WeightSpec spec{format, 256, 2048, 1, is_quantized(format) ? 128 : 0};
  std::vector<uint16_t> source(size_t{256} * 2048);
  uint32_t random = 1;
  for (uint16_t& v : source) {  // bf16 between 2^-6 and 2^-4 in size
    random = random * 1664525 + 1013904223;
    v = static_cast<uint16_t>((random >> 16 & 0x80ff) | 0x3c80);
  }
  std::vector<std::byte> out(spec.matrix_bytes());
  for (auto _ : state) {
    pack_tiles(out.data(), spec, source.data(), DType::bf16, 0, spec.tiles());
    benchmark::ClobberMemory();
  }
  state.counters["Mweights/s"] =
      Counter(static_cast<double>(state.iterations()) * 256 * 2048 * 1e-6, Counter::kIsRate);
}

void register_all() {
  for (int threads : {1, 2})
    benchmark::RegisterBenchmark("read", read)->ArgName("threads")->Arg(threads)->UseRealTime();
  for (const Shape& shape : kShapes) {
    const std::string_view name = shape.name;
    const bool large = name.ends_with("large"), prefill = name.ends_with("prefill");
    for (int rows : {1, 2, 4, 8, 16, 64, 512}) {
      if (large ? rows > 8 : prefill ? rows < 64 : rows > 16) continue;
      for (int threads : {1, 2}) {
        if (!large && threads > 1) continue;
        benchmark::RegisterBenchmark(concat("gemm/", name).c_str(), gemm, shape)
            ->ArgNames({"rows", "threads"})
            ->Args({rows, threads})
            ->UseRealTime();
      }
    }
  }
  const std::pair<const char*, Product Kernels::*> products[] = {
      {"matmul", &Kernels::matmul},
      {"matmul_bt", &Kernels::matmul_bt},
      {"matmul_at", &Kernels::matmul_at}};
  for (const auto& [name, which] : products)
    benchmark::RegisterBenchmark(name, product, which)
        ->Args({1, 128, 128})
        ->Args({8, 64, 256})
        ->Args({64, 64, 128})
        ->Args({64, 128, 128})
        ->Args({64, 128, 64});
  benchmark::RegisterBenchmark("gated_delta_step", delta_step)->Arg(1)->Arg(32)->Arg(2048);
  for (const char* name : {"quantize_rows", "rms_norm", "silu_mul", "dot", "exp_sum"})
    benchmark::RegisterBenchmark(concat("elements/", name).c_str(), elements, name);
  for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4})
    benchmark::RegisterBenchmark(concat("pack/", format_name(format)).c_str(), pack, format);
}

}  // namespace
}  // namespace qwen_moe::cpu

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  qwen_moe::cpu::register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
