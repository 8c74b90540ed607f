// What a dependent phase costs on this device: chains of kernels in one graph, each reading its own
// cold bytes; a barrier across one persistent grid; the bandwidth of a cold read by size; and
// whether prefetching the next phase's bytes into L2 pays.
//   nvcc -std=c++20 -O3 -arch=sm_90a -Icsrc benchmarks/bench_gpu_phases.cu csrc/cuda/runtime.cpp
//   bench_gpu_phases [--json FILE]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "gpu_timing.h"

namespace qwen_moe::cuda {
namespace {

constexpr int kChain = 242;  // dependent phases of one decode step
constexpr int kReplays = 20;
constexpr size_t kPoolBytes = size_t{4} << 30;
constexpr size_t kRotation = size_t{1} << 30;  // bytes between two reads of the same address

// ---- kernels
// -------------------------------------------------------------------------------------

enum class Prefetch : int { none, lines, bulk };

struct Phase {
  const uint4* own = nullptr;  // [words]
  const uint4* next = nullptr;
  size_t words = 0;
  Prefetch prefetch = Prefetch::none;  // of next, before the wait
  bool before = false;                 // own bytes are asked for before the wait
  const unsigned* in = nullptr;        // what the phase before wrote
  unsigned* out = nullptr;             // gets *in + 1
  unsigned* sink = nullptr;            // keeps the loads alive
};

__device__ void prefetch_next(const Phase& p) {
  const auto* next = reinterpret_cast<const char*>(p.next);
  size_t bytes = p.words * 16;
  if (p.prefetch == Prefetch::lines) {
    size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x * 128;
    for (size_t i = (blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x) * 128; i < bytes;
         i += stride)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(next + i));
  } else if (p.prefetch == Prefetch::bulk && threadIdx.x == 0) {
    constexpr size_t kPiece = 16384;
    size_t share = (p.words + gridDim.x - 1) / gridDim.x * 16;
    size_t end = min((blockIdx.x + 1) * share, bytes);
#pragma unroll 1
    for (size_t i = blockIdx.x * share; i < end; i += kPiece) {
#if __CUDA_ARCH__ >= 900  // the program refuses older ones before it gets here
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(next + i),
                   "r"(static_cast<unsigned>(min(kPiece, end - i))));
#endif
    }
  }
}

// The dependency itself: every block needs the word of the phase before, one writes the next.
__device__ __forceinline__ void wait_and_trigger(const Phase& p, unsigned* value) {
  wait_for_predecessor();
  launch_dependents();
  *value = __ldcg(p.in);
}
__device__ __forceinline__ void finish(const Phase& p, unsigned value, unsigned bits) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.out = value + 1;
  if (bits == 0x9e3779b9u) *p.sink = bits;
}

__device__ __forceinline__ unsigned fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// Predicated, not branched around, so that a run of them is issued back to back.
__device__ __forceinline__ uint4 load_if(const uint4* from, bool there) {
  uint4 v{0, 0, 0, 0};
  asm volatile(
      "{ .reg .pred q; setp.ne.s32 q, %5, 0; @q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, "
      "[%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return v;
}

// 16-byte loads into registers, kUnroll of them in flight in each thread. With `before` all of them
// are consumed before the wait, which a kernel whose arithmetic needs its input could not do.
template <int kUnroll>
__global__ void __launch_bounds__(1024, 1) read_registers(Phase p) {
  unsigned bits = 0, value = 0;
  if (!p.before) wait_and_trigger(p, &value);
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t base = blockIdx.x * static_cast<size_t>(blockDim.x); base < p.words;
       base += kUnroll * stride) {
    size_t i = base + threadIdx.x;
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      v[u] = load_if(p.own + i + u * stride, i + u * stride < p.words);
    // Last first: else the compiler uses each word as it comes and keeps only two loads in flight.
#pragma unroll
    for (int u = kUnroll - 1; u >= 0; --u) bits ^= fold(v[u]);
  }
  prefetch_next(p);
  if (p.before) wait_and_trigger(p, &value);
  finish(p, value, bits);
}

