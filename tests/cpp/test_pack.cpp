// Packing, formats, recipes and the thread pool.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"
#include "formats.h"

namespace qwen_moe::cpu {
namespace {

TEST(Pack, DenseIsExactAndRounds) {
  const Floats x = random_floats(37 * 67, 1, 0.05f);
  for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16}) {
    const WeightSpec spec{format, 37, 67};
    Floats expected = x, got(x.size());
    std::vector<uint16_t> halves;
    for (float& v : expected) {
      if (format == WeightFormat::f16) halves.push_back(f16_of(v)), v = f16_value(halves.back());
      if (format == WeightFormat::bf16) halves.push_back(bf16_of(v)), v = bf16_value(halves.back());
    }
    std::vector<std::byte> from_f32(spec.matrix_bytes()), from_same(spec.matrix_bytes());
    pack_tiles(from_f32.data(), spec, x.data(), DType::f32, 0, 3);
    unpack(got.data(), spec, from_f32.data());
    EXPECT_EQ(got, expected) << format_name(format);
    if (format == WeightFormat::f32) continue;
    const DType dtype = format == WeightFormat::f16 ? DType::f16 : DType::bf16;
    pack_tiles(from_same.data(), spec, halves.data(), dtype, 2, 3);
    pack_tiles(from_same.data(), spec, halves.data(), dtype, 0, 2);
    EXPECT_EQ(from_same, from_f32);
  }
}

TEST(Pack, QuantizedLayoutAndError) {
  // Integers up to the largest code with scale 1 come back exactly, from the places quant.h names.
  for (bool int4 : {true, false}) {
    const WeightSpec spec{int4 ? WeightFormat::int4 : WeightFormat::int8, 20, 64, 1, 32};
    Floats x(20 * 64), got(x.size());
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(int4          ? i % 32 == 3 ? -8 : static_cast<int>(i * 7 % 16) - 8
                                : i % 32 == 3 ? 127
                                              : static_cast<int>(i * 37 % 255) - 127);
    std::vector<std::byte> packed(spec.matrix_bytes(), std::byte{0xee});
    pack_tiles(packed.data(), spec, x.data(), DType::f32, 0, 2);
    unpack(got.data(), spec, packed.data());
    EXPECT_EQ(got, x);
    for (size_t o = 0; o < 20; ++o) {
      for (size_t i = 0; i < 64; ++i) {
        const std::byte* codes = &packed[o / 16 * spec.tile_bytes() + spec.scale_bytes()];
        const size_t lane = o % 16 * 2 + i % 2;
        if (int4) {
          const int byte = static_cast<int>(codes[i / 8 * 64 + lane * 2 + i % 8 / 4]);
          ASSERT_EQ((byte >> (i % 4 / 2 * 4) & 15) - 8, x[o * 64 + i]) << o << " " << i;
        } else {
          const std::byte byte = codes[i / 4 * 64 + lane * 2 + i % 4 / 2];
          ASSERT_EQ(static_cast<int8_t>(byte), x[o * 64 + i]) << o << " " << i;
        }
      }
    }
  }
  for (int group : {32, 64, 128}) {
    for (bool int4 : {true, false}) {
      for (float std : {0.03f, 1e-6f, 100.0f}) {
        const WeightSpec spec{int4 ? WeightFormat::int4 : WeightFormat::int8, 19, 256, 1, group};
        const Floats x = random_floats(19 * 256, 5, std);
        Floats got(x.size());
        std::vector<std::byte> packed(spec.matrix_bytes());
        pack_tiles(packed.data(), spec, x.data(), DType::f32, 0, 2);
        unpack(got.data(), spec, packed.data());
        const size_t step = static_cast<size_t>(group);
        double total = 0, plain_total = 0;
        for (size_t b = 0; b < x.size(); b += step) {
          double top = 0, error = 0, plain = 0;
          for (size_t i = b; i < b + step; ++i) top = std::max(top, std::fabs(double{x[i]}));
          const double s = top / (int4 ? 7 : 127);
          for (size_t i = b; i < b + step; ++i) {
            const double miss = std::fabs(double{got[i]} - x[i]);
            // 2^-24 is the step of the smallest f16 scales.
            ASSERT_LE(miss, int4 ? 2 * s + 0x1p-22 : s * 0.5 + top / 2000 + 0x1p-24) << i;
            error += miss * miss;
            plain += std::pow(s * std::nearbyint(x[i] / s) - x[i], 2);
          }
          total += error;
          plain_total += plain;
        }
        if (!int4) continue;
        if (std > 1e-5f) {
          EXPECT_LT(total, 0.9 * plain_total);
        }
        EXPECT_LT(std::sqrt(total / static_cast<double>(x.size())), std * 0.14);
      }
    }
  }
}

