// Three kernels a draw. `summarize` finds the likeliest token of every chunk of a row, which is all
// that greedy rows need. `list_candidates` writes the few tokens that may be drawn, or are among
// the likeliest that a row asked for, into a list. `choose` has one block a row: it walks down a
// histogram of the candidates, likeliest first, to where a count or a sum of weights is reached.
#include "cuda/sample.h"

#include "cuda/candidates.cuh"

namespace qwen_moe::cuda {
namespace {

__device__ __forceinline__ bool drawn(const DrawRow& row) {
  return __ldcg(&row.slot) != 0 && __ldcg(&row.draw) != 0;
}

// What a warp finds in its chunk. A lane sees its tokens in rising order, so that the first of
// equals stays.
struct ChunkSearch {
  float top = -INFINITY, zero = 0;
  int at = -1;  // the token of `top`

  __device__ __forceinline__ void add(float logit, int token) {
    if (at < 0 || logit > top) {
      top = logit;
      at = token;
    }
    zero = fmaf(logit, 0.0f, zero);  // no longer 0 after what is not finite
  }
  // Calls visit(logit, token) for the lane's tokens of the chunk's `size`.
  template <class Visit>
  __device__ static __forceinline__ void each(const float* x, int begin, int size,
                                              const Visit& visit) {
    constexpr int kAhead = 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int first = lane; first < size; first += 32 * kAhead) {
      float logit[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + 32 * j < size) logit[j] = __ldcg(x + begin + first + 32 * j);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + 32 * j < size) visit(logit[j], begin + first + 32 * j);
    }
  }
  __device__ __forceinline__ Sum best() const {
    return warp_largest(at < 0 ? Sum{0} : Sum{order_key(top)} << 32 | ~static_cast<uint32_t>(at));
  }
};

// A warp for every chunk.
__global__ void __launch_bounds__(kSummarizeThreads, 4)
    summarize(const DrawRow* rows, const PenaltyEntry* penalties, const float* logits,
              int64_t stride, int vocab, int chunks, float* adjusted, ChunkSummary* summaries,
              RowState* states) {
  wait_for_predecessor();
  launch_dependents();
  const int thread = static_cast<int>(threadIdx.x), r = static_cast<int>(blockIdx.y);
  const DrawRow& row = rows[r];
  const int slot = __ldcg(&row.slot), draw = __ldcg(&row.draw);
  const int penalty_count = __ldcg(&row.penalty_count);
  if (slot == 0 || draw == 0) return;
  if (blockIdx.x == 0 && thread == 0) states[r] = RowState{};

  const int first_chunk = static_cast<int>(blockIdx.x) * kSummarizeChunks;
  const int chunk = first_chunk + thread / 32, begin = chunk * kChunk;
  const int size = min(kChunk, vocab - begin);
  const float* x = logits + slot * stride;
  float* out = adjusted + static_cast<int64_t>(r) * vocab;
  ChunkSearch raw, after;
  ChunkSearch::each(x, begin, size, [&](float logit, int token) {
    raw.add(logit, token);
    if (penalty_count > 0) out[token] = logit;
  });

  if (penalty_count > 0) {
    const PenaltyEntry* entries = penalties + __ldcg(&row.penalty_begin);
    const float factor = __ldcg(&row.repetition_penalty);
    const double presence = __ldcg(&row.presence_penalty);
    const double frequency = __ldcg(&row.frequency_penalty);
    const int first = first_chunk * kChunk, end = min(first + kSummarizeChunks * kChunk, vocab);
    __syncthreads();
    // The entries name each token once, so that no two threads meet. Nothing is fused, as on the
    // host.
    for (int e = thread; e < penalty_count; e += kSummarizeThreads) {
      const int token = __ldcg(&entries[e].token), in_reply = __ldcg(&entries[e].in_reply);
      if (token < first || token >= end) continue;
      float logit = out[token];
      if (__ldcg(&entries[e].in_timeline) > 0)
        logit = logit > 0 ? __fdiv_rn(logit, factor) : __fmul_rn(logit, factor);
      if (in_reply > 0) {
        double penalty = __dadd_rn(__dmul_rn(frequency, static_cast<double>(in_reply)), presence);
        logit = __fsub_rn(logit, __double2float_rn(penalty));
      }
      out[token] = logit;
    }
    __syncthreads();
    ChunkSearch::each(out, begin, size, [&](float logit, int token) { after.add(logit, token); });
  }

  const Sum best = penalty_count > 0 ? after.best() : raw.best();
  const float raw_max = warp_max(raw.top);
  const bool finite = __all_sync(kAll, raw.zero == 0);
  if (chunk < chunks && thread % 32 == 0)
    summaries[static_cast<int64_t>(r) * chunks + chunk] = {best, raw_max, finite};
}

