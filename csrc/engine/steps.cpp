#include "engine/steps.h"

#include <algorithm>

namespace qwen_moe {

Steps::Steps(Pipeline& pipeline, MutableStateManager& manager, StepOptions options)
    : pipeline_(pipeline),
      manager_(manager),
      options_(std::move(options)),
      ahead_(pipeline.ahead()) {
  auto sessions = static_cast<size_t>(options_.max_sessions);
  work_.reserve(sessions);
  ready_.reserve(sessions);
  drawing_.reserve(sessions);
  decode_rows_.reserve(kMaxRows);
  sample_rows_.reserve(kMaxRows);
  results_.resize(kMaxRows);
  for (auto& rows : outstanding_) rows.reserve(kMaxRows);
}

bool Steps::step(const Records& records) {
  if (must_settle()) settle();
  work_.clear();
  ready_.clear();
  drawing_.clear();
  for (auto& [id, r] : records) {
    if (!r->running) continue;
    const Session& s = r->session;
    if (r->draws > 0) {
      if (!may_run_ahead(*r)) continue;
      work_.push_back({static_cast<int>(ready_.size()), false, s.computed, 1});
      ready_.push_back(r.get());
    } else if (r->stop.load()) {
      finish(*r, Finish::stopped);
    } else if (s.pending() > 0) {
      work_.push_back({static_cast<int>(ready_.size()), r->prompt, s.computed, s.pending()});
      ready_.push_back(r.get());
    } else {
      drawing_.push_back(r.get());
    }
  }
  if (!drawing_.empty()) {  // a step of its own: the logits are there already
    for (size_t i = 0; i < drawing_.size(); i += kMaxRows) {
      std::span<Record* const> rows(drawing_.data() + i,
                                    std::min<size_t>(kMaxRows, drawing_.size() - i));
      try {
        draw(rows);
      } catch (const std::exception& error) {
        poison(rows, error.what());
      }
      settle(ahead_ ? 1 : 0);
    }
    return true;
  }

  StepPlan plan = plan_step(work_, last_was_prefill_, turn_++, pipeline_.prefill_chunk());
  if (plan.kind == StepPlan::Kind::none) {
    bool collected = draws_ > 0;
    settle();
    return collected;
  }
  last_was_prefill_ = plan.kind == StepPlan::Kind::prefill;
  for (int i = 0; i < plan.rows; ++i)
    drawing_.push_back(ready_[static_cast<size_t>(plan.keys[static_cast<size_t>(i)])]);
  int older = draws_;
  try {
    last_was_prefill_ ? prefill(*drawing_[0], plan.tokens) : decode(drawing_);
  } catch (const std::exception& error) {
    settle();  // what was drawn before the error is good
    poison(drawing_, error.what());
  }
  settle(ahead_ && draws_ > older ? 1 : 0);
  return true;
}

// Whether the next step needs to know what was drawn last: a request is stopped behind its newest
// token, and penalties count it. One such row makes all of them wait, so that they stay one batch.
bool Steps::must_settle() const {
  if (draws_ == 0) return false;
  const auto& rows = outstanding_[0];
  return std::any_of(rows.begin(), rows.end(), [](const Record* r) {
    return r->running && (r->stop.load() || r->request.sampling.penalized());
  });
}

// Whether a step may feed the token that `r` is still drawing: not when the request certainly ends
// with it. Makes room for it.
bool Steps::may_run_ahead(Record& r) {
  int length = r.session.position() + 1;
  if (r.drawn + 1 >= r.request.max_tokens || length >= options_.max_context) return false;
  try {
    manager_.grow(r.session, length);
  } catch (const std::exception&) {
    return false;  // accept() meets it again and reports it
  }
  return true;
}

void Steps::prefill(Record& r, int tokens) {
  Session& s = r.session;
  bool last = tokens == s.pending();
  s.has_logits = false;
  pipeline_.prefill({.slot = s.slot,
                     .generation = s.generation,
                     .position = s.computed,
                     .tokens = std::span<const int32_t>(s.tokens).subspan(
                         static_cast<size_t>(s.computed), static_cast<size_t>(tokens)),
                     .pages = s.pages,
                     .logits = last});
  s.computed += tokens;
  ++stats_.prefill_steps;
  stats_.prefill_tokens += tokens;
  if (!last) return;
  s.has_logits = true;
  r.prompt = false;
  if (r.request.draw) {
    Record* one = &r;
    draw({&one, 1});
  } else {
    finish(r, Finish::length);
  }
}

void Steps::decode(std::span<Record* const> rows) {
  decode_rows_.clear();
  for (Record* r : rows) {
    Session& s = r->session;
    s.has_logits = false;
    int32_t token = r->draws > 0 ? kLastDrawn : s.tokens[static_cast<size_t>(s.computed)];
    decode_rows_.push_back({s.slot, s.generation, s.computed, token, s.pages});
  }
  pipeline_.decode(decode_rows_);
  for (Record* r : rows) {
    ++r->session.computed;  // one more than there are tokens, until settle() in the same step
    r->session.has_logits = true;
  }
  ++stats_.decode_steps;
  stats_.decode_tokens += static_cast<int64_t>(rows.size());
  stats_.max_decode_rows = std::max(stats_.max_decode_rows, static_cast<int64_t>(rows.size()));
  draw(rows);
}

void Steps::draw(std::span<Record* const> rows) {
  sample_rows_.clear();
  for (Record* r : rows) {
    const Session& s = r->session;
    std::span<const int32_t> timeline(s.tokens);
    sample_rows_.push_back({.slot = s.slot,
                            .position = s.computed,
                            .sampling = &r->request.sampling,
                            .timeline = timeline,
                            .reply = timeline.subspan(static_cast<size_t>(s.reply_begin))});
  }
  pipeline_.last().draw(sample_rows_);
  outstanding_[static_cast<size_t>(draws_++)].assign(rows.begin(), rows.end());
  for (Record* r : rows) ++r->draws;
}

void Steps::settle(int keep) {
  while (draws_ > keep) collect();
}

void Steps::collect() {
  std::vector<Record*>& rows = outstanding_[0];
  std::span results(results_.data(), rows.size());
  --draws_;
  for (Record* r : rows) --r->draws;
  try {
    pipeline_.last().collect(results);
    for (size_t i = 0; i < rows.size(); ++i) accept(*rows[i], results[i]);
  } catch (const std::exception& error) {
    poison(rows, error.what());
  }
  std::swap(outstanding_[0], outstanding_[1]);
}

void Steps::accept(Record& r, const SampleResult& result) {
  Record* one = &r;
  if (result.stale)
    return poison({&one, 1}, concat("slot ", r.session.slot, " no longer has generation ",
                                    r.session.generation,
                                    ", which the step named; nothing was "
                                    "written"));
  if (!r.running) return;  // it ended with the token before; this one is nobody's
  if (!result.finite)
    return poison({&one, 1},
                  concat("a logit at position ", r.session.position() - 1, " is not finite"));
  const Request& request = r.request;
  Session& s = r.session;
  s.tokens.push_back(result.token);
  r.new_tokens.push_back(result.token);
  if (request.sampling.logprobs >= 0) r.new_logprobs.push_back(result.logprob);
  for (int i = 0; i < request.sampling.logprobs; ++i)
    r.new_top.push_back(i < result.top_count ? result.top[i] : std::pair<int32_t, float>{-1, 0.0f});
  ++r.drawn;

  auto holds = [&](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), result.token) != ids.end();
  };
  if (holds(request.stop_token_ids) || (!request.ignore_eos && holds(options_.eos_token_ids))) {
    finish(r, Finish::stop);
  } else if (r.drawn >= request.max_tokens || s.position() >= options_.max_context) {
    finish(r, Finish::length);
  } else {
    try {
      manager_.grow(s, s.position());
    } catch (const std::exception& error) {
      poison({&one, 1}, error.what());
    }
  }
}

void Steps::finish(Record& r, Finish why, const std::string& error) {
  r.running = false;
  r.finish = why;
  if (why == Finish::error && r.poison.empty()) r.poison = error;  // the first says most
}

void Steps::poison(std::span<Record* const> rows, const std::string& error) {
  for (Record* r : rows) finish(*r, Finish::error, error);
}

}  // namespace qwen_moe
