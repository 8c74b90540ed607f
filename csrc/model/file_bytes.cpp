#include "model/file_bytes.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/crc32.h"
#include "base/error.h"

namespace qwen_moe {
namespace {

// Few enough to be in the processor's cache still when they are summed.
constexpr size_t kBlock = size_t{256} << 10;

// Some bytes, at most `bytes`.
size_t read_some(int descriptor, std::byte* to, size_t bytes, int64_t offset) {
  ssize_t got;
  do got = pread(descriptor, to, bytes, offset);
  while (got < 0 && errno == EINTR);
  require<Format>(got >= 0, "it cannot be read: ", std::strerror(errno));
  require<Format>(got > 0, "the file ends within it");
  return static_cast<size_t>(got);
}

std::string path_of(int descriptor) {
  std::array<char, 4096> path;
  const std::string link = concat("/proc/self/fd/", descriptor);
  const ssize_t length = readlink(link.c_str(), path.data(), path.size());
  return length > 0 ? std::string(path.data(), static_cast<size_t>(length)) : link;
}

}  // namespace

void PackedFile::read(std::byte* to, size_t bytes) {
  while (bytes > 0) {
    const size_t got = read_some(descriptor_, to, std::min(bytes, kBlock), offset_);
    crc32_ = qwen_moe::crc32(crc32_, to, got);
    to += got;
    bytes -= got;
    offset_ += static_cast<int64_t>(got);
  }
}

size_t FileParts::bytes() const {
  size_t total = 0;
  for (const FilePart& part : parts_) total += part.bytes;
  return total;
}

void FileParts::read(std::byte* to, size_t at, size_t bytes) const {
  for (const FilePart& part : parts_) {
    if (at >= part.bytes) {
      at -= part.bytes;
      continue;
    }
    try {
      for (; at < part.bytes && bytes > 0;) {
        const size_t got = read_some(part.descriptor, to, std::min(bytes, part.bytes - at),
                                     part.offset + static_cast<int64_t>(at));
        to += got;
        at += got;
        bytes -= got;
      }
    } catch (const Format& error) {
      throw Format(concat(path_of(part.descriptor), ": ", error.what()));
    }
    if (bytes == 0) return;
    at = 0;
  }
  require(bytes == 0, bytes, " bytes were asked for behind the last part");
}

}  // namespace qwen_moe
