// Host memory for weights, state and scratch: 64-byte aligned, zeroed, given back on destruction.
// Large blocks come from their own mapping, so untouched pages cost nothing, and ask for huge
// pages.
#pragma once

#include <cstddef>
#include <memory>

namespace qwen_moe::cpu {

std::shared_ptr<std::byte> allocate_shared(size_t bytes);

// Bytes this process may still take, after the container's limit; 0 when unknown.
size_t available_memory();

template <class T>
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(size_t count) : data_(allocate_shared(count * sizeof(T))), count_(count) {}
  T* data() const { return reinterpret_cast<T*>(data_.get()); }
  T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  std::shared_ptr<std::byte> data_;
  size_t count_ = 0;
};

}  // namespace qwen_moe::cpu