// Writes the k-th largest key to `out`. Complete after the next barrier.
__device__ void find_largest(const uint32_t* keys, int count, int k, uint32_t* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kListThreads) {
    uint32_t key = keys[i];
    int larger = 0;
    for (int j = 0; j < count; ++j) larger += keys[j] > key || (keys[j] == key && j < i);
    if (larger == k - 1) *out = key;
  }
}

// Appends the tokens first + j * kListThreads for the bits j of `marks` of every thread, unless the
// list is full; counts them in any case. For all threads of a block.
__device__ void append(uint32_t marks, int first, const float* logits, uint32_t* listed,
                       Listed* list) {
  constexpr int kWarps = kListThreads / 32;
  __shared__ uint32_t before[kWarps], base, total;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const uint32_t count = static_cast<uint32_t>(__popc(marks)), through = warp_scan(count);
  if (thread % 32 == 31) before[warp] = through;
  __syncthreads();
  if (thread == 0) {
    uint32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      uint32_t in_warp = before[w];
      before[w] = sum;
      sum += in_warp;
    }
    total = sum;
    base = sum ? atomicAdd(listed, sum) : 0;
  }
  __syncthreads();
  uint32_t at = base + before[warp] + through - count;
  if (base + total <= kListed)
    for (; marks; marks &= marks - 1) {
      int token = first + (__ffs(static_cast<int>(marks)) - 1) * kListThreads;
      list[at++] = {__ldcg(logits + token), token};
    }
  __syncthreads();
}

