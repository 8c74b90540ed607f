// Bytes of a tensor that lie in files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace qwen_moe {

// Packed bytes: reads on from an offset and keeps the CRC-32 of what it gave.
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

// A run of bytes in an open file.
struct FilePart {
  int descriptor;
  int64_t offset;
  size_t bytes;
};

// Weights as a checkpoint holds them: one run after the other, maybe of several files.
class FileParts {
 public:
  explicit FileParts(std::vector<FilePart> parts) : parts_(std::move(parts)) {}

  size_t bytes() const;
  // Bytes [at, at + bytes) of all of them, as often as asked for, on any thread. Throws Format
  // naming the file that ends before or cannot be read.
  void read(std::byte* to, size_t at, size_t bytes) const;

 private:
  std::vector<FilePart> parts_;
};

}  // namespace qwen_moe
