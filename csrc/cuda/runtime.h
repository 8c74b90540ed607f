// RAII over the CUDA runtime: everything owned is freed, and every call is checked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "base/error.h"

namespace qwen_moe::cuda {

// Throws Device naming the call; out of memory is Capacity.
void check(cudaError_t status, const char* call);
#define QWEN_MOE_CUDA(call) ::qwen_moe::cuda::check((call), #call)

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    QWEN_MOE_CUDA(cudaGetDevice(&before_));
    if (device != before_) QWEN_MOE_CUDA(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class Event;

class Stream {
 public:
  Stream() { QWEN_MOE_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void synchronize() const { QWEN_MOE_CUDA(cudaStreamSynchronize(stream_)); }
  // What is enqueued from here on waits for what the event was recorded behind, if it was.
  void wait_for(const Event& event) const;

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(unsigned flags = cudaEventDisableTiming) {
    QWEN_MOE_CUDA(cudaEventCreateWithFlags(&event_, flags));
  }
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  operator cudaEvent_t() const { return event_; }
  void record(cudaStream_t stream) const { QWEN_MOE_CUDA(cudaEventRecord(event_, stream)); }
  void synchronize() const { QWEN_MOE_CUDA(cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

inline void Stream::wait_for(const Event& event) const {
  QWEN_MOE_CUDA(cudaStreamWaitEvent(stream_, event, 0));
}

// `Allocate` and `Free` from one of the two memories below.
template <class T, class Memory>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) : count_(count) {
    if (count) data_ = static_cast<T*>(Memory::allocate(count * sizeof(T)));
  }
  ~Buffer() {
    if (data_) Memory::release(data_, bytes());
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

struct DeviceMemory {  // of the current device
  static void* allocate(size_t bytes);
  static void release(void* data, size_t) { cudaFree(data); }
};
struct PinnedMemory {
  static void* allocate(size_t bytes);
  static void release(void* data, size_t bytes);
  static size_t taken();  // by the process, now
};
template <class T>
using DeviceBuffer = Buffer<T, DeviceMemory>;
template <class T>
using PinnedBuffer = Buffer<T, PinnedMemory>;

// What the kernels need to know of a device. Throws Device when it is older than sm_80 or its
// driver is older than the toolkit.
struct DeviceProperties {
  int device = 0;
  int sms = 0;           // multiprocessors
  int major = 0;         // compute capability
  int shared_bytes = 0;  // a block may ask for
  bool programmatic_launch() const { return major >= 9; }
};
DeviceProperties device_properties(int device);

}  // namespace qwen_moe::cuda