__global__ void __launch_bounds__(kListThreads)
    list_candidates(const DrawRow* rows, const float* logits, int64_t stride, int vocab,
                    const float* adjusted, const ChunkSummary* summaries, int chunks,
                    RowState* states, Listed* list, Listed* raw_list) {
  wait_for_predecessor();
  launch_dependents();
  __shared__ uint32_t keys[kMaxChunks], raw_keys[kMaxChunks], bound, raw_bound;
  const int thread = static_cast<int>(threadIdx.x), r = static_cast<int>(blockIdx.y);
  const DrawRow& row = rows[r];
  if (!drawn(row)) return;
  const double temperature = __ldcg(&row.temperature);
  const bool random = temperature > 0;
  const int logprobs = __ldcg(&row.logprobs);
  if (!random && logprobs < 0) return;
  summaries += static_cast<int64_t>(r) * chunks;
  const RowSummary summary = merge(summaries, chunks);
  if (!summary.finite) return;

  // At least k chunks have a token as large as the k-th largest of the chunks' largest, so the k
  // likeliest tokens are not smaller.
  const int top_k = __ldcg(&row.top_k);
  for (int i = thread; i < chunks; i += kListThreads) {
    keys[i] = static_cast<uint32_t>(__ldcg(&summaries[i].best) >> 32);
    raw_keys[i] = order_key(__ldcg(&summaries[i].raw_max));
  }
  if (thread == 0) bound = raw_bound = 0;
  __syncthreads();
  if (random && top_k > 0 && top_k <= chunks) find_largest(keys, chunks, top_k, &bound);
  if (logprobs > 0 && logprobs <= chunks) find_largest(raw_keys, chunks, logprobs, &raw_bound);
  __syncthreads();

  const Weighing weigh(summary.top_key, random ? temperature : 1.0, __ldcg(&row.min_p));
  const Weighing weigh_raw(summary.raw_top_key, 1.0, 0.0);
  const float* raw = logits + __ldcg(&row.slot) * stride;
  const float* x =
      __ldcg(&row.penalty_count) > 0 ? adjusted + static_cast<int64_t>(r) * vocab : raw;
  const int first = static_cast<int>(blockIdx.x) * kSpan + thread;
  uint32_t marks = 0, raw_marks = 0, span = 0, raw_span = 0;
  Sum total = 0;
#pragma unroll 8
  for (int j = 0; j < 32; ++j) {
    int i = first + j * kListThreads;
    if (i >= vocab) continue;
    if (random) {
      float logit = __ldcg(x + i);
      uint32_t key = order_key(logit);
      if (key >= bound && weigh(logit) > 0) {
        marks |= 1u << j;
        span = max(span, summary.top_key - key);
      }
    }
    if (logprobs >= 0) {
      float logit = __ldcg(raw + i);
      uint32_t key = order_key(logit);
      total += weigh_raw(logit);
      if (logprobs > 0 && key >= raw_bound) {
        raw_marks |= 1u << j;
        raw_span = max(raw_span, summary.raw_top_key - key);
      }
    }
  }
  // Integer sums and maxima: the order in which blocks come makes no difference, and that of the
  // lists makes none to `choose`.
  if (random) {
    span = __reduce_max_sync(kAll, span);
    if (thread % 32 == 0) atomicMax(&states[r].span, span);
    append(marks, first, x, &states[r].listed, list + static_cast<int64_t>(r) * kListed);
  }
  if (logprobs >= 0) {
    total = warp_add(total);
    raw_span = __reduce_max_sync(kAll, raw_span);
    if (thread % 32 == 0) {
      atomicAdd(&states[r].total, total);
      atomicMax(&states[r].raw_span, raw_span);
    }
    append(raw_marks, first, raw, &states[r].raw_listed,
           raw_list + static_cast<int64_t>(r) * kListed);
  }
}

