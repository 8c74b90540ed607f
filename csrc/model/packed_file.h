// Packed bytes of a tensor that lie in a file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_moe {

// Reads on from an offset; keeps the CRC-32 of what it gave.
class PackedFile {
 public:
  PackedFile(int descriptor, int64_t offset) : descriptor_(descriptor), offset_(offset) {}

  // The next `bytes`. Throws Format when the file ends before, or cannot be read.
  void read(std::byte* to, size_t bytes);
  uint32_t crc32() const { return crc32_; }

 private:
  int descriptor_;
  int64_t offset_;
  uint32_t crc32_ = 0;
};

}  // namespace qwen_moe