// cp.async into kSlots slots of 16 bytes that belong to one thread, so that no barrier is needed.
// With `before` the slots are filled before the wait and drained after it.
template <int kSlots>
__global__ void read_async(Phase p) {
  extern __shared__ uint4 slots[];  // [kSlots][threads]
  unsigned bits = 0, value = 0;
  if (!p.before) wait_and_trigger(p, &value);
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t from = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x, to = from;
  uint4* mine = slots + threadIdx.x;
  uint4* end = mine + kSlots * blockDim.x;
  for (uint4* slot = mine; slot != end; slot += blockDim.x, to += stride) {
    if (to < p.words) copy_async_16(slot, p.own + to);
    copy_async_commit();
  }
  prefetch_next(p);
  if (p.before) wait_and_trigger(p, &value);
  for (uint4* slot = mine; from < p.words; from += stride, to += stride) {
    copy_async_wait<kSlots - 1>();
    bits ^= fold(*slot);
    if (to < p.words) copy_async_16(slot, p.own + to);
    copy_async_commit();
    slot += blockDim.x;
    if (slot == end) slot = mine;
  }
  finish(p, value, bits);
}

// Bulk copies: each block owns one contiguous run, thread 0 asks for pages of it.
constexpr int kPageWords = 512;  // 8 KiB

template <int kPages>
__global__ void read_bulk(Phase p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 pages[];  // [kPages][kPageWords]
  __shared__ uint64_t full[kPages];
  unsigned bits = 0, value = 0;
  size_t share = (p.words + gridDim.x - 1) / gridDim.x;
  size_t begin = min(blockIdx.x * share, p.words), end = min(begin + share, p.words);
  int count = static_cast<int>((end - begin + kPageWords - 1) / kPageWords);
  auto words_of = [&](int page) {
    return static_cast<int>(
        min(static_cast<size_t>(kPageWords), end - begin - static_cast<size_t>(page) * kPageWords));
  };
  auto issue = [&](int page) {
    uint32_t barrier = shared_address(full + page % kPages);
    int bytes = words_of(page) * 16;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(pages + page % kPages * kPageWords)),
        "l"(p.own + begin + static_cast<size_t>(page) * kPageWords), "r"(bytes), "r"(barrier)
        : "memory");
  };
  if (!p.before) wait_and_trigger(p, &value);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + i))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int page = 0; page < min(count, kPages); ++page) issue(page);
  }
  __syncthreads();
  prefetch_next(p);
  if (p.before) wait_and_trigger(p, &value);
  for (int page = 0; page < count; ++page) {
    uint32_t barrier = shared_address(full + page % kPages), done = 0;
    while (!done)
      asm volatile(
          "{ .reg .pred q; mbarrier.try_wait.parity.shared::cta.b64 q, [%1], %2; selp.u32 %0, 1, "
          "0, "
          "q; }"
          : "=r"(done)
          : "r"(barrier), "r"(page / kPages % 2)
          : "memory");
    const uint4* data = pages + page % kPages * kPageWords;
    for (int i = threadIdx.x; i < words_of(page); i += blockDim.x) bits ^= fold(data[i]);
    if (page + kPages < count) {
      __syncthreads();
      if (threadIdx.x == 0) issue(page + kPages);
    }
  }
  finish(p, value, bits);
#endif
}

__global__ void fill_random(uint4* pool, size_t words) {
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < words;
       i += stride) {
    uint64_t z[2];
    for (int h = 0; h < 2; ++h) {  // splitmix64
      uint64_t x = (2 * i + h + 1) * 0x9e3779b97f4a7c15ull;
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
      z[h] = x ^ (x >> 31);
    }
    pool[i] = uint4{static_cast<unsigned>(z[0]), static_cast<unsigned>(z[0] >> 32),
                    static_cast<unsigned>(z[1]), static_cast<unsigned>(z[1] >> 32)};
  }
}

// A barrier across the grid, `rounds` times. kValues numbers of every block are seen by every block
// after each: 0 is the bare barrier.
constexpr int kHopThreads = 512;

__device__ __forceinline__ unsigned hop_value(int word, int round) {
  return (word * 2654435761u) ^ (round * 40503u);
}

// One counter: the last write of a block is released by its arrival, one thread of each polls.
template <int kValues>
__global__ void __launch_bounds__(kHopThreads)
    hop_counter(unsigned* counter, unsigned* values, int rounds, unsigned* sums) {
  int blocks = gridDim.x, words = blocks * kValues;
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
    unsigned* now = values + round % 2 * words;
    if constexpr (kValues > 0) {
      int word = blockIdx.x * kValues + threadIdx.x;
      if (threadIdx.x < kValues) __stcg(now + word, hop_value(word, round));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned want = static_cast<unsigned>(blocks) * (round + 1), seen;
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      while (seen < want);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < words; i += kHopThreads) sum += __ldcg(now + i);
  }
  atomicAdd(sums + blockIdx.x, sum);
}

