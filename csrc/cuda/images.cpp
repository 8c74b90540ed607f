#include "cuda/images.h"

#include <utility>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

void KernelArg::check(const std::string& kernel, const std::string& name,
                      const std::string& type) const {
  const size_t slash = type.find('/');
  const std::string kind = type.substr(0, slash);
  const bool is_pointer = kind.starts_with('*');
  const char* given = kind_ == Kind::pointer ? "a pointer"
                      : kind_ == Kind::i32   ? "an i32"
                      : kind_ == Kind::i64   ? "an i64"
                                             : "an fp32";
  const bool agrees = is_pointer       ? kind_ == Kind::pointer
                      : kind == "i32"  ? kind_ == Kind::i32
                      : kind == "i64"  ? kind_ == Kind::i64
                      : kind == "fp32" ? kind_ == Kind::fp32
                                       : false;
  require<Error>(agrees, "kernel ", kernel, " takes ", name, " as ", type, ", got ", given);
  const int64_t multiple = slash != std::string::npos ? std::stoi(type.substr(slash + 1))
                           : is_pointer               ? 16
                                                      : 1;
  const int64_t value = is_pointer            ? reinterpret_cast<intptr_t>(value_.pointer)
                        : kind_ == Kind::fp32 ? 0
                        : kind_ == Kind::i32  ? value_.i32
                                              : value_.i64;
  require<Error>(value % multiple == 0, "kernel ", kernel, " was compiled for ", name,
                 is_pointer ? " at a multiple of " : " a multiple of ", multiple, ", got ", value);
}

void check_arguments(const KernelImage& image, const std::vector<KernelArg>& args) {
  require<Error>(args.size() == image.params.size(), "kernel ", image.name, " takes ",
                 image.params.size(), " arguments, got ", args.size());
  for (size_t i = 0; i < args.size(); ++i)
    args[i].check(image.name, image.params[i].first, image.params[i].second);
}

Images::Images(std::vector<KernelImage> images) {
  for (KernelImage& image : images) {
    std::string name = image.name;
    bool is_new = kernels_.emplace(name, Loaded{.image = std::move(image)}).second;
    require(is_new, "two kernel images are named ", name);
  }
}

Images::~Images() {
#if CUDART_VERSION >= 12080
  for (auto& [name, loaded] : kernels_)
    if (loaded.library != nullptr) cudaLibraryUnload(loaded.library);
#endif
}

const Images::Loaded& Images::get(const std::string& name) const {
  auto found = kernels_.find(name);
  require(found != kernels_.end(), "there is no kernel image ", name, "; ", kernels_.size(),
          " were given. Images of another version? Compile them again");
  return found->second;
}

int Images::constant(const std::string& name, const std::string& constant) const {
  for (const auto& [key, value] : get(name).image.constants)
    if (key == constant) return value;
  throw InvalidArgument(concat("kernel image ", name, " was compiled without ", constant));
}

void Images::load(Loaded& loaded) {
#if CUDART_VERSION >= 12080
  cudaLibrary_t library = nullptr;
  const cudaError_t status = cudaLibraryLoadData(&library, loaded.image.code.data(), nullptr,
                                                 nullptr, 0, nullptr, nullptr, 0);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw Device(concat("cannot load kernel image ", loaded.image.name, ": ",
                        cudaGetErrorString(status), "; it may be of another GPU architecture"));
  }
  loaded.library = library;
  cudaKernel_t kernel = nullptr;
  QWEN_MOE_CUDA(cudaLibraryGetKernel(&kernel, library, loaded.image.symbol.c_str()));
  const void* function = reinterpret_cast<const void*>(kernel);  // the runtime takes both
  if (loaded.image.shared > (48 << 10))
    QWEN_MOE_CUDA(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       loaded.image.shared));
  loaded.kernel = function;
#else
  throw Device("kernel images need a build with CUDA 12.8 or later");
#endif
}

void Images::launch(cudaStream_t stream, const std::string& name, dim3 grid,
                    std::initializer_list<KernelArg> args) {
  auto& loaded = const_cast<Loaded&>(get(name));
  const std::vector<KernelArg> given(args);
  check_arguments(loaded.image, given);
  if (loaded.kernel == nullptr) load(loaded);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* no_scratch = nullptr;
  std::vector<void*> addresses;
  addresses.reserve(given.size() + static_cast<size_t>(loaded.image.scratch));
  for (const KernelArg& arg : given) addresses.push_back(arg.address());
  for (int i = 0; i < loaded.image.scratch; ++i) addresses.push_back(&no_scratch);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(loaded.image.warps) * 32);
  config.dynamicSmemBytes = static_cast<size_t>(loaded.image.shared);
  config.stream = stream;
  check(cudaLaunchKernelExC(&config, loaded.kernel, addresses.data()), name.c_str());
}

}  // namespace qwen_moe::cuda
