// Linked when the package is built without CUDA.
#include "engine/backend.h"

namespace qwen_moe {

bool cuda_available() { return false; }

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&) {
  throw Device("this build has no CUDA backend; use device=\"cpu\"");
}

std::shared_ptr<WeightHome> make_cuda_weight_home(int, std::shared_ptr<WeightHome>) {
  throw Device("this build has no CUDA backend; use device=\"cpu\"");
}

std::shared_ptr<WeightHome> make_cuda_packer(int, std::shared_ptr<WeightHome>) {
  throw Device("this build has no CUDA backend; quantize on the CPU");
}

std::map<std::string, std::string> cuda_device_info(int) {
  throw Device("this build has no CUDA backend");
}

LoadingTimes cuda_loading_times() { return {}; }

size_t cuda_pinned_bytes() { return 0; }

double cuda_read_bandwidth(int) { throw Device("this build has no CUDA backend"); }

}  // namespace qwen_moe
