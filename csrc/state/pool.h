// Slots with generations and pages with reference counts: integers only, no memory. Number 0 of
// each is the sink and is never given out.
#pragma once

#include <cstdint>
#include <vector>

#include "base/error.h"

namespace qwen_moe {

class SlotPool {
 public:
  explicit SlotPool(int slots) : generation_(static_cast<size_t>(slots) + 1, 0) {
    for (int slot = slots; slot > 0; --slot) free_.push_back(slot);
  }

  int capacity() const { return static_cast<int>(generation_.size()) - 1; }
  int used() const { return capacity() - static_cast<int>(free_.size()); }
  uint32_t generation(int slot) const { return generation_.at(static_cast<size_t>(slot)); }

  [[nodiscard]] int acquire() {
    require<Capacity>(
        !free_.empty(), "all ", capacity(),
        " sessions are open; close one, or open the engine with a larger max_sessions");
    int slot = free_.back();
    free_.pop_back();
    return slot;
  }

  // Whoever still holds the old generation is stale from here on.
  void release(int slot) {
    ++generation_.at(static_cast<size_t>(slot));
    free_.push_back(slot);
  }

 private:
  std::vector<uint32_t> generation_;  // [slots + 1]
  std::vector<int> free_;
};

class PagePool {
 public:
  explicit PagePool(int pages) : references_(static_cast<size_t>(pages) + 1, 0) {
    for (int page = pages; page > 0; --page) free_.push_back(page);
  }

  int capacity() const { return static_cast<int>(references_.size()) - 1; }
  int used() const { return capacity() - static_cast<int>(free_.size()); }
  int available() const { return static_cast<int>(free_.size()); }
  int references(int page) const { return references_.at(static_cast<size_t>(page)); }

  [[nodiscard]] int acquire() {
    require<Capacity>(!free_.empty(), "all ", capacity(), " KV pages are in use");
    int page = free_.back();
    free_.pop_back();
    references_[static_cast<size_t>(page)] = 1;
    return page;
  }

  void share(int page) { ++references_.at(static_cast<size_t>(page)); }

  // True when the page became free.
  bool release(int page) {
    if (--references_.at(static_cast<size_t>(page)) > 0) return false;
    free_.push_back(page);
    return true;
  }

 private:
  std::vector<int> references_;  // [pages + 1]
  std::vector<int> free_;
};

}  // namespace qwen_moe
