// CRC-32 as zlib computes it (reflected polynomial 0xedb88320).
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_moe {

// Of `bytes` more after those that gave `crc`.
uint32_t crc32(uint32_t crc, const std::byte* data, size_t bytes);

// Of two runs one after the other, from the sum of each and the length of the second.
uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t second_bytes);

}  // namespace qwen_moe
