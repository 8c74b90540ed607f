// What the GPU's weight home stores is what the host's home stores, code by code, in the order of
// cuda/tile.cuh.
#include <cuda_fp16.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/pack.h"
#include "cuda/runtime.h"
#include "cuda/tile.cuh"
#include "engine/backend.h"

namespace qwen_moe::cuda {
namespace {

using Bytes = std::vector<std::byte>;

class CudaWeights : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) GTEST_SKIP() << "no GPU: " << cudaGetErrorString(status);
    if (count == 0) GTEST_SKIP() << "no GPU: the driver lists none";
    host_ = make_cpu_weight_home(2);
    home_ = make_cuda_weight_home(0, make_cpu_weight_home(2));
  }

  static Bytes read(const std::byte* device, size_t bytes) {
    Bytes host(bytes);
    QWEN_MOE_CUDA(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost));
    return host;
  }

  // Device memory full of a pattern that no packing leaves behind by chance.
  std::shared_ptr<std::byte> allocate(size_t bytes) {
    auto data = home_->allocate(bytes);
    QWEN_MOE_CUDA(cudaMemset(data.get(), 0xee, bytes));
    return data;
  }

  void copy(std::byte* to, const TensorSlot& slot, const std::byte* from, size_t bytes) {
    home_->copy_packed(
        to, slot,
        [&](std::byte* at, size_t count) {
          std::memcpy(at, from, count);
          from += count;
        },
        bytes);
  }

  std::shared_ptr<WeightHome> host_, home_;
};

TensorSlot matrix_slot(WeightFormat format, int n, int k, int count = 0, int group = 0) {
  TensorSlot slot{.fqn = "test.weight", .shape = {n, k}};
  if (count) slot.shape.insert(slot.shape.begin(), count);
  slot.spec = {.format = format, .n = n, .k = k, .count = count ? count : 1};
  if (is_quantized(format)) slot.spec.group = group ? group : group_for(k);
  return slot;
}

std::vector<float> random_source(const Shape& shape, uint32_t seed) {
  std::minstd_rand engine(seed);
  std::vector<float> values(static_cast<size_t>(num_elements(shape)));
  for (float& v : values)
    v = static_cast<float>(static_cast<int>(engine() % 20001) - 10000) * 1e-5f;
  return values;
}