// Data that says itself when it is there: words of (round + 1, value), which all blocks poll. Two
// sets of words in turn: a block writes set r + 2 only after all have written r + 1, hence read r.
template <int kValues, int kPerThread>
__global__ void __launch_bounds__(kHopThreads)
    hop_tagged(uint64_t* values, int rounds, unsigned* sums) {
  int words = gridDim.x * kValues;
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
    uint64_t* now = values + round % 2 * words;
    auto tag = static_cast<unsigned>(round + 1);
    if (threadIdx.x < kValues) {
      int word = blockIdx.x * kValues + threadIdx.x;
      uint64_t tagged = static_cast<uint64_t>(tag) << 32 | hop_value(word, round);
      asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(now + word), "l"(tagged) : "memory");
    }
    uint64_t got[kPerThread];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        int word = threadIdx.x + i * kHopThreads;
        got[i] = static_cast<uint64_t>(tag) << 32;
        if (word < words)
          asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                       : "=l"(got[i])
                       : "l"(now + word)
                       : "memory");
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) all = all && got[i] >> 32 == tag;
    } while (!all);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += static_cast<unsigned>(got[i]);
    __syncthreads();
  }
  atomicAdd(sums + blockIdx.x, sum);
}

// ---- measuring
// -----------------------------------------------------------------------------------

struct Report {
  std::string json = "[";
  void add(const std::string& section, const std::string& what, double us, double gb_per_s) {
    char line[512];
    std::snprintf(line, sizeof line,
                  "%s\n {\"section\": \"%s\", \"what\": \"%s\", \"us\": %.4f, \"gb_per_s\": %.1f}",
                  json.size() > 1 ? "," : "", section.c_str(), what.c_str(), us, gb_per_s);
    json += line;
  }
};

using Kernel = void (*)(Phase);

struct Reader {
  const char* name;
  Kernel kernel;
  size_t shared_bytes;
};

struct Shape {
  int blocks;
  int threads;
  int cluster = 1;
  bool programmatic = false;
};

class Bench {
 public:
  Bench() : properties(device_properties(0)), pool_(kPoolBytes / 16), words_(256) {
    fill_random<<<properties.sms * 8, 512, 0, stream>>>(pool_.data(), pool_.size());
    QWEN_MOE_CUDA(cudaGetLastError());
    QWEN_MOE_CUDA(cudaMemsetAsync(words_.data(), 0, words_.bytes(), stream));
    stream.synchronize();
  }

  // Microseconds per phase of a chain of `reader`, each with its own cold `bytes`.
  double chain(const Reader& reader, size_t bytes, Shape shape, bool before = false,
               Prefetch prefetch = Prefetch::none) {
    size_t step = (bytes + 4095) / 4096 * 4096;
    size_t slots = bytes ? kPoolBytes / step : 1;
    int length =
        bytes ? static_cast<int>(std::min<size_t>(kChain, std::max<size_t>(slots, 4))) : kChain;
    length -= length % 2;  // the counter is to end in the word it began in
    // Several graphs in turn, each over its own part of the pool, when one would read too little.
    size_t graphs = 1;
    if (bytes)
      graphs = std::clamp<size_t>(kRotation / (step * length), 1,
                                  std::max<size_t>(slots / static_cast<size_t>(length), 1));
    graphs = std::min<size_t>(graphs, 4);
    if (reader.shared_bytes) {
      allow_shared(reader.kernel, reader.shared_bytes);
      // A split that holds one block would keep the next kernel off the multiprocessor.
      QWEN_MOE_CUDA(cudaFuncSetAttribute(reader.kernel,
                                         cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared));
    }
    std::vector<CapturedChain> replay;
    for (size_t g = 0; g < graphs; ++g)
      replay.emplace_back(stream, [&] {
        for (int i = 0; i < length; ++i) {
          size_t at = g * static_cast<size_t>(length) + static_cast<size_t>(i);
          bool last = i + 1 == length;
          Phase p{.own = pool_.data() + at % slots * step / 16,
                  .next = pool_.data() + (at + 1) % slots * step / 16,
                  .words = bytes / 16,
                  .prefetch = last ? Prefetch::none : prefetch,
                  .before = before,
                  .in = words_.data() + i % 2 * 32,
                  .out = words_.data() + (i + 1) % 2 * 32,
                  .sink = words_.data() + 128};
          launch(reader, shape, p);
        }
      });
    if (shape.programmatic)
      require<Device>(replay[0].programmatic_edges() == static_cast<size_t>(length - 1),
                      "the graph has ", replay[0].programmatic_edges(),
                      " programmatic edges, expected ", length - 1);
    for (const auto& graph : replay) graph.launch(stream);
    std::vector<float> times;
    for (int i = 0; i < kReplays; ++i)
      times.push_back(timed([&] { replay[static_cast<size_t>(i) % graphs].launch(stream); }));
    expected_ += static_cast<unsigned>(length) * (kReplays + static_cast<unsigned>(graphs));
    unsigned counted = 0;
    QWEN_MOE_CUDA(cudaMemcpy(&counted, words_.data(), 4, cudaMemcpyDeviceToHost));
    require<Device>(counted == expected_, reader.name, ": the chain counted ", counted,
                    " phases, expected ", expected_, "; a phase did not see the one before");
    return median(times) * 1e3 / length;
  }

