#include <algorithm>

#include "cuda/dense.h"
#include "cuda/ops.h"

namespace qwen_moe::cuda {

// Which blocks take which tiles, balanced by bytes: the largest first, each to the least loaded.
// A gate tile and its up tile stay together, and before single tiles, so that they share a flush.
const CudaOps::Schedule& CudaOps::schedule(std::span<const WeightView* const> views, bool pairs,
                                           int blocks) {
  std::vector<WeightSpec> key;
  for (const WeightView* view : views) key.push_back(view->spec);
  for (const Schedule& known : schedules_)
    if (known.specs == key && known.most_blocks == blocks) return known;

  struct Load {
    std::vector<int32_t> pairs, singles;
    size_t bytes = 0;
  };
  struct Work {
    int32_t item;
    size_t bytes;
    bool pair;
  };
  std::vector<Work> work;
  for (size_t s = 0; s < key.size(); ++s) {
    if (pairs && s == 3) break;
    bool pair = pairs && s == 2;
    for (int tile = 0; tile < key[s].tiles(); ++tile)
      work.push_back({static_cast<int32_t>(s << 14) | tile,
                      key[s].tile_bytes() + (pair ? key[s + 1].tile_bytes() : 0), pair});
  }
  std::stable_sort(work.begin(), work.end(),
                   [](const Work& a, const Work& b) { return a.bytes > b.bytes; });
  std::vector<Load> loads(
      static_cast<size_t>(std::min<int>(blocks, static_cast<int>(work.size()))));
  for (const Work& w : work) {
    Load& least = *std::min_element(loads.begin(), loads.end(),
                                    [](const Load& a, const Load& b) { return a.bytes < b.bytes; });
    least.bytes += w.bytes;
    if (w.pair) {
      least.pairs.push_back(w.item);
      least.pairs.push_back(w.item + (1 << 14));
    } else {
      least.singles.push_back(w.item);
    }
  }
  size_t most = 0;
  for (const Load& l : loads) most = std::max(most, l.pairs.size() + l.singles.size());
  size_t stride = most + 1;
  for (const WeightSpec& spec : key)
    require(spec.tiles() <= 1 << 14, "a projection of ", spec.n, " outputs, at most ", kTile << 14,
            " are supported");
  require(most <= kMaxItems, "a multiprocessor would take ", most,
          " tiles of a projection, at most ", kMaxItems, " are supported");
  std::vector<int32_t> items(loads.size() * stride, -1);
  for (size_t b = 0; b < loads.size(); ++b) {
    auto at = items.begin() + static_cast<std::ptrdiff_t>(b * stride);
    auto way = [&](int32_t item) { return way_of(key[static_cast<size_t>(item >> 14)], kWarps); };
    int32_t first = loads[b].pairs.empty() ? loads[b].singles[0] : loads[b].pairs[0];
    bool alike = true;
    for (const auto* list : {&loads[b].pairs, &loads[b].singles})
      for (int32_t item : *list) alike = alike && way(item) == way(first);
    *at++ = static_cast<int32_t>(loads[b].pairs.size() + loads[b].singles.size()) |
            static_cast<int32_t>(alike ? way(first) : Way::any) << 16;
    at = std::copy(loads[b].pairs.begin(), loads[b].pairs.end(), at);
    std::copy(loads[b].singles.begin(), loads[b].singles.end(), at);
  }
  Schedule made{key, blocks, DeviceBuffer<int32_t>(items.size()), static_cast<int>(loads.size()),
                static_cast<int>(stride)};
  QWEN_MOE_CUDA(cudaMemcpy(made.items.data(), items.data(), items.size() * 4, cudaMemcpyDefault));
  schedules_.push_back(std::move(made));
  return schedules_.back();
}

}  // namespace qwen_moe::cuda
