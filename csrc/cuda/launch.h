// Launching a kernel into the stream of a step.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

// How a kernel of a decode step is launched: beside its predecessor or behind it, and all with the
// same split of L1. A kernel with another split waits until a multiprocessor is empty, and makes
// the next one wait.
struct LaunchAttributes {
  cudaLaunchAttribute list[2]{};
  unsigned count = 0;

  explicit LaunchAttributes(bool programmatic) {
#if CUDART_VERSION >= 12080
    list[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    list[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
#endif
    if (!programmatic) return;
    list[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    list[count++].val.programmaticStreamSerializationAllowed = 1;
  }
};

// Where and how the kernels of a step are launched. With `programmatic` a kernel may start before
// its predecessor in the stream ends; it then waits for it itself (device.cuh).
struct Launcher {
  cudaStream_t stream = nullptr;
  bool programmatic = false;
  mutable int ordinary = 1;  // launches to come that wait for all before them in any case

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                  Args&&... args) const {
    LaunchAttributes attributes(programmatic && ordinary <= 0);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes.list;
    config.numAttrs = attributes.count;
    --ordinary;
    QWEN_MOE_CUDA(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
  }
};

// Lets a kernel ask for that much dynamic shared memory; more than 48 KiB needs it, once.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  QWEN_MOE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)));
  // What a launch asks for counts more, but older toolkits have no such attribute: see above.
  QWEN_MOE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
}

}  // namespace qwen_moe::cuda
