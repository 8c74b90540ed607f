#include "engine/engine.h"

#include <algorithm>
#include <utility>

namespace qwen_moe {

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::none: return "";
    case Finish::stop: return "stop";
    case Finish::length: return "length";
    case Finish::stopped: return "stopped";
    case Finish::error: return "error";
  }
  return "";
}

struct Engine::Record {
  SessionId id = 0;
  Session session;
  std::string poison;  // why, until reset
  std::atomic<bool> stop{false};

  bool running = false;
  bool prompt = false;  // pending tokens are a prompt, not one drawn token
  Request request;
  int drawn = 0;  // tokens of this request
  int draws = 0;  // not collected yet
  Finish finish = Finish::none;

  // Since the last poll; reserved at submit, so that drawing allocates nothing.
  std::vector<int32_t> new_tokens;
  std::vector<float> new_logprobs;
  std::vector<std::pair<int32_t, float>> new_top;  // request.sampling.logprobs for each token
};

Engine::Engine(std::shared_ptr<const Model> model, const StateLayout& declared, int vocab_size,
               std::vector<std::unique_ptr<Backend>> shards, const EngineOptions& options)
    : options_(options),
      vocab_size_(vocab_size),
      model_(std::move(model)),
      pipeline_(std::make_unique<Pipeline>(std::move(shards))),
      ahead_(pipeline_->ahead()) {
  require(options.max_sessions > 0 && options.max_sessions <= 4096,
          "max_sessions must be in [1, 4096], got ", options.max_sessions);
  require(options.max_context > 0, "max_context must be positive, got ", options.max_context);
  StateOptions state{options.max_sessions, options.max_context, options.poison};
  pipeline_->reserve({.slots = options.max_sessions,
                      .pages = MutableStateManager::pages_needed(state),
                      .max_context = options.max_context});
  manager_ = std::make_unique<MutableStateManager>(declared, pipeline_->stores(), state);

  auto sessions = static_cast<size_t>(options.max_sessions);
  work_.reserve(sessions);
  ready_.reserve(sessions);
  drawing_.reserve(sessions);
  decode_rows_.reserve(kMaxRows);
  sample_rows_.reserve(kMaxRows);
  results_.resize(kMaxRows);
  for (auto& rows : outstanding_) rows.reserve(kMaxRows);
}

Engine::~Engine() = default;

std::map<std::string, size_t> Engine::memory() const {
  std::map<std::string, size_t> ledger = pipeline_->memory();
  ledger["weights"] = model_ ? model_->bytes() : 0;
  size_t total = 0;
  for (const auto& [name, bytes] : ledger) total += bytes;
  ledger["total"] = total;
  return ledger;
}

EngineStats Engine::stats() const {
  std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  stats.sessions_open = static_cast<int64_t>(records_.size());
  stats.slots_used = manager_->slots().used();
  stats.pages_used = manager_->pages().used();
  stats.pages_total = manager_->pages().capacity();
  stats.backend = pipeline_->counters();
  return stats;
}

Engine::Record& Engine::record(SessionId id) const {
  std::lock_guard lock(names_mutex_);
  auto found = records_.find(id);
  require(found != records_.end(), "session ", id, " is closed");
  return *found->second;
}

Engine::Record& Engine::idle(SessionId id, const char* verb) const {
  Record& r = record(id);
  require(!r.running, "cannot ", verb, " session ", id,
          " while its request is running; stop or cancel it first");
  return r;
}

SessionId Engine::add(Session session) {
  auto made = std::make_unique<Record>();
  made->session = std::move(session);
  SessionId id = next_id_++;
  made->id = id;
  ++stats_.sessions_opened;
  std::lock_guard lock(names_mutex_);
  records_.emplace(id, std::move(made));
  return id;
}

SessionId Engine::open() {
  std::lock_guard lock(mutex_);
  return add(manager_->create());
}

