#include "cuda/runtime.h"

#include <atomic>

namespace qwen_moe::cuda {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; a later launch must not find it again
  std::string text =
      concat(call, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
  if (status == cudaErrorMemoryAllocation) throw Capacity(text);
  throw Device(text);
}

void* DeviceMemory::allocate(size_t bytes) {
  void* data = nullptr;
  cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw Capacity(concat("no room for ", bytes >> 20, " MiB on the device: ", free >> 20, " of ",
                          total >> 20, " MiB are free"));
  }
  check(status, "cudaMalloc");
  return data;
}

namespace {
std::atomic<size_t> pinned{0};
}

void* PinnedMemory::allocate(size_t bytes) {
  void* data = nullptr;
  QWEN_MOE_CUDA(cudaMallocHost(&data, bytes));
  pinned += bytes;
  return data;
}

void PinnedMemory::release(void* data, size_t bytes) {
  cudaFreeHost(data);
  pinned -= bytes;
}

size_t PinnedMemory::taken() { return pinned; }

DeviceProperties device_properties(int device) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    throw Device(concat("the driver supports CUDA ", driver / 1000, ".", driver % 1000 / 10,
                        ", this build needs ", runtime / 1000, ".", runtime % 1000 / 10,
                        "; update the driver"));
  }
  QWEN_MOE_CUDA(status);
  require<Device>(device >= 0 && device < count, "there is no cuda:", device, "; the machine has ",
                  count, " CUDA devices");
  auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    QWEN_MOE_CUDA(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  DeviceProperties p{.device = device,
                     .sms = attribute(cudaDevAttrMultiProcessorCount),
                     .major = attribute(cudaDevAttrComputeCapabilityMajor),
                     .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  require<Device>(p.major >= 8, "cuda:", device, " has compute capability ", p.major, ".",
                  attribute(cudaDevAttrComputeCapabilityMinor),
                  "; the kernels need 8.0 or later (A100, H100 and newer)");
  return p;
}

}  // namespace qwen_moe::cuda
