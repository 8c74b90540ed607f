// The inputs of a step at fixed device addresses, and the guard in front of it.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "engine/backend.h"

namespace qwen_moe::cuda {

// What the host writes for a step, in one copy; the rows' pages [rows][stride] follow it.
struct StepInput {
  int32_t slot[kMaxRows];  // 0: padding
  uint32_t generation[kMaxRows];
  int32_t position[kMaxRows];
  int32_t token[kMaxRows];  // or kLastDrawn
};

// What the kernels read.
struct StepState {
  int32_t slot[kMaxRows];
  int32_t position[kMaxRows];
  int32_t token[kMaxRows];
};

// Fills `state` from `input`. A row whose generation is not its slot's becomes padding, which reads
// and writes no session, and stale[slot] says so. The last three have an element for every slot.
void guard_step(const Launcher& launch, StepState* state, const StepInput* input,
                const uint32_t* generation, const int32_t* last_token, int32_t* stale, int rows);

void set_generation(cudaStream_t stream, uint32_t* generation, int slot, uint32_t value);

}  // namespace qwen_moe::cuda
