// What this machine is and how fast its memory reads: the ceiling that decode is measured against.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"
#include "engine/backend.h"

namespace qwen_moe {

std::string cpu_isa() { return std::string(cpu::kernels().name); }

double cpu_read_bandwidth(int threads, size_t bytes, double seconds) {
  auto pool = cpu::ThreadPool::shared(threads);
  size_t each = bytes / static_cast<size_t>(threads) / 4096 * 4096;
  cpu::HostBuffer<std::byte> memory(each * static_cast<size_t>(threads));
  std::fill_n(memory.data(), memory.size(), std::byte{1});
  std::atomic<uint64_t> sink{0};  // keeps the reads from being dropped
  double best = 0, spent = 0;
  while (spent < seconds) {
    auto begin = std::chrono::steady_clock::now();
    pool->run(threads, [&](int i, int) {
      sink += cpu::kernels().read_bytes(memory.data() + static_cast<size_t>(i) * each, each);
    });
    double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, static_cast<double>(memory.size()) / took);
    spent += took;
  }
  return best;
}

}  // namespace qwen_moe
