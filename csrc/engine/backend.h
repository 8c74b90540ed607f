// THE SEAM. A backend runs a span of layers on one device: it holds that span's state arenas and
// scratch, and is called a few times a step, never once an op. Not thread-safe; the engine
// serializes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "model/model.h"
#include "model/sampling.h"
#include "state/store.h"

namespace qwen_moe {

inline constexpr int kMaxRows = 64;        // rows of a decode step
inline constexpr int kPrefillChunk = 512;  // tokens of a prefill step; a multiple of 64

// Consecutive tokens of one session; [position, position + tokens) does not cross a multiple of
// kPrefillChunk, so what a session computes does not depend on how the engine scheduled it.
struct PrefillStep {
  int slot = 0;
  uint32_t generation = 0;
  int position = 0;
  std::span<const int32_t> tokens;
  std::span<const int32_t> pages;  // of the whole session
  bool logits = false;             // compute lm_head.logits of the last token
};

// One token for each of several sessions.
struct DecodeRow {
  int slot = 0;
  uint32_t generation = 0;
  int position = 0;
  int32_t token = 0;
  std::span<const int32_t> pages;
};

struct ReserveOptions {
  int slots = 0;  // besides the sink
  int pages = 0;  // besides the sink
  int max_context = 0;
};

// The residual stream between two shards: [rows, width], contiguous.
struct Handoff {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int rows = 0;
  int width = 0;
};

class Backend : public StateStore {
 public:
  // Allocates every arena, once. Nothing allocates in the steps that follow.
  virtual void reserve(const ReserveOptions& options) = 0;
  virtual std::map<std::string, size_t> memory() const = 0;  // ledger in bytes, without weights

  // `input` is the residual stream of the shard before, or null on the first.
  virtual void prefill(const PrefillStep& step, const Handoff* input) = 0;
  virtual void decode(std::span<const DecodeRow> rows, const Handoff* input) = 0;
  virtual Handoff hidden() const = 0;  // [rows, hidden] of the last step, for the shard after

  // On the last shard, from lm_head.logits of each row's slot.
  virtual void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) = 0;
  virtual void read_logits(int slot, std::span<float> to) = 0;
};

struct BackendOptions {
  const Model* model = nullptr;
  int shard = 0;
  DType kv_dtype = DType::bf16;
  int threads = 1;
};

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);
std::shared_ptr<WeightHome> make_cpu_weight_home(int threads);
std::string cpu_isa();  // the kernels in use: portable, avx2 or avx512
// Bytes per second of a plain read of `bytes` by `threads` threads, the best within `seconds`.
double cpu_read_bandwidth(int threads, size_t bytes, double seconds);

// Linked from cuda/, or from cuda/absent.cpp, which answers false and throws Device.
bool cuda_available();
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);
std::shared_ptr<WeightHome> make_cuda_weight_home(int device);

}  // namespace qwen_moe
