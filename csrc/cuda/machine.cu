// Facts and ceilings of a GPU, for reports.
#include <algorithm>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/runtime.h"
#include "engine/backend.h"

namespace qwen_moe {
namespace {

// Every thread keeps eight loads in flight.
__global__ __launch_bounds__(512) void read_all(const uint4* data, size_t count, uint32_t* out) {
  uint32_t seen = 0;
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t at = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  for (; at + 7 * stride < count; at += 8 * stride) {
    uint4 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __ldcs(data + at + static_cast<size_t>(i) * stride);
#pragma unroll
    for (int i = 0; i < 8; ++i) seen |= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  }
  if (seen == 0x12345678) *out = seen;
}

__global__ void fill_words(uint32_t* data, size_t count) {
  for (size_t at = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; at < count;
       at += static_cast<size_t>(gridDim.x) * blockDim.x)
    data[at] = static_cast<uint32_t>(at) * 2654435761u >> 3;
}

}  // namespace

std::map<std::string, std::string> cuda_device_info(int device) {
  cuda::DeviceProperties facts = cuda::device_properties(device);
  cudaDeviceProp p;
  QWEN_MOE_CUDA(cudaGetDeviceProperties(&p, device));
  int driver = 0, runtime = 0;
  QWEN_MOE_CUDA(cudaDriverGetVersion(&driver));
  QWEN_MOE_CUDA(cudaRuntimeGetVersion(&runtime));
  auto version = [](int v) { return concat(v / 1000, ".", v % 1000 / 10); };
  return {{"name", p.name},
          {"compute_capability", concat(p.major, ".", p.minor)},
          {"multiprocessors", std::to_string(facts.sms)},
          {"memory_mib", std::to_string(p.totalGlobalMem >> 20)},
          {"l2_mib", std::to_string(p.l2CacheSize >> 20)},
          {"driver_cuda", version(driver)},
          {"runtime_cuda", version(runtime)}};
}

double cuda_read_bandwidth(int device) {
  cuda::DeviceGuard guard(device);
  cuda::DeviceProperties p = cuda::device_properties(device);
  size_t bytes = size_t{1} << 30;
  cuda::DeviceBuffer<uint4> data(bytes / sizeof(uint4));
  cuda::DeviceBuffer<uint32_t> out(1);
  cuda::Stream stream;
  cuda::Event begin(cudaEventDefault), end(cudaEventDefault);
  fill_words<<<p.sms * 8, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(data.data()), bytes / 4);
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    begin.record(stream);
    read_all<<<p.sms * 4, 512, 0, stream>>>(data.data(), data.size(), out.data());
    QWEN_MOE_CUDA(cudaGetLastError());
    end.record(stream);
    end.synchronize();
    float ms = 0;
    QWEN_MOE_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + 5, times.end());
  return static_cast<double>(bytes) / (static_cast<double>(times[5]) * 1e-3);
}

}  // namespace qwen_moe