TEST(Pack, CodedStaysAsItIs) {
  struct Coded {
    int16_t code;
    uint16_t scale;
  };
  for (bool int4 : {true, false}) {
    const WeightSpec spec{int4 ? WeightFormat::int4 : WeightFormat::int8, 21, 128, 1, 64};
    std::vector<Coded> x(21 * 128);
    Floats expected(x.size()), got(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const int code =
          int4 ? static_cast<int>(i * 7 % 16) - 8 : static_cast<int>(i * 37 % 256) - 128;
      x[i] = {static_cast<int16_t>(code), f16_of(0.01f * (i / 64 % 2 ? -1.0f : 1.5f))};
      expected[i] = static_cast<float>(code) * f16_value(x[i].scale);
    }
    std::vector<std::byte> packed(spec.matrix_bytes(), std::byte{0xee});
    const auto pack = [&](const WeightSpec& to) {
      pack_tiles(packed.data(), to, x.data(), DType::coded, 0, 2);
    };
    pack(spec);
    unpack(got.data(), spec, packed.data());
    EXPECT_EQ(got, expected);
    EXPECT_THROW(pack({WeightFormat::bf16, 21, 128}), InvalidArgument);
    WeightSpec wide = spec;
    wide.group = 128;
    EXPECT_THROW(pack(wide), Format);  // two scales in a group
    x[77].code = int4 ? 8 : 128;
    EXPECT_THROW(pack(spec), Format);
    x[77].code = 0;
    for (size_t i = 64; i < 128; ++i) x[i].scale = 0x7c00;
    EXPECT_THROW(pack(spec), Format);
  }
}

TEST(Pack, RefusesWhatItCannotKeep) {
  Floats x(16 * 64, 1.0f);
  std::vector<std::byte> packed(1 << 16);
  const WeightSpec int8{WeightFormat::int8, 16, 64, 1, 32}, f16{WeightFormat::f16, 16, 64};
  const WeightSpec zero{WeightFormat::int4, 16, 64, 1, 32, true};
  const WeightSpec group{WeightFormat::int4, 16, 64, 1, 48};
  const auto pack = [&](const WeightSpec& s) {
    pack_tiles(packed.data(), s, x.data(), DType::f32, 0, 1);
  };
  pack(int8);
  EXPECT_THROW(pack(zero), InvalidArgument);
  EXPECT_THROW(pack(group), InvalidArgument);
  for (float bad : {kNan, kInf, 1e30f}) {
    x[77] = bad;
    EXPECT_THROW(pack(int8), Format);
    EXPECT_THROW(pack(f16), Format);
  }
}

TEST(Pack, FillRandom) {
  const std::vector<WeightSpec> specs = {
      {WeightFormat::bf16, 90, 256},        {WeightFormat::f32, 90, 256},
      {WeightFormat::f16, 90, 256},         {WeightFormat::int8, 90, 256, 1, 64},
      {WeightFormat::int4, 90, 256, 1, 64}, {WeightFormat::int4, 90, 256, 1, 64, true}};
  for (const WeightSpec& spec : specs) {
    SCOPED_TRACE(label(spec));
    const auto whole = random_weight(spec);
    std::vector<std::byte> parts(whole.size(), std::byte{1});
    fill_random(parts.data(), spec, 7, 0.05f, 3, spec.tiles());
    fill_random(parts.data(), spec, 7, 0.05f, 0, 3);
    EXPECT_EQ(whole, parts);
    EXPECT_NE(whole, random_weight(spec, 8));
    Floats w(90 * 256);
    unpack(w.data(), spec, whole.data());
    double sum = 0, square = 0;
    for (float v : w) sum += v, square += double{v} * v;
    EXPECT_NEAR(sum / 23040, 0, 0.002);
    EXPECT_NEAR(std::sqrt(square / 23040), 0.05, 0.002);
  }
}

