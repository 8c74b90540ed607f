#include "cuda/ops.h"

namespace qwen_moe::cuda {

CudaOps::CudaOps(const ModelConfig& config, const DeviceProperties& device, int max_rows,
                 int max_context)
    : c_(config), device_(device), max_rows_(max_rows), max_context_(max_context) {
  reserve_dense();
  reserve_gate_up();
  reserve_down();
  reserve_gated_delta();
  reserve_attention();
}

}  // namespace qwen_moe::cuda
