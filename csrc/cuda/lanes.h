// The way of weights to a GPU: pinned buffers, device buffers and a stream for every thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

// Bytes that one thread sends at a time.
inline constexpr size_t kChunk = size_t{4} << 20;

// Nanoseconds that loading threads spent since the process began, all of them together: making
// lanes, filling pinned memory (reading files mostly), and waiting for the device.
struct LaneTimes {
  std::atomic<int64_t> making{0}, filling{0}, waiting{0};
};
inline LaneTimes lane_times;

// Adds the time that it lives.
class Timed {
 public:
  explicit Timed(std::atomic<int64_t>& sum) : sum_(sum) {}
  ~Timed() { sum_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin_).count(); }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  std::atomic<int64_t>& sum_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// What one thread sends through. Two buffers are pinned, so that the host fills one while the other
// travels.
struct Lane {
  Stream stream;
  PinnedBuffer<std::byte> host[2]{PinnedBuffer<std::byte>(kChunk), PinnedBuffer<std::byte>(kChunk)};
  Event sent[2];
  DeviceBuffer<std::byte> tiles{kChunk};  // in host order
  DeviceBuffer<std::byte> rows{};         // made by the first that needs it: weights to pack
  DeviceBuffer<int> bad{1};               // what pack_on_device says of them
  int next = 0;

  // The pinned buffer whose turn it is, once its last contents have left.
  std::byte* turn() {
    Timed timed(lane_times.waiting);
    next = 1 - next;
    sent[next].synchronize();
    return host[next].data();
  }
  // Runs what writes to that buffer.
  template <class Write>
  void fill(const Write& write) {
    Timed timed(lane_times.filling);
    write();
  }
  // Starts what is in it on its way.
  void send(std::byte* to, size_t bytes) {
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, host[next].data(), bytes, cudaMemcpyHostToDevice, stream));
    sent[next].record(stream);
  }
  // Until all of it is where it belongs.
  void wait() {
    Timed timed(lane_times.waiting);
    stream.synchronize();
  }
};

// Lanes that wait for a thread; there come to be as many as threads send at once.
class Lanes {
 public:
  // Gives the lane back once what it sent has arrived.
  class Loan {
   public:
    explicit Loan(Lanes& lanes) : lanes_(lanes), lane_(lanes.take()) {}
    ~Loan() {
      cudaStreamSynchronize(lane_->stream);  // after an error nothing may be on its way either
      lanes_.give(std::move(lane_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Lane& operator*() const { return *lane_; }

   private:
    Lanes& lanes_;
    std::unique_ptr<Lane> lane_;
  };

  void clear() {
    std::lock_guard lock(mutex_);
    free_.clear();
  }

 private:
  std::unique_ptr<Lane> take() {
    {
      std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        auto lane = std::move(free_.back());
        free_.pop_back();
        return lane;
      }
    }
    Timed timed(lane_times.making);
    return std::make_unique<Lane>();
  }
  void give(std::unique_ptr<Lane> lane) {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(lane));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> free_;
};

}  // namespace qwen_moe::cuda
