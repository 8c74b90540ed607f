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

// What one thread sends through. There are two buffers of pinned memory, so that the host fills one
// while the other travels. All memory of a kind is one allocation: the driver makes and frees some
// slowly, one thread at a time.
struct Lane {
  Stream stream;
  Event sent[2];
  int next = 0;

  std::byte* tiles() const { return device.data(); }          // in host order
  std::byte* rows() const { return device.data() + kChunk; }  // weights to pack
  int* bad() const {                                          // what pack_on_device says of them
    return reinterpret_cast<int*>(device.data() + 2 * kChunk);
  }
  // The pinned buffer whose turn it is, once its last contents have left.
  std::byte* turn() {
    Timed timed(lane_times.waiting);
    next = 1 - next;
    sent[next].synchronize();
    return buffer();
  }
  // Runs what writes to that buffer.
  template <class Write>
  void fill(const Write& write) {
    Timed timed(lane_times.filling);
    write();
  }
  // Starts what is in it on its way.
  void send(std::byte* to, size_t bytes) {
    QWEN_MOE_CUDA(cudaMemcpyAsync(to, buffer(), bytes, cudaMemcpyHostToDevice, stream));
    sent[next].record(stream);
  }
  // Until all of it is where it belongs.
  void wait() {
    Timed timed(lane_times.waiting);
    stream.synchronize();
  }

 private:
  PinnedBuffer<std::byte> host{2 * kChunk};
  DeviceBuffer<std::byte> device{2 * kChunk + sizeof(int)};

  std::byte* buffer() const { return host.data() + static_cast<size_t>(next) * kChunk; }
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
