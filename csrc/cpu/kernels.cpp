#include "cpu/kernels.h"

#include <cstdlib>

#include "base/error.h"

namespace qwen_moe::cpu {

const Kernels& kernels_portable();

#if defined(__x86_64__)

const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

namespace {

const Kernels* best_x86(std::string_view name) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (avx512 && (name.empty() || name == "avx512")) return &kernels_avx512();
  if (avx2 && (name.empty() || name == "avx2")) return &kernels_avx2();
  return nullptr;
}

}  // namespace
#else
namespace {

const Kernels* best_x86(std::string_view) { return nullptr; }

}  // namespace
#endif

const Kernels* kernels_named(std::string_view name) {
  if (name == "portable") return &kernels_portable();
  return name.empty() ? nullptr : best_x86(name);
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* name = std::getenv("QWEN_MOE_ISA");
    if (name && *name) {
      const Kernels* named = kernels_named(name);
      require(named != nullptr, "QWEN_MOE_ISA is '", name,
              "', which this processor lacks or which is none of portable, avx2, avx512");
      return *named;
    }
    const Kernels* best = best_x86("");
    return best ? *best : kernels_portable();
  }();
  return chosen;
}

}  // namespace qwen_moe::cpu
