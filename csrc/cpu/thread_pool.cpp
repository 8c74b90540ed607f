#include "cpu/thread_pool.h"

#include <chrono>
#include <map>
#include <system_error>

#include "base/error.h"

namespace qwen_moe::cpu {
namespace {

constexpr uint64_t kClosed = 0xffffffffu;  // an index no job reaches
constexpr auto kSpin = std::chrono::microseconds(40);
constexpr int kYields = 8;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready() for about kSpin with the processor, then gives it up a few times, since the
// thread that is waited for may need it. False when it is time to sleep.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  for (int i = 0; i < kYields; ++i) {
    if (ready()) return true;
    std::this_thread::yield();
  }
  return ready();
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  require(threads >= 1, "a thread pool needs at least 1 thread, got ", threads);
  lane_count_ = threads;
  lanes_ = std::make_unique<Lane[]>(static_cast<size_t>(threads));
  workers_.reserve(static_cast<size_t>(threads) - 1);
  try {
    for (int worker = 1; worker < threads; ++worker)
      workers_.emplace_back([this, worker] { work(worker); });
  } catch (const std::system_error& error) {
    const size_t started = workers_.size() + 1;
    stop();
    throw Capacity(
        concat("could not start thread ", started + 1, " of ", threads, ": ", error.what()));
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run_raw(int count, Call call, const void* task) {
  if (count <= 0) return;
  std::lock_guard lock(run_mutex_);
  if (count == 1 || workers_.empty()) {
    for (int index = 0; index < count; ++index) call(task, index, 0);
    return;
  }
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  // Close the lanes before the job changes: whoever reads a new field (acquire) sees them closed,
  // so a claim made with a mixture of old and new fields fails.
  for (int i = 0; i < lane_count_; ++i)
    lanes_[static_cast<size_t>(i)].next.store(static_cast<uint64_t>(epoch) << 32 | kClosed,
                                              std::memory_order_release);
  call_.store(call, std::memory_order_release);
  task_.store(task, std::memory_order_release);
  count_.store(count, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  for (int i = 0; i < lane_count_; ++i)
    lanes_[static_cast<size_t>(i)].next.store(static_cast<uint64_t>(epoch) << 32,
                                              std::memory_order_release);
  epoch_.store(epoch, std::memory_order_release);
  epoch_.notify_all();

  // Only indices that were claimed are waited for: a worker that wakes too late finds none left.
  const int mine = drain(0, epoch);
  int done = done_.fetch_add(mine, std::memory_order_acq_rel) + mine;
  if (done == count) return;
  const auto ready = [&] { return (done = done_.load(std::memory_order_acquire)) == count; };
  if (spin_until(ready)) return;
  while (!ready()) done_.wait(done, std::memory_order_acquire);
}

int ThreadPool::drain(int worker, uint32_t epoch) {
  int finished = 0;
  for (int turn = 0; turn < lane_count_; ++turn) {
    const int64_t lane = (worker + turn) % lane_count_;  // its own first
    std::atomic<uint64_t>& lane_next = lanes_[static_cast<size_t>(lane)].next;
    uint64_t next = lane_next.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(next >> 32) == epoch) {
      const Call call = call_.load(std::memory_order_acquire);
      const void* task = task_.load(std::memory_order_acquire);
      const int64_t count = count_.load(std::memory_order_acquire);
      const int64_t begin = lane * count / lane_count_, end = (lane + 1) * count / lane_count_;
      const int64_t index = static_cast<uint32_t>(next);
      if (index >= end - begin) break;
      if (!lane_next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel,
                                           std::memory_order_acquire))
        continue;
      call(task, static_cast<int>(begin + index), worker);
      ++finished;
      next = lane_next.load(std::memory_order_acquire);
    }
  }
  return finished;
}

void ThreadPool::work(int worker) {
  uint32_t seen = 0;
  while (true) {
    uint32_t epoch = seen;
    const auto ready = [&] { return (epoch = epoch_.load(std::memory_order_acquire)) != seen; };
    if (!spin_until(ready)) {
      while (!ready()) epoch_.wait(seen, std::memory_order_acquire);
    }
    if (stop_.load()) return;
    seen = epoch;
    const int finished = drain(worker, epoch);
    if (finished > 0) {
      done_.fetch_add(finished, std::memory_order_acq_rel);
      done_.notify_one();
    }
  }
}

std::shared_ptr<ThreadPool> ThreadPool::shared(int threads) {
  // Leaked on purpose: a backend may outlive the statics of this file.
  static auto* mutex = new std::mutex;
  static auto* pools = new std::map<int, std::weak_ptr<ThreadPool>>;
  std::lock_guard lock(*mutex);
  std::weak_ptr<ThreadPool>& slot = (*pools)[threads];
  std::shared_ptr<ThreadPool> pool = slot.lock();
  if (!pool) slot = pool = std::make_shared<ThreadPool>(threads);
  return pool;
}

}  // namespace qwen_moe::cpu
