// Linked when the package is built without CUDA.
#include "engine/backend.h"

namespace qwen_moe {

bool cuda_available() { return false; }

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&) {
  throw Device("this build has no CUDA backend; use device=\"cpu\"");
}

std::shared_ptr<WeightHome> make_cuda_weight_home(int) {
  throw Device("this build has no CUDA backend; use device=\"cpu\"");
}

}  // namespace qwen_moe