void Engine::close(SessionId id) {
  std::lock_guard lock(mutex_);
  settle();
  manager_->destroy(record(id).session);
  std::lock_guard names(names_mutex_);
  records_.erase(id);
}

void Engine::reset(SessionId id) {
  std::lock_guard lock(mutex_);
  settle();
  Record& r = record(id);
  manager_->reset(r.session);
  r.running = false;
  r.finish = Finish::none;
  r.poison.clear();
  r.new_tokens.clear();
  r.new_logprobs.clear();
  r.new_top.clear();
}

SessionId Engine::fork(SessionId id) {
  std::lock_guard lock(mutex_);
  settle();
  Record& r = idle(id, "fork");
  require(r.poison.empty(), "session ", id, " is poisoned (", r.poison, "); reset it first");
  return add(manager_->fork(r.session));
}

void Engine::stop(SessionId id) {
  std::lock_guard lock(names_mutex_);
  auto found = records_.find(id);
  require(found != records_.end(), "session ", id, " is closed");
  found->second->stop.store(true);
}

void Engine::cancel(SessionId id) {
  std::lock_guard lock(mutex_);
  settle();
  Record& r = record(id);
  if (r.running) finish(r, Finish::stopped);
}

void Engine::submit(SessionId id, const Request& request) {
  request.sampling.validate();
  std::lock_guard lock(mutex_);
  settle();
  Record& r = idle(id, "submit to");
  Session& s = r.session;
  require<Error>(r.poison.empty(), "session ", id, " is poisoned (", r.poison, "); reset it first");
  for (int32_t token : request.tokens)
    require(token >= 0 && token < vocab_size_, "token id ", token, " is outside the vocabulary of ",
            vocab_size_);
  auto length = static_cast<int64_t>(s.tokens.size() + request.tokens.size());
  require<Capacity>(length <= options_.max_context, "the session holds ", s.tokens.size(),
                    " tokens and ", request.tokens.size(),
                    " more do not fit max_context = ", options_.max_context);
  if (request.draw) {
    require(length > 0, "nothing to continue: the session is empty and so is the prompt");
    require(request.max_tokens > 0, "max_tokens must be positive, got ", request.max_tokens);
    require<Capacity>(length < options_.max_context,
                      "the session is full: max_context = ", options_.max_context,
                      " tokens; reset it or open the engine with a larger one");
  } else {
    require(!request.tokens.empty(), "the prompt is empty");
  }
  manager_->grow(s, static_cast<int>(length));

  r.request = request;
  r.running = true;
  r.stop.store(false);
  r.drawn = 0;
  r.finish = Finish::none;
  s.tokens.insert(s.tokens.end(), request.tokens.begin(), request.tokens.end());
  // A stopped prefill leaves several tokens pending; they go on as a prompt.
  r.prompt = !request.tokens.empty() || s.pending() > 1;
  if (r.prompt) s.reply_begin = s.position();
  r.new_tokens.clear();
  r.new_logprobs.clear();
  r.new_top.clear();
  if (request.draw) {
    auto most =
        static_cast<size_t>(std::min<int64_t>(request.max_tokens, options_.max_context - length));
    r.new_tokens.reserve(most);
    if (request.sampling.logprobs >= 0) r.new_logprobs.reserve(most);
    if (request.sampling.logprobs > 0)
      r.new_top.reserve(most * static_cast<size_t>(request.sampling.logprobs));
  }
}

bool Engine::run(std::span<const SessionId> ids, int tokens, bool any,
                 const std::atomic<bool>* interrupt) {
  while (true) {
    std::lock_guard lock(mutex_);
    size_t done = 0;
    bool ended = false;  // and a step that was fed its last token is in flight
    for (SessionId id : ids) {
      const Record& r = record(id);
      done += !r.running || (tokens > 0 && static_cast<int>(r.new_tokens.size()) >= tokens);
      ended = ended || (!r.running && r.draws > 0);
    }
    // What is drawn for a running request stays in flight: whoever asks for tokens one by one finds
    // the device a step ahead, and nobody waits here for somebody else's prompt.
    bool enough = any ? done > 0 : done == ids.size();
    if (enough || (interrupt && interrupt->load())) {
      if (ended) settle();
      return enough;
    }
    step_locked();
  }
}

