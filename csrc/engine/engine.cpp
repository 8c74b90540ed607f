#include "engine/engine.h"

#include <algorithm>
#include <utility>

namespace qwen_moe {

Engine::Engine(std::shared_ptr<const Model> model, const StateLayout& declared, int vocab_size,
               std::vector<std::unique_ptr<Backend>> shards, const EngineOptions& options)
    : options_(options),
      vocab_size_(vocab_size),
      model_(std::move(model)),
      pipeline_(std::make_unique<Pipeline>(std::move(shards))) {
  require(options.max_sessions > 0 && options.max_sessions <= 4096,
          "max_sessions must be in [1, 4096], got ", options.max_sessions);
  require(options.max_context > 0, "max_context must be positive, got ", options.max_context);
  StateOptions state{options.max_sessions, options.max_context, options.poison};
  pipeline_->reserve({.slots = options.max_sessions,
                      .pages = MutableStateManager::pages_needed(state),
                      .max_context = options.max_context});
  manager_ = std::make_unique<MutableStateManager>(declared, pipeline_->stores(), state);
  steps_ = std::make_unique<Steps>(
      *pipeline_, *manager_,
      StepOptions{options.max_sessions, options.max_context, options.eos_token_ids});
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
  EngineStats stats{steps_->stats()};
  stats.sessions_opened = next_id_ - 1;
  stats.sessions_open = static_cast<int64_t>(records_.size());
  stats.slots_used = manager_->slots().used();
  stats.pages_used = manager_->pages().used();
  stats.pages_total = manager_->pages().capacity();
  stats.backend = pipeline_->counters();
  return stats;
}

Record& Engine::record(SessionId id) const {
  std::lock_guard lock(names_mutex_);
  auto found = records_.find(id);
  require(found != records_.end(), "session ", id, " is closed");
  return *found->second;
}

Record& Engine::idle(SessionId id, const char* verb) const {
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
  steps_->settle();
  manager_->destroy(record(id).session);
  std::lock_guard names(names_mutex_);
  records_.erase(id);
}

void Engine::reset(SessionId id) {
  std::lock_guard lock(mutex_);
  steps_->settle();
  Record& r = record(id);
  manager_->reset(r.session);
  r.running = false;
  r.finish = Finish::none;
  r.poison.clear();
  r.clear_new();
}

SessionId Engine::fork(SessionId id) {
  std::lock_guard lock(mutex_);
  steps_->settle();
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
  steps_->settle();
  Record& r = record(id);
  if (r.running) steps_->finish(r, Finish::stopped);
}

void Engine::submit(SessionId id, const Request& request) {
  request.sampling.validate();
  std::lock_guard lock(mutex_);
  steps_->settle();
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
  r.clear_new();
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
      if (ended) steps_->settle();
      return enough;
    }
    steps_->step(records_);
  }
}

bool Engine::step() {
  std::lock_guard lock(mutex_);
  return steps_->step(records_);
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
  r.clear_new();
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
  steps_->settle();
  Record& r = record(id);
  require(static_cast<int>(to.size()) == vocab_size_, "logits need a buffer of ", vocab_size_,
          " floats, got ", to.size());
  require(r.session.has_logits, "session ", id, " has no logits yet; prefill a prompt first");
  pipeline_->last().read_logits(r.session.slot, to);
}

Engine::Snapshot Engine::save(SessionId id) {
  std::lock_guard lock(mutex_);
  steps_->settle();
  Record& r = idle(id, "save");
  require(r.poison.empty(), "session ", id, " is poisoned (", r.poison, "); it cannot be saved");
  const Session& s = r.session;
  return {s.tokens, s.computed, s.reply_begin, s.has_logits, manager_->save(s)};
}

void Engine::load(SessionId id, const Snapshot& snapshot) {
  std::lock_guard lock(mutex_);
  steps_->settle();
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
