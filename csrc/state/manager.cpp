#include "state/manager.h"

#include <algorithm>
#include <utility>

#include "model/ops.h"  // kPageTokens

namespace qwen_moe {
namespace {

const StateBuffer* find(const std::vector<StateBuffer>& buffers, const std::string& fqn) {
  auto it = std::find_if(buffers.begin(), buffers.end(),
                         [&](const StateBuffer& b) { return b.fqn == fqn; });
  return it == buffers.end() ? nullptr : &*it;
}

}  // namespace

std::string check_coverage(const StateLayout& declared, const std::vector<StateLayout>& shards,
                           const std::vector<Discovered>& discovered) {
  for (const StateBuffer& want : declared.buffers) {
    int owners = 0;
    for (size_t i = 0; i < shards.size(); ++i) {
      const StateBuffer* held = shards[i].find(want.fqn);
      if (!held) continue;
      ++owners;
      if (*held != want)
        return concat("declared ", want.describe(), ", shard ", i, " holds ", held->describe());
      for (const auto& [method, seen] : {std::pair{"prefill", &discovered[i].prefill},
                                         std::pair{"decode", &discovered[i].decode}}) {
        const StateBuffer* written = find(*seen, want.fqn);
        if (!written) return concat(want.fqn, " is declared but ", method, " does not write it");
        if (*written != want)
          return concat("declared ", want.describe(), ", ", method, " writes ",
                        written->describe());
      }
    }
    if (owners != 1) return concat(want.fqn, " is owned by ", owners, " shards instead of one");
  }
  for (const Discovered& shard : discovered)
    for (const auto* seen : {&shard.prefill, &shard.decode})
      for (const StateBuffer& written : *seen)
        if (!declared.find(written.fqn)) return concat(written.fqn, " is written but not declared");
  return "";
}

int MutableStateManager::pages_needed(const StateOptions& options) {
  return options.max_sessions * pages_for(options.max_context, kPageTokens);
}

size_t MutableStateManager::bytes_per_session(const StateLayout& declared, int max_context) {
  size_t tokens = static_cast<size_t>(pages_for(max_context, kPageTokens)) * kPageTokens;
  return declared.fixed_bytes() + declared.bytes_per_token() * tokens;
}

MutableStateManager::MutableStateManager(const StateLayout& declared,
                                         std::vector<StateStore*> shards,
                                         const StateOptions& options)
    : shards_(std::move(shards)),
      options_(options),
      slots_(options.max_sessions),
      pages_(pages_needed(options)) {
  std::vector<StateLayout> layouts;
  std::vector<Discovered> discovered;
  for (StateStore* shard : shards_) {
    layouts.push_back(shard->layout());
    discovered.push_back(shard->discover(1, 1));
    options_.poison ? shard->poison_slot(1) : shard->clear_slot(1);
    if (options_.poison) shard->poison_page(1);
  }
  std::string wrong = check_coverage(declared, layouts, discovered);
  capacity_ = {options.max_sessions, bytes_per_session(declared, options.max_context), "requested"};
  if (!wrong.empty()) {
    capacity_.max_sessions = 1;
    capacity_.reason = "failed closed: " + wrong;
    slots_ = SlotPool(1);
  }
}

Session MutableStateManager::create() {
  Session session;
  session.slot = slots_.acquire();
  session.generation = slots_.generation(session.slot);
  session.tokens.reserve(static_cast<size_t>(options_.max_context));
  session.pages.reserve(static_cast<size_t>(pages_for(options_.max_context, kPageTokens)));
  for (StateStore* shard : shards_) {
    shard->set_generation(session.slot, session.generation);
    shard->clear_slot(session.slot);
  }
  return session;
}

void MutableStateManager::release_pages(Session& session) {
  for (int32_t page : session.pages)
    if (pages_.release(page) && options_.poison)
      for (StateStore* shard : shards_) shard->poison_page(page);
  session.pages.clear();
}

void MutableStateManager::reset(Session& session) {
  release_pages(session);
  session.tokens.clear();
  session.computed = 0;
  session.reply_begin = 0;
  session.has_logits = false;
  for (StateStore* shard : shards_) shard->clear_slot(session.slot);
}

Session MutableStateManager::fork(const Session& session) {
  Session copy = create();
  try {
    // Full pages never change again and are shared; the page being filled is copied.
    size_t full = static_cast<size_t>(session.computed / kPageTokens);
    for (size_t i = 0; i < full; ++i) {
      pages_.share(session.pages[i]);
      copy.pages.push_back(session.pages[i]);
    }
    if (session.computed % kPageTokens != 0) {
      copy.pages.push_back(pages_.acquire());
      for (StateStore* shard : shards_) shard->copy_page(copy.pages.back(), session.pages[full]);
    }
  } catch (...) {
    destroy(copy);
    throw;
  }
  for (StateStore* shard : shards_) shard->copy_slot(copy.slot, session.slot);
  copy.tokens.assign(session.tokens.begin(), session.tokens.end());
  copy.computed = session.computed;
  copy.reply_begin = session.reply_begin;
  copy.has_logits = session.has_logits;
  return copy;
}

void MutableStateManager::destroy(Session& session) {
  release_pages(session);
  slots_.release(session.slot);
  for (StateStore* shard : shards_) {
    shard->set_generation(session.slot, slots_.generation(session.slot));
    if (options_.poison) shard->poison_slot(session.slot);
  }
  session.slot = 0;
}

bool MutableStateManager::stale(const Session& session) const {
  return session.slot == 0 || slots_.generation(session.slot) != session.generation;
}

void MutableStateManager::grow(Session& session, int tokens) {
  size_t need = static_cast<size_t>(pages_for(tokens, kPageTokens));
  size_t had = session.pages.size();
  try {
    while (session.pages.size() < need) session.pages.push_back(pages_.acquire());
  } catch (...) {
    while (session.pages.size() > had) {
      pages_.release(session.pages.back());
      session.pages.pop_back();
    }
    throw;
  }
}

std::vector<MutableStateManager::SavedBuffer> MutableStateManager::save(
    const Session& session) const {
  std::vector<SavedBuffer> saved;
  for (StateStore* shard : shards_) {
    const auto& buffers = shard->layout().buffers;
    for (size_t i = 0; i < buffers.size(); ++i) {
      SavedBuffer entry{buffers[i], buffers[i].shape, {}};
      if (buffers[i].kind == BufferKind::per_token)
        entry.shape.insert(entry.shape.begin(), session.computed);
      entry.bytes.resize(static_cast<size_t>(num_elements(entry.shape)) *
                         dtype_size(buffers[i].dtype));
      shard->read_buffer(i, session.slot, session.pages, session.computed, entry.bytes);
      saved.push_back(std::move(entry));
    }
  }
  return saved;
}

void MutableStateManager::load(Session& session, const std::vector<SavedBuffer>& buffers,
                               int computed) {
  auto given = [&](const StateBuffer& want) {
    for (const SavedBuffer& entry : buffers)
      if (entry.buffer.fqn == want.fqn) return &entry;
    throw Format(concat("the saved session lacks the buffer ", want.describe()));
  };
  size_t expected = 0;
  for (StateStore* shard : shards_)
    for (const StateBuffer& want : shard->layout().buffers) {
      const SavedBuffer* entry = given(want);
      Shape shape = want.shape;
      if (want.kind == BufferKind::per_token) shape.insert(shape.begin(), computed);
      require<Format>(entry->shape == shape && entry->buffer.dtype == want.dtype,
                      "the saved session holds ", want.fqn, " ", to_string(entry->shape), " ",
                      dtype_name(entry->buffer.dtype), ", this engine needs ", to_string(shape),
                      " ", dtype_name(want.dtype));
      size_t bytes = static_cast<size_t>(num_elements(shape)) * dtype_size(want.dtype);
      require<Format>(entry->bytes.size() == bytes, "the saved buffer ", want.fqn, " has ",
                      entry->bytes.size(), " bytes instead of ", bytes);
      ++expected;
    }
  require<Format>(expected == buffers.size(), "the saved session holds ", buffers.size(),
                  " buffers, this engine has ", expected);
  grow(session, computed);
  for (StateStore* shard : shards_)
    for (size_t i = 0; i < shard->layout().buffers.size(); ++i)
      shard->write_buffer(i, session.slot, session.pages, computed,
                          given(shard->layout().buffers[i])->bytes);
  session.computed = computed;
}

}  // namespace qwen_moe
