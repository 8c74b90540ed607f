// What the GPU microbenchmarks share: a captured chain of kernels, and the median of its times.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

inline constexpr size_t kMostEdges = 1024;  // of a chain

class Graph {
 public:
  Graph(const Stream& stream, auto&& record) {
    QWEN_MOE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    record();
    QWEN_MOE_CUDA(cudaStreamEndCapture(stream, &graph_));
    QWEN_MOE_CUDA(cudaGraphInstantiate(&exec_, graph_, 0));
    QWEN_MOE_CUDA(cudaGraphUpload(exec_, stream));
  }
  ~Graph() {
    if (exec_) cudaGraphExecDestroy(exec_);
    if (graph_) cudaGraphDestroy(graph_);
  }
  Graph(Graph&& other) noexcept
      : graph_(std::exchange(other.graph_, nullptr)), exec_(std::exchange(other.exec_, nullptr)) {}
  void launch(const Stream& stream) const { QWEN_MOE_CUDA(cudaGraphLaunch(exec_, stream)); }
  // A chain that silently lost its programmatic edges would measure something else.
  size_t programmatic_edges() const {
    size_t count = kMostEdges;
    std::vector<cudaGraphNode_t> from(count), to(count);
    std::vector<cudaGraphEdgeData> data(count);
    QWEN_MOE_CUDA(cudaGraphGetEdges(graph_, from.data(), to.data(), data.data(), &count));
    data.resize(count);
    return static_cast<size_t>(std::count_if(data.begin(), data.end(), [](const auto& edge) {
      return edge.type == cudaGraphDependencyTypeProgrammatic;
    }));
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

inline float median(std::vector<float> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

}  // namespace qwen_moe::cuda
