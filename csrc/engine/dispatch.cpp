#include "engine/dispatch.h"

#include <algorithm>

namespace qwen_moe {

int prefill_tokens(int position, int pending, int chunk) {
  return std::min(pending, chunk - position % chunk);
}

StepPlan plan_step(std::span<const Work> work, bool last_was_prefill, unsigned turn,
                   const PrefillChunk& chunk) {
  size_t prefills = 0;
  for (const Work& w : work) prefills += w.prefill;
  size_t decodes = work.size() - prefills;

  StepPlan plan;
  if (work.empty()) return plan;
  bool prefill = prefills > 0 && (decodes == 0 || !last_was_prefill);
  size_t candidates = prefill ? prefills : decodes;
  size_t take = prefill ? 1 : std::min(decodes, static_cast<size_t>(kMaxRows));
  size_t skip = candidates > take ? turn % candidates : 0;

  // Two rounds over the list, so that a rotated choice wraps around.
  plan.kind = prefill ? StepPlan::Kind::prefill : StepPlan::Kind::decode;
  size_t seen = 0;
  for (int round = 0; round < 2; ++round)
    for (const Work& w : work) {
      if (w.prefill != prefill) continue;
      if (seen++ < skip) continue;
      if (static_cast<size_t>(plan.rows) == take) return plan;
      plan.keys[static_cast<size_t>(plan.rows++)] = w.key;
      if (prefill)
        plan.tokens =
            prefill_tokens(w.position, w.pending, decodes > 0 ? chunk.shared : chunk.alone);
    }
  return plan;
}

}  // namespace qwen_moe
