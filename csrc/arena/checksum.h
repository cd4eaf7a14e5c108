// The checksum of a range. Free of Python and torch.
#pragma once

#include <cstdint>

namespace fastdistill::arena {

/// CRC-32 of so many bytes, as zlib's crc32 gives it, on at most `threads` threads.
uint32_t checksum(const void* data, int64_t bytes, int64_t threads);

}  // namespace fastdistill::arena
