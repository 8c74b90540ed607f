// A persistent pool of worker threads. Every worker begins with its own contiguous share of the
// task indices, so that it streams through neighbouring memory, and then helps the others with
// theirs. So the caller must make tasks whose results do not depend on who computes them or in
// which order.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace qwen_moe::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the calling thread counts as one
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(index, worker) for every index in [0, count), worker in [0, size()). Returns when
  // all are done. One run at a time; callers on several threads wait for each other. Never nests.
  // Tasks must not throw: an exception that leaves one ends the process.
  template <class Task>
  void run(int count, const Task& task) {
    run_raw(
        count,
        [](const void* t, int index, int worker) noexcept {
          (*static_cast<const Task*>(t))(index, worker);
        },
        &task);
  }

  // One pool per thread count in the process, shared by every backend that asks for it.
  static std::shared_ptr<ThreadPool> shared(int threads);

 private:
  using Call = void (*)(const void* task, int index, int worker) noexcept;
  void run_raw(int count, Call call, const void* task);
  int drain(int worker, uint32_t epoch);
  void work(int worker);
  void stop();

  // The job in progress. A late worker may read these while the next job is being written; it then
  // fails to claim an index from a lane, which was closed first, and never uses what it read.
  std::mutex run_mutex_;  // one run at a time
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> task_{nullptr};
  std::atomic<int> count_{0};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // raised by one for every job; workers sleep on it
  struct alignas(64) Lane {
    std::atomic<uint64_t> next{0};  // epoch << 32 | how many of the lane's indices are handed out
  };
  std::unique_ptr<Lane[]> lanes_;  // [size], one for each worker's share
  int lane_count_ = 1;
  alignas(64) std::atomic<int> done_{0};  // indices finished; the caller sleeps on it
  std::vector<std::thread> workers_;
};

}  // namespace qwen_moe::cpu
