#include "cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "base/error.h"

namespace qwen_moe::cpu {
namespace {

constexpr size_t kMapFrom = size_t{4} << 20;

// The number that follows `key` in the file, or that it begins with when `key` is empty; else 0.
size_t read_number(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string word;
  while (!key.empty() && file >> word && word != key) {
  }
  size_t number = 0;
  return file >> number ? number : 0;
}

}  // namespace

std::shared_ptr<std::byte> allocate_shared(size_t bytes) {
  bytes = std::max<size_t>((bytes + 63) / 64 * 64, 64);
  if (bytes < kMapFrom) {
    void* p = std::aligned_alloc(64, bytes);
    require<Capacity>(p != nullptr, "out of host memory: ", bytes, " bytes");
    std::memset(p, 0, bytes);
    return {static_cast<std::byte*>(p), [](std::byte* b) { std::free(b); }};
  }
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require<Capacity>(p != MAP_FAILED, "out of host memory: ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
  madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return {static_cast<std::byte*>(p), [bytes](std::byte* b) { munmap(b, bytes); }};
}

size_t available_memory() {
  size_t available = read_number("/proc/meminfo", "MemAvailable:") * 1024;
  size_t limit = read_number("/sys/fs/cgroup/memory.max", "");
  size_t used = read_number("/sys/fs/cgroup/memory.current", "");
  if (limit > used) available = std::min(available ? available : limit, limit - used);
  return available;
}

}  // namespace qwen_moe::cpu
