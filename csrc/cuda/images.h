// Kernels that were compiled ahead of time: loaded on first use, launched with checked arguments.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "engine/kernel_image.h"

namespace qwen_moe::cuda {

// One argument of a launch; what it is must agree with the image.
class KernelArg {
 public:
  KernelArg(const void* value) : kind_(Kind::pointer) { value_.pointer = value; }
  KernelArg(int value) : kind_(Kind::i32) { value_.i32 = value; }
  KernelArg(int64_t value) : kind_(Kind::i64) { value_.i64 = value; }
  KernelArg(float value) : kind_(Kind::fp32) { value_.fp32 = value; }

  enum class Kind { pointer, i32, i64, fp32 };
  Kind kind() const { return kind_; }
  int64_t value() const;  // of a number or an address; 0 of an fp32
  void* address() const { return const_cast<void*>(static_cast<const void*>(&value_)); }

 private:
  Kind kind_;
  union {
    const void* pointer;
    int i32;
    int64_t i64;
    float fp32;
  } value_{};
};

// What a kernel was compiled for, as its manifest writes it: "*bf16", "i32/16" ...
struct KernelParam {
  std::string name;
  KernelArg::Kind kind;
  int64_t multiple;  // that the value or the address must be of

  KernelParam(std::string name, const std::string& type);
};

// Throws Error naming the parameter when an argument is not of its type or breaks its promise.
void check_arguments(const std::string& kernel, const std::vector<KernelParam>& params,
                     std::initializer_list<KernelArg> args);

// The images of one device, which is current when a kernel is first used. Not thread-safe.
class Images {
 public:
  explicit Images(std::vector<KernelImage> images);
  ~Images();
  Images(const Images&) = delete;
  Images& operator=(const Images&) = delete;

  bool has(const std::string& name) const { return kernels_.contains(name); }
  int shared(const std::string& name) const { return get(name).image.shared; }  // bytes
  // What a kernel was compiled for: rows, outputs or columns of a block.
  int constant(const std::string& name, const std::string& constant) const;
  void launch(cudaStream_t stream, const std::string& name, dim3 grid,
              std::initializer_list<KernelArg> args);

 private:
  struct Loaded {
    KernelImage image;
    std::vector<KernelParam> params;
    cudaLibrary_t library = nullptr;
    const void* kernel = nullptr;
  };
  const Loaded& get(const std::string& name) const;
  static void load(Loaded& loaded);

  std::map<std::string, Loaded> kernels_;
};

}  // namespace qwen_moe::cuda
