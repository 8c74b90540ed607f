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
#include <vector>

#include "base/error.h"
#include "engine/kernel_image.h"
#include "model/model.h"
#include "model/sampling.h"
#include "state/store.h"

namespace qwen_moe {

inline constexpr int kMaxRows = 64;        // rows of a decode step
inline constexpr int kPrefillChunk = 512;  // tokens of a prefill step, where nothing else is said

// Tokens of a prefill step, at most: multiples of 64, `alone` one of `shared`. Where they differ,
// the backend's results are the same bits for either.
struct PrefillChunk {
  int alone = kPrefillChunk;   // while no session decodes
  int shared = kPrefillChunk;  // beside sessions that decode, which wait for the step
};

// Consecutive tokens of one session; [position, position + tokens) does not cross a multiple of the
// chunk, so what a session computes does not depend on how the engine scheduled it.
struct PrefillStep {
  int slot = 0;
  uint32_t generation = 0;
  int position = 0;
  std::span<const int32_t> tokens;
  std::span<const int32_t> pages;  // of the whole session
  bool logits = false;             // compute lm_head.logits of the last token
};

// As DecodeRow::token: the token last drawn for this slot, which the host has not seen yet. Behind
// a draw that comes back stale or not finite it is any id of the vocabulary; the row is dropped.
inline constexpr int32_t kLastDrawn = -1;

// One token for each of several sessions.
struct DecodeRow {
  int slot = 0;
  uint32_t generation = 0;
  int position = 0;
  int32_t token = 0;  // or kLastDrawn, where the backend says ahead()
  std::span<const int32_t> pages;
};

// A step names the generation of every slot it writes to; one that is over is refused.
inline void require_generation(int slot, uint32_t is, uint32_t expected) {
  require<Error>(is == expected, "slot ", slot, " is at generation ", is, ", the step expects ",
                 expected, "; nothing was written");
}

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

// What a call's arguments point to need not outlive the call. Steps, draws and the verbs of
// StateStore take effect in the order of the calls, also where they only enqueue.
class Backend : public StateStore {
 public:
  // Allocates every arena, once. Nothing allocates in the steps that follow.
  virtual void reserve(const ReserveOptions& options) = 0;
  virtual std::map<std::string, size_t> memory() const = 0;  // ledger in bytes, without weights
  virtual std::map<std::string, int64_t> counters() const { return {}; }  // for Engine::stats

  virtual PrefillChunk prefill_chunk() const { return {}; }
  // `input` is the residual stream of the shard before, or null on the first.
  virtual void prefill(const PrefillStep& step, const Handoff* input) = 0;
  virtual void decode(std::span<const DecodeRow> rows, const Handoff* input) = 0;
  virtual Handoff hidden() const = 0;  // [rows, hidden] of the last step, for the shard after

  // On the last shard: starts drawing from lm_head.logits of each row's slot. When it throws, there
  // is no such draw.
  virtual void draw(std::span<const SampleRow> rows) = 0;
  // Waits for the oldest draw not collected yet; one result for each of its rows. When it throws,
  // that draw counts as collected.
  virtual void collect(std::span<SampleResult> results) = 0;
  // True when prefill, decode and draw only enqueue: then the engine has up to two draws
  // uncollected and feeds the tokens of the older one as kLastDrawn.
  virtual bool ahead() const { return false; }
  virtual void read_logits(int slot, std::span<float> to) = 0;
};

struct BackendOptions {
  const Model* model = nullptr;
  int shard = 0;
  DType kv_dtype = DType::bf16;
  int threads = 1;
  bool cuda_graph = true;   // false: the same kernels, launched one by one
  int max_rows = kMaxRows;  // of a decode step
  // CUDA: kernels for prompts; without them a prompt goes through the decode step, token by token.
  std::vector<KernelImage> prefill_kernels{};
};

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);
std::shared_ptr<WeightHome> make_cpu_weight_home(int threads);
std::string cpu_isa();  // the kernels in use: portable, avx2 or avx512
// Bytes per second of a plain read of `bytes` by `threads` threads, the best within `seconds`.
double cpu_read_bandwidth(int threads, size_t bytes, double seconds);

// Linked from cuda/, or from cuda/absent.cpp, which answers false and throws Device.
bool cuda_available();
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);
// `host` packs what the device does not; its bytes are reordered there.
std::shared_ptr<WeightHome> make_cuda_weight_home(int device, std::shared_ptr<WeightHome> host);
// `host` itself, but that the device packs matrices for it: the same bytes.
std::shared_ptr<WeightHome> make_cuda_packer(int device, std::shared_ptr<WeightHome> host);
// Facts for reports, by name: "name" of the GPU and whatever else tells two machines apart.
std::map<std::string, std::string> cuda_device_info(int device);
// What loading onto GPUs took since the process began: seconds, summed over threads, of making
// pinned buffers and streams, filling them, and waiting for the device.
struct LoadingTimes {
  double making = 0, filling = 0, waiting = 0;
};
LoadingTimes cuda_loading_times();
size_t cuda_pinned_bytes();              // of host memory, taken now
double cuda_read_bandwidth(int device);  // bytes per second of a plain read of its memory

}  // namespace qwen_moe