TEST(Quant, SpecsAndRecipes) {
  const WeightSpec spec{WeightFormat::int4, 17, 96, 3, 32, true};
  EXPECT_EQ(spec.tiles(), 2);
  EXPECT_EQ(spec.scale_bytes(), 128u);  // 96 padded
  EXPECT_EQ(spec.tile_bytes(), 2 * 128u + 16 * 96 / 2);
  EXPECT_EQ(spec.bytes(), 3 * 2 * spec.tile_bytes());
  EXPECT_EQ(group_for(2048), 128);
  EXPECT_EQ(group_for(192), 64);
  EXPECT_EQ(group_for(96), 32);
  EXPECT_EQ(group_for(100), 0);
  EXPECT_EQ(group_for(2048, 64), 64);
  EXPECT_EQ(group_for(2048, 63), 32);
  for (const char* name : {"none", "int8", "int4", "int4-all"})
    EXPECT_EQ(recipe_name(parse_recipe(name)), name);
  EXPECT_THROW(parse_recipe("int3"), InvalidArgument);
  EXPECT_THROW(dense_format(DType::i32), InvalidArgument);
  const auto bf16 = WeightFormat::bf16;
  EXPECT_EQ(choose_format(Recipe::int4_all, WeightRole::embedding, bf16), bf16);
  EXPECT_EQ(choose_format(Recipe::int4_all, WeightRole::exact, bf16), bf16);
  EXPECT_EQ(choose_format(Recipe::none, WeightRole::experts, bf16), bf16);
  EXPECT_EQ(choose_format(Recipe::int8, WeightRole::lm_head, bf16), WeightFormat::int8);
  EXPECT_EQ(choose_format(Recipe::int4, WeightRole::out_proj, bf16), WeightFormat::int8);
  EXPECT_EQ(choose_format(Recipe::int4, WeightRole::shared_expert, bf16), WeightFormat::int8);
  EXPECT_EQ(choose_format(Recipe::int4, WeightRole::experts, bf16), WeightFormat::int4);
  EXPECT_EQ(choose_format(Recipe::int4_all, WeightRole::out_proj, bf16), WeightFormat::int4);
}

TEST(ThreadPool, EveryIndexOnceFromSeveralCallers) {
  for (int threads : {1, 2, 4, 7}) {
    const auto pool = ThreadPool::shared(threads);
    EXPECT_EQ(pool->size(), threads);
    EXPECT_EQ(pool, ThreadPool::shared(threads));
    std::vector<std::thread> callers;
    std::atomic<int> inside{0}, bad{0};
    for (int caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&, caller] {
        for (int job = 0; job < 300; ++job) {
          const int count = (job * 7 + caller) % 23;
          std::vector<int> hits(static_cast<size_t>(count));  // plain: ordered by run() itself
          std::vector<int> last(static_cast<size_t>(threads), 0);
          pool->run(count, [&](int index, int worker) {
            if (index == 0 && inside.fetch_add(1) != 0) ++bad;  // jobs never overlap
            ++hits[static_cast<size_t>(index)];
            ++last[static_cast<size_t>(worker)];  // a worker does one thing at a time
            if (index == 0) inside.fetch_sub(1);
          });
          if (std::count(hits.begin(), hits.end(), 1) != count) ++bad;
          if (std::accumulate(last.begin(), last.end(), 0) != count) ++bad;
          if (job % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(bad, 0);
  }
  EXPECT_THROW(ThreadPool(0), InvalidArgument);
}

}  // namespace
}  // namespace qwen_moe::cpu
