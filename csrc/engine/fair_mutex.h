// A mutex that serves threads in the order they asked. A thread that steps the engine in a loop
// gives way after every step to whoever waits.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace qwen_moe {

class FairMutex {
 public:
  void lock() {
    std::unique_lock hold(mutex_);
    uint64_t ticket = next_++;
    turn_.wait(hold, [&] { return serving_ == ticket; });
  }

  void unlock() {
    {
      std::lock_guard hold(mutex_);
      ++serving_;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  uint64_t next_ = 0;
  uint64_t serving_ = 0;
};

}  // namespace qwen_moe
