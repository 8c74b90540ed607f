// What the GPU microbenchmarks share: a captured chain of kernels, and the median of its times.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>
#include <vector>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

inline constexpr size_t kMostEdges = 1024;  // of a chain

// A captured chain of kernels that keeps its graph, to count its edges; cuda/graph.h is the
// engine's.
class CapturedChain {
 public:
  CapturedChain(const Stream& stream, auto&& record) {
    QWEN_MOE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    record();
    QWEN_MOE_CUDA(cudaStreamEndCapture(stream, &graph_));
    QWEN_MOE_CUDA(cudaGraphInstantiate(&exec_, graph_, 0));
    QWEN_MOE_CUDA(cudaGraphUpload(exec_, stream));
  }
  ~CapturedChain() {
    if (exec_) cudaGraphExecDestroy(exec_);
    if (graph_) cudaGraphDestroy(graph_);
  }
  CapturedChain(CapturedChain&& other) noexcept
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

// Milliseconds that the GPU spends on what is enqueued.
class Stopwatch {
 public:
  float operator()(const Stream& stream, auto&& enqueue) const {
    start_.record(stream);
    enqueue();
    stop_.record(stream);
    stop_.synchronize();
    float ms = 0;
    QWEN_MOE_CUDA(cudaEventElapsedTime(&ms, start_, stop_));
    return ms;
  }

 private:
  Event start_{cudaEventDefault}, stop_{cudaEventDefault};
};

// The program around `run(argc, argv)`: an error goes to stderr, and its status is 1.
inline int run_program(int argc, char** argv, int (*run)(int, char**)) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace qwen_moe::cuda
