#include "cuda/step.h"

#include "cuda/device.cuh"

namespace qwen_moe::cuda {
namespace {

__global__ void guard(StepState* state, const StepInput* input, const uint32_t* generation,
                      const int32_t* last_token, int32_t* stale, int rows) {
  wait_for_predecessor();
  launch_dependents();
  int row = static_cast<int>(threadIdx.x);
  if (row >= rows) return;
  int slot = input->slot[row];
  bool changed = slot != 0 && generation[slot] != input->generation[row];
  if (slot != 0) stale[slot] = changed;
  int token = input->token[row];
  if (token == kLastDrawn) token = last_token[slot];
  if (changed || slot == 0) slot = token = 0;
  state->slot[row] = slot;
  state->position[row] = slot == 0 ? 0 : input->position[row];
  state->token[row] = token;
}

__global__ void set(uint32_t* at, uint32_t value) { *at = value; }

}  // namespace

void guard_step(const Launcher& launch, StepState* state, const StepInput* input,
                const uint32_t* generation, const int32_t* last_token, int32_t* stale, int rows) {
  launch(guard, dim3(1), kMaxRows, 0, state, input, generation, last_token, stale, rows);
}

void set_generation(cudaStream_t stream, uint32_t* generation, int slot, uint32_t value) {
  set<<<1, 1, 0, stream>>>(generation + slot, value);
  QWEN_MOE_CUDA(cudaGetLastError());
}

}  // namespace qwen_moe::cuda