bool Engine::step() {
  std::lock_guard lock(mutex_);
  return step_locked();
}

bool Engine::step_locked() {
  if (must_settle()) settle();
  work_.clear();
  ready_.clear();
  drawing_.clear();
  for (auto& [id, r] : records_) {
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

  StepPlan plan = plan_step(work_, last_was_prefill_, turn_++, pipeline_->prefill_chunk());
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
    last_was_prefill_ ? prefill_step(*drawing_[0], plan.tokens) : decode_step(drawing_);
  } catch (const std::exception& error) {
    settle();  // what was drawn before the error is good
    poison(drawing_, error.what());
  }
  settle(ahead_ && draws_ > older ? 1 : 0);
  return true;
}

// Whether the next step needs to know what was drawn last: a request is stopped behind its newest
// token, and penalties count it. One such row makes all of them wait, so that they stay one batch.
bool Engine::must_settle() const {
  if (draws_ == 0) return false;
  const auto& rows = outstanding_[0];
  return std::any_of(rows.begin(), rows.end(), [](const Record* r) {
    return r->running && (r->stop.load() || r->request.sampling.penalized());
  });
}

// Whether a step may feed the token that `r` is still drawing: not when the request certainly ends
// with it. Makes room for it.
bool Engine::may_run_ahead(Record& r) {
  int length = r.session.position() + 1;
  if (r.drawn + 1 >= r.request.max_tokens || length >= options_.max_context) return false;
  try {
    manager_->grow(r.session, length);
  } catch (const std::exception&) {
    return false;  // accept() meets it again and reports it
  }
  return true;
}

void Engine::prefill_step(Record& r, int tokens) {
  Session& s = r.session;
  bool last = tokens == s.pending();
  s.has_logits = false;
  pipeline_->prefill({.slot = s.slot,
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

void Engine::decode_step(std::span<Record* const> rows) {
  decode_rows_.clear();
  for (Record* r : rows) {
    Session& s = r->session;
    s.has_logits = false;
    int32_t token = r->draws > 0 ? kLastDrawn : s.tokens[static_cast<size_t>(s.computed)];
    decode_rows_.push_back({s.slot, s.generation, s.computed, token, s.pages});
  }
  pipeline_->decode(decode_rows_);
  for (Record* r : rows) {
    ++r->session.computed;  // one more than there are tokens, until settle() in the same step
    r->session.has_logits = true;
  }
  ++stats_.decode_steps;
  stats_.decode_tokens += static_cast<int64_t>(rows.size());
  stats_.max_decode_rows = std::max(stats_.max_decode_rows, static_cast<int64_t>(rows.size()));
  draw(rows);
}

void Engine::draw(std::span<Record* const> rows) {
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
  pipeline_->last().draw(sample_rows_);
  outstanding_[static_cast<size_t>(draws_++)].assign(rows.begin(), rows.end());
  for (Record* r : rows) ++r->draws;
}

void Engine::settle(int keep) {
  while (draws_ > keep) collect();
}

void Engine::collect() {
  std::vector<Record*>& rows = outstanding_[0];
  std::span results(results_.data(), rows.size());
  --draws_;
  for (Record* r : rows) --r->draws;
  try {
    pipeline_->last().collect(results);
    for (size_t i = 0; i < rows.size(); ++i) accept(*rows[i], results[i]);
  } catch (const std::exception& error) {
    poison(rows, error.what());
  }
  std::swap(outstanding_[0], outstanding_[1]);
}

void Engine::accept(Record& r, const SampleResult& result) {
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
      manager_->grow(s, s.position());
    } catch (const std::exception& error) {
      poison({&one, 1}, error.what());
    }
  }
}

void Engine::finish(Record& r, Finish why, const std::string& error) {
  r.running = false;
  r.finish = why;
  if (why == Finish::error && r.poison.empty()) r.poison = error;  // the first says most
}

void Engine::poison(std::span<Record* const> rows, const std::string& error) {
  for (Record* r : rows) finish(*r, Finish::error, error);
}

Progress Engine::poll(SessionId id) {
  std::lock_guard lock(mutex_);
  Record& r = record(id);
  Progress progress;
  progress.tokens.assign(r.new_tokens.begin(), r.new_tokens.end());
  progress.logprobs.assign(r.new_logprobs.begin(), r.new_logprobs.end());
  auto each = static_cast<size_t>(std::max(r.request.sampling.logprobs, 0));
  for (size_t i = 0; each && i < r.new_top.size(); i += each) {
    auto begin = r.new_top.begin() + static_cast<std::ptrdiff_t>(i);
    progress.top_logprobs.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(each));
    std::erase_if(progress.top_logprobs.back(), [](const auto& entry) { return entry.first < 0; });
  }
  r.new_tokens.clear();
  r.new_logprobs.clear();
  r.new_top.clear();
  progress.finished = !r.running;
  progress.finish = r.running ? Finish::none : r.finish;
  progress.error = r.poison;
  return progress;
}