  // Microseconds per round of a grid-wide barrier, from the difference of two numbers of rounds.
  double hop(auto&& run, size_t state_words, int values) {
    constexpr int kRounds = 200;
    DeviceBuffer<unsigned> state(state_words), sums(static_cast<size_t>(properties.sms));
    double us[2];
    for (int longer = 0; longer < 2; ++longer) {
      int rounds = kRounds * (longer + 1);
      std::vector<float> times;
      for (int i = 0; i < kReplays + 2; ++i) {
        QWEN_MOE_CUDA(cudaMemsetAsync(state.data(), 0, state.bytes(), stream));
        QWEN_MOE_CUDA(cudaMemsetAsync(sums.data(), 0, sums.bytes(), stream));
        float t = timed([&] { run(state.data(), rounds, sums.data()); });
        if (i >= 2) times.push_back(t);
      }
      us[longer] = median(times) * 1e3;
      unsigned want = 0;
      for (int round = 0; round < rounds; ++round)
        for (int word = 0; word < properties.sms * values; ++word)
          want +=
              (static_cast<unsigned>(word) * 2654435761u) ^ (static_cast<unsigned>(round) * 40503u);
      std::vector<unsigned> got(static_cast<size_t>(properties.sms));
      QWEN_MOE_CUDA(cudaMemcpy(got.data(), sums.data(), sums.bytes(), cudaMemcpyDeviceToHost));
      for (unsigned sum : got)
        require<Device>(sum == want, "a block read stale values through the barrier");
    }
    return (us[1] - us[0]) / kRounds;
  }

  // All blocks are on the device at once or the launch is refused.
  template <class... Params, class... Args>
  void launch_resident(void (*kernel)(Params...), Args... args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(properties.sms));
    config.blockDim = dim3(kHopThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    QWEN_MOE_CUDA(cudaLaunchKernelEx(&config, kernel, args...));
  }

  DeviceProperties properties;
  Stream stream;

 private:
  void launch(const Reader& reader, Shape shape, Phase p) {
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (shape.programmatic) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      attributes[count].val.clusterDim.y = 1;
      attributes[count++].val.clusterDim.z = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks / shape.cluster * shape.cluster));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = reader.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    QWEN_MOE_CUDA(cudaLaunchKernelEx(&config, reader.kernel, p));
  }

  float timed(auto&& work) { return stopwatch_(stream, work); }

  Stopwatch stopwatch_;
  DeviceBuffer<uint4> pool_;
  DeviceBuffer<unsigned> words_;
  unsigned expected_ = 0;
};

// The in-flight bytes of a block: slots of 16 bytes times threads.
std::vector<Reader> readers(int threads) {
  std::vector<Reader> all = {{"registers x4", read_registers<4>, 0},
                             {"registers x8", read_registers<8>, 0}};
  if (threads == 256) {
    all.push_back({"cp.async 24K", read_async<6>, 24 << 10});
    all.push_back({"cp.async 48K", read_async<12>, 48 << 10});
    all.push_back({"cp.async 96K", read_async<24>, 96 << 10});
  } else {
    all.push_back({"cp.async 24K", read_async<3>, 24 << 10});
    all.push_back({"cp.async 48K", read_async<6>, 48 << 10});
    all.push_back({"cp.async 96K", read_async<12>, 96 << 10});
  }
  all.push_back({"bulk 96K", read_bulk<12>, 12 * kPageWords * 16});
  return all;
}

