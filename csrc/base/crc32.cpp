#include "base/crc32.h"

#include <array>
#include <cstring>

namespace qwen_moe {
namespace {

constexpr uint32_t kPolynomial = 0xedb88320u;

// tables[t][b]: what byte b does to the sum, followed by t zero bytes.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t sum = b;
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? kPolynomial : 0);
    tables[0][b] = sum;
  }
  for (size_t t = 1; t < 8; ++t)
    for (size_t b = 0; b < 256; ++b)
      tables[t][b] = tables[t - 1][b] >> 8 ^ tables[0][tables[t - 1][b] & 255];
  return tables;
}();

// Eight bytes a step. The sum is the inverted one, as it runs.
uint32_t by_table(uint32_t sum, const std::byte* p, size_t bytes) {
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    word ^= sum;
    sum = 0;
    for (size_t i = 0; i < 8; ++i) sum ^= kTables[7 - i][word >> (8 * i) & 255];
  }
  for (; bytes > 0; --bytes, ++p)
    sum = sum >> 8 ^ kTables[0][(sum ^ static_cast<uint32_t>(*p)) & 255];
  return sum;
}

#ifdef __x86_64__
typedef long long Pair __attribute__((vector_size(16)));  // 128 bits of a polynomial

// By carry-less products: "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction" (Intel, 2009). Four registers of 16 bytes are folded over 64 bytes a step; what they
// hold at the end goes through the tables.
constexpr size_t kFold = 64;

__attribute__((target("pclmul"))) inline Pair folded(Pair x, Pair by, Pair next) {
  return __builtin_ia32_pclmulqdq128(x, by, 0x00) ^ __builtin_ia32_pclmulqdq128(x, by, 0x11) ^ next;
}

__attribute__((target("pclmul"))) uint32_t by_products(uint32_t sum, const std::byte* p,
                                                       size_t bytes) {
  // x^(512 + 32) and x^(512 - 32), then x^(128 + 32) and x^(128 - 32), modulo the polynomial.
  const Pair over64 = {0x0154442bd4, 0x01c6e41596}, over16 = {0x01751997d0, 0x00ccaa009e};
  const auto load = [p](size_t at) {
    Pair x;
    std::memcpy(&x, p + at, sizeof(x));
    return x;
  };
  Pair x[4];
  for (size_t i = 0; i < 4; ++i) x[i] = load(16 * i);
  x[0] ^= Pair{sum, 0};
  size_t at = kFold;
  for (; at + kFold <= bytes; at += kFold)
    for (size_t i = 0; i < 4; ++i) x[i] = folded(x[i], over64, load(at + 16 * i));
  Pair all = x[0];
  for (size_t i = 1; i < 4; ++i) all = folded(all, over16, x[i]);
  std::byte rest[16];
  std::memcpy(rest, &all, sizeof(rest));
  return by_table(by_table(0, rest, sizeof(rest)), p + at, bytes - at);
}

const bool kHasProducts = __builtin_cpu_supports("pclmul") != 0;
#endif

// Product of two polynomials of degree below 32, bit 31 the constant term.
uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (; a != 0; a <<= 1) {
    if (a >> 31) sum ^= b;
    b = b >> 1 ^ (b & 1 ? kPolynomial : 0);
  }
  return sum;
}

}  // namespace

uint32_t crc32(uint32_t crc, const std::byte* data, size_t bytes) {
#ifdef __x86_64__
  if (kHasProducts && bytes >= kFold) return ~by_products(~crc, data, bytes);
#endif
  return ~by_table(~crc, data, bytes);
}

uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t second_bytes) {
  uint32_t shift = 1u << 31, square = 1u << 23;  // 1, and x^8: what a byte shifts by
  for (; second_bytes != 0; second_bytes >>= 1, square = product(square, square))
    if (second_bytes & 1) shift = product(shift, square);
  return product(first, shift) ^ second;
}

}  // namespace qwen_moe