// Philox 4x32-10, as on the host: a uniform double in [0, 1) for every (seed, position).
__device__ double uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  uint64_t bits = (uint64_t{c[0]} << 32 | c[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

__device__ int32_t draw(Shared& s, const DrawRow& row, const Candidates& in, int32_t likeliest,
                        Listed* list, int token_bits) {
  const Bin first = histogram(s, in, by_bin);
  Sum total = first.all_weight;
  if (total == 0) return likeliest;  // the largest logit is no number after penalties
  const int top_k = __ldcg(&row.top_k);
  if (top_k > 0 && static_cast<uint32_t>(top_k) < first.all)
    total = walk(s, in, first, true, static_cast<Sum>(top_k), list, token_bits).through;
  const double top_p = __ldcg(&row.top_p);
  if (top_p < 1) {
    // A token is kept while the sum before it is below top_p of the total.
    Sum goal = static_cast<Sum>(ceil(top_p * static_cast<double>(total)));
    goal = min(max(goal, Sum{1}), total);
    total = walk(s, in, first, false, goal, list, token_bits).through;
  }
  // The first token with which the sum exceeds the mark.
  double share = uniform(__ldcg(&row.seed), static_cast<uint64_t>(__ldcg(&row.position)));
  Sum mark = static_cast<Sum>(share * static_cast<double>(total));
  return walk(s, in, first, false, min(mark + 1, total), list, token_bits).token;
}

// Log-probabilities at temperature 1 of the `count` likeliest tokens.
__device__ void report(Shared& s, const Candidates& in, int count, double log_total, Listed* list,
                       int token_bits, DrawResult& result) {
  const Bin first = histogram(s, in, by_bin);
  const int32_t last = walk(s, in, first, true, static_cast<Sum>(count), list, token_bits).token;
  // `walk` may have gathered into the list, but then the candidates are those of the whole row.
  auto place = [](const Candidate& c) {
    return Sum{c.distance} << 32 | static_cast<uint32_t>(c.token);
  };
  const Sum last_place =
      Sum{in.weigh.top_key - order_key(__ldcg(in.row + last))} << 32 | static_cast<uint32_t>(last);
  __syncthreads();
  if (threadIdx.x == 0) s.cursor = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < in.count; i += kChooseThreads) {
    Candidate c;
    if (in.get(i, c) && place(c) <= last_place) s.top[atomicAdd(&s.cursor, 1u)] = place(c);
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= count) return;
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += s.top[i] < s.top[thread];
  float logit = from_key(in.weigh.top_key - static_cast<uint32_t>(s.top[thread] >> 32));
  result.top_token[rank] = static_cast<int32_t>(s.top[thread]);
  result.top_logprob[rank] = __double2float_rn(static_cast<double>(logit) - log_total);
}

__global__ void __launch_bounds__(kChooseThreads)
    choose(const DrawRow* rows, const float* logits, int64_t stride, int vocab,
           const float* adjusted, const ChunkSummary* summaries, int chunks, const RowState* states,
           Listed* list, Listed* raw_list, int token_bits, const int32_t* stale,
           int32_t* last_token, DrawResult* results) {
  wait_for_predecessor();
  launch_dependents();
  __shared__ Shared s;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t r = blockIdx.x;
  const DrawRow& row = rows[r];
  if (!drawn(row)) return;
  const int32_t slot = __ldcg(&row.slot);
  const RowSummary summary = merge(summaries + r * chunks, chunks);
  DrawResult& result = results[r];
  int32_t token = -1;
  float logprob = 0;
  int top_count = 0;
  if (summary.finite) {
    const float* raw = logits + slot * stride;
    token = summary.token;
    const double temperature = __ldcg(&row.temperature);
    if (temperature > 0) {
      const Weighing weigh(summary.top_key, temperature, __ldcg(&row.min_p));
      const float* x = __ldcg(&row.penalty_count) > 0 ? adjusted + r * vocab : raw;
      Listed* mine = list + r * kListed;
      const Candidates in(mine, x, vocab, __ldcg(&states[r].listed), __ldcg(&states[r].span), weigh,
                          false);
      token = draw(s, row, in, token, mine, token_bits);
    }
    const int logprobs = __ldcg(&row.logprobs);
    if (logprobs >= 0) {
      const Weighing weigh(summary.raw_top_key, 1.0, 0.0);
      const double total = static_cast<double>(__ldcg(&states[r].total)) / kOne;
      const double log_total = static_cast<double>(weigh.top) + log(total);
      logprob = __double2float_rn(static_cast<double>(__ldcg(raw + token)) - log_total);
      top_count = min(min(logprobs, kMaxLogprobs), vocab);
      if (top_count > 0) {
        Listed* mine = raw_list + r * kListed;
        const Candidates in(mine, raw, vocab, __ldcg(&states[r].raw_listed),
                            __ldcg(&states[r].raw_span), weigh, true);
        report(s, in, top_count, log_total, mine, token_bits, result);
      }
    }
  }
  if (thread >= top_count && thread < kMaxLogprobs) {
    result.top_token[thread] = 0;
    result.top_logprob[thread] = 0;
  }
  if (thread > 0) return;
  result.token = token;
  result.finite = summary.finite;
  result.stale = __ldcg(stale + slot);
  result.logprob = logprob;
  result.top_count = top_count;
  if (summary.finite) last_token[slot] = token;
}

}  // namespace