double gb_per_s(size_t bytes, double us) { return static_cast<double>(bytes) / us * 1e-3; }

void bench_chain(Bench& bench, Report& report) {
  int sms = bench.properties.sms;
  std::printf(
      "\n1. A chain of %d phases in one graph, us per phase. after/before: programmatic edges,\n"
      "   loads after/before the wait\n%14s %-14s | %7s %7s %7s | %7s %7s %7s\n",
      kChain, "", "threads", "256", "after", "before", "512", "after", "before");
  auto row = [&](const char* size, size_t bytes, const char* name, auto&& measure) {
    std::printf("%14s %-14s |", size, name);
    for (int threads : {256, 512}) {
      const char* forms[] = {"plain", "after", "before"};
      for (int form = 0; form < 3; ++form) {
        double us = measure(threads, form);
        std::printf(" %7.2f%s", us, form == 2 && threads == 256 ? " |" : "");
        report.add("chain", concat(size, " ", name, " ", threads, " threads ", forms[form]), us,
                   gb_per_s(bytes, us));
      }
    }
    std::printf("\n");
  };
  for (int cluster : {1, 4, 8})
    row("empty", 0,
        cluster == 1   ? ""
        : cluster == 4 ? "cluster of 4"
                       : "cluster of 8",
        [&](int threads, int form) {
          return bench.chain(
              {"empty", read_registers<4>, 0}, 0,
              {.blocks = sms, .threads = threads, .cluster = cluster, .programmatic = form > 0},
              form == 2);
        });
  const std::pair<const char*, size_t> sizes[] = {{"1.0 MB", 1000000 / 16 * 16},
                                                  {"2.1 MB", 2100000 / 16 * 16},
                                                  {"4.3 MB", 4300000 / 16 * 16},
                                                  {"8.6 MB", 8600000 / 16 * 16},
                                                  {"13.0 MB", 13000000 / 16 * 16}};
  for (auto [size, bytes] : sizes)
    for (size_t reader = 0; reader < readers(256).size(); ++reader)
      row(size, bytes, readers(256)[reader].name, [&](int threads, int form) {
        return bench.chain(readers(threads)[reader], bytes,
                           {.blocks = sms, .threads = threads, .programmatic = form > 0},
                           form == 2);
      });
}

void bench_hop(Bench& bench, Report& report) {
  int sms = bench.properties.sms;
  require<Device>(sms <= 160, "hop_tagged polls at most 160 x 16 words, the device has ", sms,
                  " multiprocessors");
  auto blocks = static_cast<size_t>(sms);
  std::printf(
      "\n2. A barrier across %d resident blocks, us per hop (16 values a block: every block\n"
      "   reads all %d after it)\n",
      sms, sms * 16);
  auto row = [&](const char* name, double us) {
    std::printf("   %-34s %6.3f\n", name, us);
    report.add("hop", name, us, 0);
  };
  // The counter has 64 words of its own, so that polling does not touch the lines of the values.
  auto counter = [&](auto kernel) {
    return [&bench, kernel](unsigned* state, int rounds, unsigned* sums) {
      bench.launch_resident(kernel, state, state + 64, rounds, sums);
    };
  };
  auto tagged = [&](auto kernel) {
    return [&bench, kernel](unsigned* state, int rounds, unsigned* sums) {
      bench.launch_resident(kernel, reinterpret_cast<uint64_t*>(state), rounds, sums);
    };
  };
  row("counter", bench.hop(counter(hop_counter<0>), 64, 0));
  row("counter, 16 values a block", bench.hop(counter(hop_counter<16>), 64 + 32 * blocks, 16));
  row("tagged words, 1 value a block", bench.hop(tagged(hop_tagged<1, 1>), 4 * blocks, 1));
  row("tagged words, 16 values a block", bench.hop(tagged(hop_tagged<16, 5>), 64 * blocks, 16));
}

