// Arguments of kernels that were compiled elsewhere: checked against their images, with no GPU.
#include <gtest/gtest.h>

#include "base/error.h"
#include "cuda/images.h"

namespace qwen_moe::cuda {
namespace {

KernelImage image() {
  return {.name = "one",
          .symbol = "one",
          .code = "not a cubin",
          .warps = 4,
          .params = {{"x", "*bf16"},
                     {"pages", "*i32/4"},
                     {"n", "i32/16"},
                     {"stride", "i64"},
                     {"eps", "fp32"}},
          .constants = {{"BM", 16}},
          .scratch = 2};
}

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }

void check(std::initializer_list<KernelArg> args) {
  std::vector<KernelParam> params;
  for (const auto& [name, type] : image().params) params.emplace_back(name, type);
  check_arguments("one", params, args);
}

void expect_refused(std::initializer_list<KernelArg> args, const std::string& why) {
  try {
    check(args);
    FAIL() << "accepted; expected: " << why;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
  }
}

TEST(Images, TakeArgumentsOfTheirTypes) {
  EXPECT_NO_THROW(check({at(32), at(36), 48, int64_t{7}, 1.0f}));
  EXPECT_NO_THROW(check({nullptr, at(4), -16, int64_t{-7}, 1.0f}));
  EXPECT_THROW(KernelParam("x", "u8"), Format);
}

TEST(Images, RefuseOtherArguments) {
  expect_refused({at(32), at(36), 48, int64_t{7}}, "takes 5 arguments, got 4");
  expect_refused({at(32), at(36), 48, 7, 1.0f}, "takes stride as an i64, got an i32");
  expect_refused({1, at(36), 48, int64_t{7}, 1.0f}, "takes x as a pointer, got an i32");
  expect_refused({at(32), at(36), 48, int64_t{7}, int64_t{1}}, "takes eps as an fp32, got an i64");
}

TEST(Images, RefuseWhatBreaksAPromise) {
  expect_refused({at(40), at(36), 48, int64_t{7}, 1.0f}, "compiled for x at a multiple of 16");
  expect_refused({at(32), at(38), 48, int64_t{7}, 1.0f}, "compiled for pages at a multiple of 4");
  expect_refused({at(32), at(36), 40, int64_t{7}, 1.0f}, "compiled for n a multiple of 16, got 40");
}

TEST(Images, NameWhatIsMissing) {
  Images images({image()});
  EXPECT_EQ(images.constant("one", "BM"), 16);
  EXPECT_THROW(images.constant("one", "BN"), InvalidArgument);
  EXPECT_THROW(images.launch(nullptr, "two", dim3(1), {}), InvalidArgument);
  EXPECT_THROW(images.launch(nullptr, "one", dim3(1), {at(32), at(36), 48, int64_t{7}, 1.0f}),
               Device);  // not a cubin
  EXPECT_THROW(Images({image(), image()}), InvalidArgument);
}

}  // namespace
}  // namespace qwen_moe::cuda