DrawRow to_draw_row(const SampleRow& row, std::span<PenaltyEntry> entries, int& used,
                    std::span<int32_t> counts) {
  const Sampling& s = *row.sampling;
  DrawRow draw{.slot = row.slot,
               .draw = 1,
               // The likeliest token alone can be drawn, and that is what greedy rows find.
               .temperature = s.top_k == 1 ? 0 : s.temperature,
               .top_p = s.top_p,
               .min_p = s.min_p,
               .presence_penalty = s.presence_penalty,
               .frequency_penalty = s.frequency_penalty,
               .repetition_penalty = static_cast<float>(s.repetition_penalty),
               .top_k = s.top_k,
               .seed = s.seed,
               .position = row.position,
               .logprobs = s.logprobs,
               .penalty_begin = used};
  const auto room = entries.subspan(static_cast<size_t>(used));
  int taken = 0;
  bool fits = true;
  // While the row is read, counts[token] is 1 + the place of the token's entry.
  auto entry = [&](int32_t token) -> PenaltyEntry* {
    int32_t& place = counts[static_cast<size_t>(token)];
    if (place == 0) {
      if (static_cast<size_t>(taken) == room.size()) fits = false;
      if (!fits) return nullptr;
      room[static_cast<size_t>(taken)] = {token, 0, 0};
      place = ++taken;
    }
    return &room[static_cast<size_t>(place - 1)];
  };
  if (s.repetition_penalty != 1)
    for (int32_t token : row.timeline)
      if (PenaltyEntry* e = entry(token)) ++e->in_timeline;
  if (s.presence_penalty != 0 || s.frequency_penalty != 0)
    for (int32_t token : row.reply)
      if (PenaltyEntry* e = entry(token)) ++e->in_reply;
  for (const PenaltyEntry& e : room.first(static_cast<size_t>(taken)))
    counts[static_cast<size_t>(e.token)] = 0;
  require<Capacity>(fits, "the penalties of slot ", row.slot, " name more than ", room.size(),
                    " tokens");
  draw.penalty_count = taken;
  used += taken;
  return draw;
}

Sampler::Sampler(int vocab_size, int max_rows, const DeviceProperties& device)
    : vocab_size_(vocab_size), max_rows_(max_rows), chunks_((vocab_size + kChunk - 1) / kChunk) {
  require(vocab_size > 0 && chunks_ <= kMaxChunks, "vocab_size must be at most ",
          kMaxChunks * kChunk, ", got ", vocab_size);
  DeviceGuard guard(device.device);
  auto rows = static_cast<size_t>(max_rows);
  adjusted_ = DeviceBuffer<float>(rows * static_cast<size_t>(vocab_size));
  summaries_ = DeviceBuffer<ChunkSummary>(rows * static_cast<size_t>(chunks_));
  states_ = DeviceBuffer<RowState>(rows);
  list_ = DeviceBuffer<Listed>(rows * kListed);
  raw_list_ = DeviceBuffer<Listed>(rows * kListed);
}

size_t Sampler::scratch_bytes() const {
  return adjusted_.bytes() + summaries_.bytes() + states_.bytes() + list_.bytes() +
         raw_list_.bytes();
}

void Sampler::launch(const Launcher& launcher, const DrawRow* rows, const PenaltyEntry* penalties,
                     int count, const float* logits, int64_t stride, const int32_t* stale,
                     int32_t* last_token, DrawResult* results) const {
  require(count >= 0 && count <= max_rows_, "a draw has at most ", max_rows_, " rows, got ", count);
  if (count == 0) return;
  auto grid = [&](int width) {
    return dim3(static_cast<unsigned>(width), static_cast<unsigned>(count));
  };
  int token_bits = 0;
  while (1 << token_bits < vocab_size_) ++token_bits;
  launcher(summarize, grid((chunks_ + kSummarizeChunks - 1) / kSummarizeChunks), kSummarizeThreads,
           0, rows, penalties, logits, stride, vocab_size_, chunks_, adjusted_.data(),
           summaries_.data(), states_.data());
  launcher(list_candidates, grid((vocab_size_ + kSpan - 1) / kSpan), kListThreads, 0, rows, logits,
           stride, vocab_size_, adjusted_.data(), summaries_.data(), chunks_, states_.data(),
           list_.data(), raw_list_.data());
  launcher(choose, dim3(static_cast<unsigned>(count)), kChooseThreads, 0, rows, logits, stride,
           vocab_size_, adjusted_.data(), summaries_.data(), chunks_, states_.data(), list_.data(),
           raw_list_.data(), token_bits, stale, last_token, results);
}

}  // namespace qwen_moe::cuda
