#include "model/packed_file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/crc32.h"
#include "base/error.h"

namespace qwen_moe {

// Few enough to be in the processor's cache still when they are summed.
constexpr size_t kBlock = size_t{256} << 10;

void PackedFile::read(std::byte* to, size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = pread(descriptor_, to, std::min(bytes, kBlock), offset_);
    if (got < 0 && errno == EINTR) continue;
    require<Format>(got >= 0, "it cannot be read: ", std::strerror(errno));
    require<Format>(got > 0, "the file ends within it");
    const auto count = static_cast<size_t>(got);
    crc32_ = qwen_moe::crc32(crc32_, to, count);
    to += count;
    bytes -= count;
    offset_ += got;
  }
}

}  // namespace qwen_moe