std::vector<int32_t> Engine::tokens(SessionId id) const {
  std::lock_guard lock(mutex_);
  return record(id).session.tokens;
}

int Engine::position(SessionId id) const {
  std::lock_guard lock(mutex_);
  return record(id).session.position();
}

std::string Engine::poisoned(SessionId id) const {
  std::lock_guard lock(mutex_);
  return record(id).poison;
}

void Engine::logits(SessionId id, std::span<float> to) {
  std::lock_guard lock(mutex_);
  settle();
  Record& r = record(id);
  require(static_cast<int>(to.size()) == vocab_size_, "logits need a buffer of ", vocab_size_,
          " floats, got ", to.size());
  require(r.session.has_logits, "session ", id, " has no logits yet; prefill a prompt first");
  pipeline_->last().read_logits(r.session.slot, to);
}

Engine::Snapshot Engine::save(SessionId id) {
  std::lock_guard lock(mutex_);
  settle();
  Record& r = idle(id, "save");
  require(r.poison.empty(), "session ", id, " is poisoned (", r.poison, "); it cannot be saved");
  const Session& s = r.session;
  return {s.tokens, s.computed, s.reply_begin, s.has_logits, manager_->save(s)};
}

void Engine::load(SessionId id, const Snapshot& snapshot) {
  std::lock_guard lock(mutex_);
  settle();
  Record& r = idle(id, "load into");
  Session& s = r.session;
  auto length = static_cast<int>(snapshot.tokens.size());
  require(s.tokens.empty(), "session ", id, " holds ", s.tokens.size(),
          " tokens; load into a fresh one");
  require<Capacity>(length <= options_.max_context, "the saved session holds ", length,
                    " tokens, this engine's max_context is ", options_.max_context);
  require<Format>(snapshot.computed >= 0 && snapshot.computed <= length &&
                      snapshot.reply_begin >= 0 && snapshot.reply_begin <= length,
                  "the saved timeline is inconsistent: ", length, " tokens, ", snapshot.computed,
                  " computed, reply from ", snapshot.reply_begin);
  for (int32_t token : snapshot.tokens)
    require<Format>(token >= 0 && token < vocab_size_, "the saved timeline holds token id ", token,
                    ", outside the vocabulary of ", vocab_size_);
  manager_->load(s, snapshot.buffers, snapshot.computed);
  manager_->grow(s, length);
  s.tokens.assign(snapshot.tokens.begin(), snapshot.tokens.end());
  s.reply_begin = snapshot.reply_begin;
  s.has_logits = snapshot.has_logits;
}

}  // namespace qwen_moe