void bench_read(Bench& bench, Report& report) {
  int sms = bench.properties.sms;
  double empty = bench.chain({"empty", read_registers<4>, 0}, 0, {.blocks = sms, .threads = 512});
  std::printf(
      "\n3. Cold reads by size, plain loads, nodes of a plain graph; net: less the %.2f us of an "
      "empty node\n%14s %9s %8s %8s  %s\n",
      empty, "MB", "us", "GB/s", "net GB/s", "best shape");
  for (double mb : {1.0, 2.0, 4.0, 8.0, 13.0, 64.0, 262.0, 1000.0}) {
    auto bytes = static_cast<size_t>(mb * 1e6) / 16 * 16;
    double best = 1e30;
    std::string shape;
    for (int threads : {256, 512, 1024})
      for (int per_sm : {1, 2, 4})
        for (int unroll : {4, 8}) {
          if (threads * per_sm > 2048) continue;
          Reader reader = unroll == 4 ? Reader{"registers x4", read_registers<4>, 0}
                                      : Reader{"registers x8", read_registers<8>, 0};
          double us = bench.chain(reader, bytes, {.blocks = sms * per_sm, .threads = threads});
          if (us >= best) continue;
          best = us;
          shape = concat(per_sm, " x ", threads, " threads, ", unroll, " loads");
        }
    std::printf("%14.0f %9.2f %8.0f %8.0f  %s\n", mb, best, gb_per_s(bytes, best),
                gb_per_s(bytes, best - empty), shape.c_str());
    report.add("read", concat(mb, " MB ", shape), best, gb_per_s(bytes, best));
  }
}

void bench_prefetch(Bench& bench, Report& report) {
  int sms = bench.properties.sms;
  std::printf(
      "\n4. Programmatic chain that also prefetches the next phase's bytes to L2, us per phase, "
      "512 "
      "threads\n%14s %-14s | %7s %7s %7s | %7s %7s %7s\n",
      "", "loads", "after", "lines", "bulk", "before", "lines", "bulk");
  const std::pair<const char*, size_t> sizes[] = {{"1.0 MB", 1000000 / 16 * 16},
                                                  {"2.1 MB", 2100000 / 16 * 16},
                                                  {"4.3 MB", 4300000 / 16 * 16},
                                                  {"8.6 MB", 8600000 / 16 * 16},
                                                  {"13.0 MB", 13000000 / 16 * 16}};
  const char* names[] = {"none", "lines", "bulk"};
  for (auto [size, bytes] : sizes)
    for (const Reader& reader : {Reader{"registers x4", read_registers<4>, 0},
                                 Reader{"cp.async 48K", read_async<6>, 48 << 10},
                                 Reader{"cp.async 96K", read_async<12>, 96 << 10},
                                 Reader{"bulk 96K", read_bulk<12>, 12 * kPageWords * 16}}) {
      std::printf("%14s %-14s |", size, reader.name);
      for (bool before : {false, true})
        for (int kind = 0; kind < 3; ++kind) {
          double us =
              bench.chain(reader, bytes, {.blocks = sms, .threads = 512, .programmatic = true},
                          before, static_cast<Prefetch>(kind));
          std::printf(" %7.2f%s", us, kind == 2 && !before ? " |" : "");
          report.add("prefetch",
                     concat(size, " ", reader.name, before ? " before" : " after", " prefetch ",
                            names[kind]),
                     us, gb_per_s(bytes, us));
        }
      std::printf("\n");
    }
}

int run(int argc, char** argv) {
  const char* json = nullptr;
  for (int i = 1; i < argc; ++i) {
    require(!std::strcmp(argv[i], "--json") && i + 1 < argc, "usage: ", argv[0], " [--json FILE]");
    json = argv[++i];
  }
  Bench bench;
  require<Device>(bench.properties.programmatic_launch(),
                  "programmatic edges need compute capability 9.0 or later");
  cudaDeviceProp device{};
  QWEN_MOE_CUDA(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors, %d MB of L2; medians of %d replays\n", device.name,
              bench.properties.sms, device.l2CacheSize >> 20, kReplays);
  Report report;
  bench_chain(bench, report);
  bench_hop(bench, report);
  bench_read(bench, report);
  bench_prefetch(bench, report);
  if (json) {
    std::ofstream file(json);
    file << "{\"device\": \"" << device.name << "\", \"figures\": " << report.json << "\n]}\n";
    require(file.good(), "cannot write ", json);
  }
  return 0;
}

}  // namespace
}  // namespace qwen_moe::cuda

int main(int argc, char** argv) {
  return qwen_moe::cuda::run_program(argc, argv, qwen_moe::cuda::run);
}
