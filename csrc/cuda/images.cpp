#include "cuda/images.h"

#include <array>
#include <utility>

#include "cuda/runtime.h"

namespace qwen_moe::cuda {

namespace {

constexpr size_t kMostArguments = 32;

const char* kind_name(KernelArg::Kind kind) {
  switch (kind) {
    case KernelArg::Kind::pointer: return "a pointer";
    case KernelArg::Kind::i32: return "an i32";
    case KernelArg::Kind::i64: return "an i64";
    case KernelArg::Kind::fp32: return "an fp32";
  }
  return "";
}

}  // namespace

int64_t KernelArg::value() const {
  switch (kind_) {
    case Kind::pointer: return reinterpret_cast<intptr_t>(value_.pointer);
    case Kind::i32: return value_.i32;
    case Kind::i64: return value_.i64;
    case Kind::fp32: return 0;
  }
  return 0;
}

KernelParam::KernelParam(std::string parameter, const std::string& type)
    : name(std::move(parameter)), kind(KernelArg::Kind::pointer), multiple(1) {
  const size_t slash = type.find('/');
  const std::string base = type.substr(0, slash);
  if (base == "i32")
    kind = KernelArg::Kind::i32;
  else if (base == "i64")
    kind = KernelArg::Kind::i64;
  else if (base == "fp32")
    kind = KernelArg::Kind::fp32;
  else
    require<Format>(base.starts_with('*'), "kernel parameter ", name, " has type ", type,
                    ", expected a pointer, i32, i64 or fp32");
  if (slash != std::string::npos)
    multiple = std::stoi(type.substr(slash + 1));
  else if (kind == KernelArg::Kind::pointer)
    multiple = 16;
}

void check_arguments(const std::string& kernel, const std::vector<KernelParam>& params,
                     std::initializer_list<KernelArg> args) {
  require<Error>(args.size() == params.size(), "kernel ", kernel, " takes ", params.size(),
                 " arguments, got ", args.size());
  const KernelArg* arg = args.begin();
  for (const KernelParam& param : params) {
    require<Error>(arg->kind() == param.kind, "kernel ", kernel, " takes ", param.name, " as ",
                   kind_name(param.kind), ", got ", kind_name(arg->kind()));
    require<Error>(arg->value() % param.multiple == 0, "kernel ", kernel, " was compiled for ",
                   param.name, param.kind == KernelArg::Kind::pointer ? " at" : "",
                   " a multiple of ", param.multiple, ", got ", arg->value());
    ++arg;
  }
}

Images::Images(std::vector<KernelImage> images) {
  for (KernelImage& image : images) {
    std::string name = image.name;
    std::vector<KernelParam> params;
    for (const auto& [parameter, type] : image.params) params.emplace_back(parameter, type);
    const size_t arguments = params.size() + static_cast<size_t>(image.scratch);
    require<Format>(arguments <= kMostArguments, "kernel image ", name, " takes ", arguments,
                    " arguments, at most ", kMostArguments, " are supported");
    bool is_new =
        kernels_.emplace(name, Loaded{.image = std::move(image), .params = std::move(params)})
            .second;
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
  check_arguments(name, loaded.params, args);
  if (loaded.kernel == nullptr) load(loaded);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* no_scratch = nullptr;
  std::array<void*, kMostArguments> addresses;
  size_t count = 0;
  for (const KernelArg& arg : args) addresses[count++] = arg.address();
  for (int i = 0; i < loaded.image.scratch; ++i) addresses[count++] = &no_scratch;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(loaded.image.warps) * 32);
  config.dynamicSmemBytes = static_cast<size_t>(loaded.image.shared);
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = loaded.image.overlaps ? 1 : 0;
  check(cudaLaunchKernelExC(&config, loaded.kernel, addresses.data()), name.c_str());
}

}  // namespace qwen_moe::cuda
