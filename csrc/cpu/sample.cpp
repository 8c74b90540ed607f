// Drawing the next token on the host. Settings apply in the order penalties, temperature, top_k,
// top_p, min_p; ties go to the lowest token id; the random number depends on seed and position
// alone.
#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/ops.h"

namespace qwen_moe::cpu {
namespace {

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a uniform
// double in [0, 1) for every (seed, position).
double uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::copy_n(next, 4, c);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  uint64_t bits = (uint64_t{c[0]} << 32 | c[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

}  // namespace

void CpuOps::sample(std::span<const SampleRow> rows, const SlotArray& logits,
                    std::span<SampleResult> results) {
  pool_.run(static_cast<int>(rows.size()), [&](int i, int worker) {
    auto at = static_cast<size_t>(i);
    sample_row(rows[at], logits.at(rows[at].slot), results[at], worker);
  });
}

void CpuOps::sample_row(const SampleRow& row, const float* logits, SampleResult& result,
                        int worker) {
  const Sampling& s = *row.sampling;
  int vocab = c_.vocab_size;
  auto scratch = static_cast<size_t>(worker) * static_cast<size_t>(vocab);
  result = {};

  // All exponent bits are set in what is not finite, and in nothing else.
  uint32_t broken = 0;
  for (int i = 0; i < vocab; ++i)
    broken |= (std::bit_cast<uint32_t>(logits[i]) << 1) >= 0xff000000u;
  result.finite = broken == 0;
  if (!result.finite) return;
  auto likeliest = [&](const float* values) {  // the first of equals
    return static_cast<int>(std::find(values, values + vocab, k_.max(values, vocab)) - values);
  };
  int best = likeliest(logits);

  const float* x = logits;
  float* adjusted = adjusted_.data() + scratch;
  if (s.penalized()) {
    std::copy_n(logits, vocab, adjusted);
    int32_t* counts = counts_.data() + scratch;
    if (s.repetition_penalty != 1) {
      auto factor = static_cast<float>(s.repetition_penalty);
      for (int32_t t : row.timeline)
        if (counts[t]++ == 0)
          adjusted[t] = adjusted[t] > 0 ? adjusted[t] / factor : adjusted[t] * factor;
      for (int32_t t : row.timeline) counts[t] = 0;
    }
    for (int32_t t : row.reply) ++counts[t];
    for (int32_t t : row.reply) {
      if (counts[t] == 0) continue;
      adjusted[t] -= static_cast<float>(s.frequency_penalty * counts[t] + s.presence_penalty);
      counts[t] = 0;
    }
    x = adjusted;
    best = likeliest(x);
  }

  result.token = best;
  if (s.temperature > 0) {
    Candidate* c = candidates_.data() + scratch;
    for (int i = 0; i < vocab; ++i) c[i] = {x[i], i};
    auto likelier = [](const Candidate& a, const Candidate& b) {
      return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    };
    int count = vocab;
    if (s.top_k > 0 && s.top_k < vocab) {
      count = s.top_k;
      std::nth_element(c, c + count, c + vocab, likelier);
    }
    double inverse = 1.0 / s.temperature, top = x[best];
    auto weight = [&](const Candidate& a) {
      return std::exp((static_cast<double>(a.logit) - top) * inverse);
    };
    if (s.min_p > 0)  // a share of the likeliest token's probability, whose weight is 1
      count = static_cast<int>(
          std::partition(c, c + count, [&](const Candidate& a) { return weight(a) >= s.min_p; }) -
          c);
    double total = 0;
    if (s.top_p < 1) {
      // The sum runs in id order, so that it does not depend on how a partition left the
      // candidates.
      std::sort(c, c + count,
                [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
      for (int i = 0; i < count; ++i) total += weight(c[i]);
      double goal = s.top_p * total, sum = 0;
      std::make_heap(c, c + count,
                     [&](const Candidate& a, const Candidate& b) { return likelier(b, a); });
      int left = count;
      while (left > 0 && sum < goal) {
        std::pop_heap(c, c + left,
                      [&](const Candidate& a, const Candidate& b) { return likelier(b, a); });
        sum += weight(c[--left]);
      }
      c += left;
      count -= left;
    }
    std::sort(c, c + count, likelier);
    total = 0;
    for (int i = 0; i < count; ++i) total += weight(c[i]);
    double mark = uniform(s.seed, static_cast<uint64_t>(row.position)) * total;
    int drawn = 0;
    for (double sum = weight(c[0]); drawn + 1 < count && sum <= mark; sum += weight(c[drawn]))
      ++drawn;
    result.token = c[drawn].token;
  }

  if (s.logprobs < 0) return;
  // log softmax of the raw logits.
  double top = logits[0], total = 0;
  for (int i = 1; i < vocab; ++i) top = std::max(top, static_cast<double>(logits[i]));
  for (int i = 0; i < vocab; ++i) total += std::exp(logits[i] - top);
  double log_total = top + std::log(total);
  result.logprob = static_cast<float>(logits[result.token] - log_total);
  for (int i = 0; s.logprobs > 0 && i < vocab; ++i) {
    auto logprob = static_cast<float>(logits[i] - log_total);
    if (result.top_count == s.logprobs && logprob <= result.top[s.logprobs - 1].second) continue;
    int at = result.top_count < s.logprobs ? result.top_count++ : s.logprobs - 1;
    for (; at > 0 && logprob > result.top[at - 1].second; --at) result.top[at] = result.top[at - 1];
    result.top[at] = {i, logprob};
  }
}

}  // namespace qwen_moe::cpu
