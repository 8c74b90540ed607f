// A captured sequence of kernels: warmed up, captured once, replayed. What it reads lies at
// addresses that outlive it; only the contents of device arrays change between replays.
#pragma once

#include <functional>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

class Graph {
 public:
  Graph() = default;
  // Runs `enqueue` once so that every kernel is loaded and every table made, then captures it.
  Graph(cudaStream_t stream, const std::function<void()>& enqueue) {
    enqueue();
    QWEN_MOE_CUDA(cudaStreamSynchronize(stream));
    QWEN_MOE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      enqueue();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      throw;
    }
    QWEN_MOE_CUDA(cudaStreamEndCapture(stream, &graph));
    cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
    QWEN_MOE_CUDA(cudaGraphUpload(exec_, stream));
  }
  ~Graph() {
    if (exec_) cudaGraphExecDestroy(exec_);
  }
  Graph(Graph&& other) noexcept : exec_(std::exchange(other.exec_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(exec_, other.exec_);
    return *this;
  }
  void replay(cudaStream_t stream) const { QWEN_MOE_CUDA(cudaGraphLaunch(exec_, stream)); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace qwen_moe::cuda
