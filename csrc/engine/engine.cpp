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
  Finish finish = Finish::none;

  // Since the last poll; reserved at submit, so that drawing allocates nothing.
  std::vector<int32_t> new_tokens;
  std::vector<float> new_logprobs;
  std::vector<std::pair<int32_t, float>> new_top;  // request.sampling.logprobs for each token
};

Engine::Engine(std::shared_ptr<const Model> model, const StateLayout& declared, int vocab_size,
               std::vector<std::unique_ptr<Backend>> shards, const EngineOptions& options)
    : options_(options), vocab_size_(vocab_size), model_(std::move(model)) {
  require(options.max_sessions > 0 && options.max_sessions <= 4096,
          "max_sessions must be in [1, 4096], got ", options.max_sessions);
  require(options.max_context > 0, "max_context must be positive, got ", options.max_context);
  pipeline_ = std::make_unique<Pipeline>(std::move(shards));
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
  manager_->destroy(record(id).session);
  std::lock_guard names(names_mutex_);
  records_.erase(id);
}

void Engine::reset(SessionId id) {
  std::lock_guard lock(mutex_);
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
  Record& r = record(id);
  if (r.running) finish(r, Finish::stopped);
}

void Engine::submit(SessionId id, const Request& request) {
  request.sampling.validate();
  std::lock_guard lock(mutex_);
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
    for (SessionId id : ids) {
      const Record& r = record(id);
      done += !r.running || (tokens > 0 && static_cast<int>(r.new_tokens.size()) >= tokens);
    }
    if (any ? done > 0 : done == ids.size()) return true;
    if (interrupt && interrupt->load()) return false;
    step_locked();
  }
}

bool Engine::step() {
  std::lock_guard lock(mutex_);
  return step_locked();
}

bool Engine::step_locked() {
  work_.clear();
  ready_.clear();
  drawing_.clear();
  for (auto& [id, r] : records_) {
    if (!r->running) continue;
    if (r->stop.load()) {
      finish(*r, Finish::stopped);
    } else if (r->session.pending() > 0) {
      work_.push_back(
          {static_cast<int>(ready_.size()), r->prompt, r->session.computed, r->session.pending()});
      ready_.push_back(r.get());
    } else {
      drawing_.push_back(r.get());  // the logits are there already
    }
  }
  for (size_t i = 0; i < drawing_.size(); i += kMaxRows)
    sample({drawing_.data() + i, std::min<size_t>(kMaxRows, drawing_.size() - i)});

  StepPlan plan = plan_step(work_, last_was_prefill_, turn_++);
  if (plan.kind == StepPlan::Kind::none) return !drawing_.empty();
  last_was_prefill_ = plan.kind == StepPlan::Kind::prefill;
  drawing_.clear();
  for (int i = 0; i < plan.rows; ++i)
    drawing_.push_back(ready_[static_cast<size_t>(plan.keys[static_cast<size_t>(i)])]);
  try {
    last_was_prefill_ ? prefill_step(*drawing_[0], plan.tokens) : decode_step(drawing_);
  } catch (const std::exception& error) {
    poison(drawing_, error.what());
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
    sample({&one, 1});
  } else {
    finish(r, Finish::length);
  }
}

void Engine::decode_step(std::span<Record* const> rows) {
  decode_rows_.clear();
  for (Record* r : rows) {
    Session& s = r->session;
    s.has_logits = false;
    decode_rows_.push_back(
        {s.slot, s.generation, s.computed, s.tokens[static_cast<size_t>(s.computed)], s.pages});
  }
  pipeline_->decode(decode_rows_);
  for (Record* r : rows) {
    ++r->session.computed;
    r->session.has_logits = true;
  }
  ++stats_.decode_steps;
  stats_.decode_tokens += static_cast<int64_t>(rows.size());
  stats_.max_decode_rows = std::max(stats_.max_decode_rows, static_cast<int64_t>(rows.size()));
  sample(rows);
}

void Engine::sample(std::span<Record* const> rows) {
  sample_rows_.clear();
  for (Record* r : rows) {
    std::span<const int32_t> timeline(r->session.tokens);
    sample_rows_.push_back({r->session.slot, &r->request.sampling, timeline,
                            timeline.subspan(static_cast<size_t>(r->session.reply_begin))});
  }
  std::span results(results_.data(), rows.size());
  try {
    pipeline_->last().sample(sample_rows_, results);
  } catch (const std::exception& error) {
    poison(rows, error.what());
    return;
  }
  for (size_t i = 0; i < rows.size(); ++i) accept(*rows[i], results[i]);
}

void Engine::accept(Record& r, const SampleResult& result) {
  if (!result.finite) {
    Record* one = &r;
    poison({&one, 1}, concat("a logit at position ", r.session.computed - 1, " is not finite"));
    return;
  }
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
      Record* one = &r;
      poison({&one, 1}, error.what());
    }
  }
}

void Engine::finish(Record& r, Finish why, const std::string& error) {
  r.running = false;
  r.finish = why;
  if (why == Finish::error) r.poison = error;
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

void Engine::logits(SessionId id, std::span<float> to) const {
  std::lock_guard lock(mutex_);
  Record& r = record(id);
  require(static_cast<int>(to.size()) == vocab_size_, "logits need a buffer of ", vocab_size_,
          " floats, got ", to.size());
  require(r.session.has_logits, "session ", id, " has no logits yet; prefill a prompt first");
  pipeline_->last().read_logits(r.session.slot, to);
}

Engine::Snapshot Engine::save(SessionId id) const {
  std::lock_guard lock(mutex_);
  Record& r = idle(id, "save");
  require(r.poison.empty(), "session ", id, " is poisoned (", r.poison, "); it cannot be saved");
  const Session& s = r.session;
  return {s.tokens, s.computed, s.reply_begin, s.has_logits, manager_->save(s)};
}

void Engine::load(SessionId id, const Snapshot& snapshot) {
  std::lock_guard lock(mutex_);
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