uint16_t word_at(const std::byte* p) {
  uint16_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// The code of (output o, input k) of a tile: the signed one, or the bits of a bf16.
int host_code(const WeightSpec& spec, const std::byte* tile, int o, int k) {
  const std::byte* codes = tile + spec.scale_bytes();
  if (spec.format == WeightFormat::bf16) return word_at(codes + (k * kTile + o) * 2);
  const int step = spec.format == WeightFormat::int4 ? 8 : 4;
  const int word = word_at(codes + k / step * 64 + (2 * o + k % 2) * 2), part = k % step / 2;
  return spec.format == WeightFormat::int4 ? (word >> (4 * part) & 15) - 8
                                           : static_cast<int8_t>(word >> (8 * part));
}

int device_code(const WeightSpec& spec, const std::byte* tile, int o, int k) {
  const CodePlace place = code_place(spec.format, o, k);
  const std::byte* at = tile + spec.scale_bytes() + place.byte;
  if (spec.format == WeightFormat::bf16) return word_at(at);
  const int byte = static_cast<int>(*at);
  if (spec.format == WeightFormat::int8) return byte - 128;
  return (place.high_nibble ? byte >> 4 : byte & 15) - 8;
}

// The same tensor in host order, for cpu::unpack.
Bytes to_host_order(const WeightSpec& spec, const Bytes& device) {
  Bytes host(device.size());
  for (size_t at = 0; at < device.size(); at += spec.tile_bytes()) {
    const std::byte* from = device.data() + at;
    std::byte* codes = host.data() + at + spec.scale_bytes();
    std::memcpy(host.data() + at, from, spec.scale_bytes());
    for (int k = 0; k < spec.k; ++k) {
      for (int o = 0; o < kTile; ++o) {
        const int code = device_code(spec, from, o, k);
        if (spec.format == WeightFormat::bf16) {
          const auto bits = static_cast<uint16_t>(code);
          std::memcpy(codes + (k * kTile + o) * 2, &bits, 2);
          continue;
        }
        const bool int4 = spec.format == WeightFormat::int4;
        const int step = int4 ? 8 : 4, part = k % step / 2;
        std::byte* word = codes + k / step * 64 + (2 * o + k % 2) * 2;
        if (int4)
          word[part / 2] |= static_cast<std::byte>((code + 8) << (part % 2 * 4));
        else
          word[part] = static_cast<std::byte>(code);
      }
    }
  }
  return host;
}

void expect_same(const TensorSlot& slot, const Bytes& host, const Bytes& device) {
  const WeightSpec& spec = slot.spec;
  ASSERT_EQ(host.size(), device.size());
  for (size_t at = 0; at < host.size(); at += spec.tile_bytes()) {
    const std::byte *a = host.data() + at, *b = device.data() + at;
    ASSERT_EQ(std::memcmp(a, b, spec.scale_bytes()), 0)
        << "scales of tile " << at / spec.tile_bytes() << " of " << slot.describe();
    for (int k = 0; k < spec.k; ++k)
      for (int o = 0; o < kTile; ++o)
        ASSERT_EQ(host_code(spec, a, o, k), device_code(spec, b, o, k))
            << "tile " << at / spec.tile_bytes() << ", output " << o << ", input " << k << " of "
            << slot.describe();
  }
}

struct Case {
  TensorSlot slot;
  int64_t step;  // entries a piece
};

TEST_F(CudaWeights, HoldWhatTheHostHolds) {
  std::vector<Case> cases;
  for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
    cases.push_back({matrix_slot(format, 1, 64), 1});
    cases.push_back({matrix_slot(format, 37, 64), 16});
    cases.push_back({matrix_slot(format, 48, 192, 0, 64), 32});
    cases.push_back({matrix_slot(format, 200, 2048), 64});
    cases.push_back({matrix_slot(format, 65, 4096), 65});
    cases.push_back({matrix_slot(format, 24, 128, 5), 2});
    cases.push_back({matrix_slot(format, 40, 512, 3), 3});
  }
  // Longer than one chunk of 16 MiB: rows, experts in one piece, and one expert alone.
  cases.push_back({matrix_slot(WeightFormat::bf16, 2500, 4096), 2500});
  cases.push_back({matrix_slot(WeightFormat::int8, 1500, 4096, 4), 4});
  cases.push_back({matrix_slot(WeightFormat::bf16, 2100, 4096, 2), 2});
  uint32_t seed = 1;
  for (const auto& [slot, step] : cases) {
    const std::vector<float> source = random_source(slot.shape, seed++);
    const auto stored = allocate(slot.bytes());
    Bytes expected(slot.bytes());
    host_->pack(expected.data(), slot, {source.data(), DType::f32, slot.shape}, 0);
    Shape piece = slot.shape;
    const size_t each = source.size() / static_cast<size_t>(slot.shape[0]);
    for (int64_t first = 0; first < slot.shape[0]; first += step) {
      piece[0] = std::min(step, slot.shape[0] - first);
      home_->pack(stored.get(), slot,
                  {source.data() + static_cast<size_t>(first) * each, DType::f32, piece}, first);
    }
    expect_same(slot, expected, read(stored.get(), slot.bytes()));
    if (HasFailure()) return;
    // What the host packed already, in two pieces of whole units, ends as the same bytes.
    const auto copied = allocate(slot.bytes());
    const size_t unit = slot.unit().bytes, half = slot.bytes() / unit / 2 * unit;
    if (half > 0) copy(copied.get(), slot, expected.data(), half);
    copy(copied.get() + half, slot, expected.data() + half, slot.bytes() - half);
    EXPECT_EQ(read(copied.get(), slot.bytes()), read(stored.get(), slot.bytes()))
        << slot.describe();
  }
}

// The same values as bytes of another element type, cut off where they do not fit.
Bytes bytes_as(DType dtype, const std::vector<float>& values) {
  Bytes out(values.size() * dtype_size(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    const uint16_t half = dtype == DType::f16 ? __half_as_ushort(__float2half_rn(values[i]))
                                              : static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::f32)
      std::memcpy(out.data() + i * 4, &bits, 4);
    else
      std::memcpy(out.data() + i * 2, &half, 2);
  }
  return out;
}

TEST_F(CudaWeights, ArePackedToTheBytesOfTheHost) {
  const auto packer = make_cuda_packer(0, make_cpu_weight_home(2));
  EXPECT_EQ(packer->name(), host_->name());
  std::minstd_rand engine(3);
  std::normal_distribution<float> normal;
  std::vector<TensorSlot> slots;
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8, WeightFormat::bf16}) {
    if (is_quantized(format)) {
      for (int group : {32, 64, 128}) slots.push_back(matrix_slot(format, 37, 384, 3, group));
    } else {
      for (int k : {8, 64, 328}) slots.push_back(matrix_slot(format, 37, k, 3));
    }
    slots.push_back(matrix_slot(format, 1200, 4096));  // longer than a chunk
    slots.push_back(matrix_slot(format, 600, 4096, 3));
  }
  for (const TensorSlot& slot : slots) {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      // Usual weights; scales that are denormal in f16, weights that are in bf16, and none at all;
      // large ones; many ties.
      for (float size : {0.02f, 1e-6f, 1e-9f, 1e-39f, 0.0f, 6e3f, -1.0f}) {
        std::vector<float> values(static_cast<size_t>(num_elements(slot.shape)));
        for (float& v : values)
          v = size < 0 ? static_cast<float>(engine() % 15) - 7 : normal(engine) * size;
        const Bytes source = bytes_as(dtype, values);
        const TensorView view{source.data(), dtype, slot.shape};
        Bytes expected(slot.bytes(), std::byte{0xee}), found(slot.bytes(), std::byte{0xdd});
        host_->pack(expected.data(), slot, view, 0);
        packer->pack(found.data(), slot, view, 0);
        ASSERT_EQ(found, expected)
            << slot.describe() << " of " << dtype_name(dtype) << ", size " << size;
      }
    }
  }
}

TEST_F(CudaWeights, MayLieInPartsOfFiles) {
  const TensorSlot slot = matrix_slot(WeightFormat::int4, 600, 4096, 3);
  const size_t rows = size_t{600} * 4096;
  const Bytes source = bytes_as(DType::bf16, random_source(slot.shape, 11));
  Bytes expected(slot.bytes());
  host_->pack(expected.data(), slot, {source.data(), DType::bf16, slot.shape}, 0);
  // The last matrix first, at an odd place; then the others, the second in two parts.
  const auto file = std::shared_ptr<std::FILE>(std::tmpfile(), &std::fclose);
  const size_t each = rows * 2, cut = 12345;
  std::fputs("odd", file.get());
  std::fwrite(source.data() + 2 * each, 1, each, file.get());
  std::fwrite(source.data(), 1, 2 * each, file.get());
  std::fflush(file.get());
  const int descriptor = fileno(file.get());
  const auto at = [&](size_t offset) { return static_cast<int64_t>(3 + offset); };
  const FileParts files({{descriptor, at(each), each},
                         {descriptor, at(2 * each), cut},
                         {descriptor, at(2 * each + cut), each - cut},
                         {descriptor, at(0), each}});
  const auto stored = allocate(slot.bytes());
  home_->pack(stored.get(), slot, slot.entries(files, DType::bf16), 0);
  expect_same(slot, expected, read(stored.get(), slot.bytes()));
  // A file that ends before is named, and the home goes on working.
  ASSERT_EQ(ftruncate(descriptor, at(3 * each) - 1), 0);
  try {
    home_->pack(stored.get(), slot, slot.entries(files, DType::bf16), 0);
    FAIL() << "a file that ends before was read";
  } catch (const Format& error) {
    EXPECT_NE(std::string(error.what()).find("/"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("ends within"), std::string::npos) << error.what();
  }
  home_->pack(stored.get(), slot, {source.data(), DType::bf16, slot.shape}, 0);
  expect_same(slot, expected, read(stored.get(), slot.bytes()));
}

TEST_F(CudaWeights, RefuseWhatTheHostRefusesInItsWords) {
  const auto packer = make_cuda_packer(0, make_cpu_weight_home(2));
  // No weight, one whose scale does not fit f16, and one that bf16 rounds to infinity.
  for (auto [format, wrong] :
       {std::pair{WeightFormat::int4, INFINITY},
        {WeightFormat::int4, 1e6f},
        {WeightFormat::bf16, -INFINITY},
        {WeightFormat::bf16, std::bit_cast<float>(0x7fffffffu)},  // rounds to zero
        {WeightFormat::bf16, 3.4e38f}}) {
    const TensorSlot slot = matrix_slot(format, 32, 128);
    std::vector<float> values(32 * 128, 0.5f);
    values[20 * 128 + 3] = wrong;
    const TensorView view{values.data(), DType::f32, slot.shape};
    auto words = [&](WeightHome& home, std::byte* to) {
      try {
        home.pack(to, slot, view, 0);
      } catch (const Format& error) {
        return std::string(error.what());
      }
      return std::string("nothing");
    };
    Bytes packed(slot.bytes());
    const std::string expected = words(*host_, packed.data());
    EXPECT_NE(expected.find("test.weight"), std::string::npos) << expected;
    EXPECT_EQ(words(*packer, packed.data()), expected);
    EXPECT_EQ(words(*home_, allocate(slot.bytes()).get()), expected);
  }
}

TEST_F(CudaWeights, ThreadsMayCopyPartsOfOneTensorAtOnce) {
  const TensorSlot slot = matrix_slot(WeightFormat::int4, 1024, 2048, 16);
  const std::vector<float> source = random_source(slot.shape, 5);
  Bytes expected(slot.bytes());
  host_->pack(expected.data(), slot, {source.data(), DType::f32, slot.shape}, 0);
  const auto whole = allocate(slot.bytes()), parts = allocate(slot.bytes());
  copy(whole.get(), slot, expected.data(), slot.bytes());
  constexpr size_t kParts = 8;
  const size_t size = slot.bytes() / kParts;
  std::vector<std::thread> threads;
  for (size_t part = 0; part < kParts; ++part)
    threads.emplace_back(
        [&, at = part * size] { copy(parts.get() + at, slot, expected.data() + at, size); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(read(parts.get(), slot.bytes()), read(whole.get(), slot.bytes()));
  home_->settle();  // and goes on working
  copy(parts.get(), slot, expected.data(), slot.bytes());
  EXPECT_EQ(read(parts.get(), slot.bytes()), read(whole.get(), slot.bytes()));
}

TEST_F(CudaWeights, VectorsAreThoseOfTheHost) {
  for (TensorKind kind :
       {TensorKind::vector, TensorKind::one_plus, TensorKind::minus_exp, TensorKind::conv_taps}) {
    TensorSlot slot{.fqn = "test.vector", .shape = {48}, .kind = kind};
    if (kind == TensorKind::conv_taps) slot.shape = {48, 1, 4};
    const std::vector<float> source = random_source(slot.shape, 7);
    const auto stored = allocate(slot.bytes());
    Bytes expected(slot.bytes());
    const TensorView view{source.data(), DType::f32, slot.shape};
    host_->pack(expected.data(), slot, view, 0);
    home_->pack(stored.get(), slot, view, 0);
    EXPECT_EQ(read(stored.get(), slot.bytes()), expected);
    const auto copied = allocate(slot.bytes());
    copy(copied.get(), slot, expected.data(), slot.bytes());
    EXPECT_EQ(read(copied.get(), slot.bytes()), expected);
    host_->fill_random(expected.data(), slot, 3);
    home_->fill_random(stored.get(), slot, 3);
    EXPECT_EQ(read(stored.get(), slot.bytes()), expected);
  }
}

TEST_F(CudaWeights, RandomWeightsHaveTheDeviationAskedFor) {
  for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
    for (WeightRole role : {WeightRole::experts, WeightRole::embedding}) {
      TensorSlot slot = matrix_slot(format, 200, 576, 3);
      slot.role = role;
      const WeightSpec& spec = slot.spec;
      const auto stored = allocate(slot.bytes());
      auto filled = [&](uint64_t seed) {
        home_->fill_random(stored.get(), slot, seed);
        return read(stored.get(), slot.bytes());
      };
      const Bytes first = filled(1), again = filled(1), other = filled(2);
      EXPECT_EQ(first, again);
      EXPECT_NE(first, other);
      // Another expert is not the same one again.
      EXPECT_NE(std::memcmp(first.data(), first.data() + spec.matrix_bytes(), spec.matrix_bytes()),
                0);
      WeightSpec padded = spec;  // the rows of padding as well
      padded.n = spec.tiles() * kTile;
      const Bytes host = to_host_order(spec, first);
      std::vector<float> values(static_cast<size_t>(padded.n) * static_cast<size_t>(spec.k));
      double sum = 0, squares = 0;
      const double count = 3.0 * spec.n * spec.k;
      for (int expert = 0; expert < 3; ++expert) {
        cpu::unpack(values.data(), padded,
                    host.data() + spec.matrix_bytes() * static_cast<size_t>(expert));
        for (size_t i = 0; i < values.size(); ++i) {
          if (i >= static_cast<size_t>(spec.n) * static_cast<size_t>(spec.k)) {
            ASSERT_EQ(values[i], 0.0f) << "padding of " << slot.describe();
          }
          sum += values[i];
          squares += double{values[i]} * values[i];
        }
      }
      const double deviation = role == WeightRole::embedding ? 1.0 : 1.0 / std::sqrt(spec.k);
      EXPECT_NEAR(std::sqrt(squares / count), deviation, 0.1 * deviation) << slot.describe();
      EXPECT_NEAR(sum / count, 0.0, 0.02 * deviation) << slot.describe();
    }
  }
}

TEST_F(CudaWeights, RefuseWhatTheKernelsCannotTake) {
  const std::vector<float> source(64 * 64, 0.5f);
  const auto stored = allocate(64 * 64 * 4);
  auto refused = [&](const TensorSlot& slot, int64_t first, int64_t entries) {
    Shape piece = slot.shape;
    piece[0] = entries;
    try {
      home_->pack(stored.get(), slot, {source.data(), DType::f32, piece}, first);
    } catch (const Error& e) {
      return std::string(e.what()).find(slot.fqn) != std::string::npos;
    }
    return false;
  };
  EXPECT_TRUE(refused(matrix_slot(WeightFormat::f16, 16, 64), 0, 16));
  EXPECT_TRUE(refused(matrix_slot(WeightFormat::f32, 16, 64), 0, 16));
  EXPECT_TRUE(refused(matrix_slot(WeightFormat::int8, 16, 96), 0, 16));
  EXPECT_TRUE(refused(matrix_slot(WeightFormat::int4, 32, 64), 8, 16));
  EXPECT_TRUE(refused(matrix_slot(WeightFormat::int4, 16, 128, 0, 32), 0, 16));
  EXPECT_TRUE(refused(matrix_slot(WeightFormat::int8, 16, 256, 0, 256), 0, 16));
  TensorSlot offsets = matrix_slot(WeightFormat::int4, 16, 64);
  offsets.spec.has_zero = true;
  EXPECT_TRUE(refused(offsets, 0, 16));
  const TensorSlot taps{.fqn = "test.conv", .shape = {32, 1, 4}, .kind = TensorKind::conv_taps};
  EXPECT_TRUE(refused(taps, 0, 16));
  EXPECT_FALSE(refused(matrix_slot(WeightFormat::int4, 32, 64), 16, 16));
  // A broken weight is refused by its tensor's name, and the home goes on working.
  std::vector<float> broken(16 * 64, std::nanf(""));
  const TensorSlot slot = matrix_slot(WeightFormat::int4, 16, 64);
  EXPECT_THROW(home_->pack(stored.get(), slot, {broken.data(), DType::f32, slot.shape}, 0), Format);
  EXPECT_FALSE(refused(slot, 0, 16));
}

TEST_F(CudaWeights, NameTheDevice) {
  EXPECT_EQ(home_->name(), "cuda:0");
  EXPECT_THROW(make_cuda_weight_home(1000, host_), Device);
}

}  // namespace
}  // namespace qwen_moe::cuda
