// CRC-32 is the remainder of the bytes, read as a polynomial over GF(2), after division by
// kPolynomial. Bits are reversed: the highest one of a word is the coefficient of x^0.
#include "arena/checksum.h"

#include <algorithm>
#include <array>
#include <vector>

#include "arena/parallel.h"

namespace fastdistill::arena {
namespace {

constexpr uint32_t kPolynomial = 0xedb88320, kOne = 1u << 31, kX = 1u << 30;
constexpr int64_t kGroup = 1 << 20;  ///< bytes that one thread reads at a time
constexpr int kStretches = 4;        ///< parts of a group that are divided side by side
constexpr int kSlices = 8;           ///< bytes that are divided in one step

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ (a & 1 ? kPolynomial : 0); }

using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

/// tables[k][byte] is the remainder of `byte` with k bytes of zeros behind it.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t remainder = byte;
    for (int slice = 0; slice < kSlices; ++slice) {
      for (int bit = 0; bit < 8; ++bit) remainder = times_x(remainder);
      tables[slice][byte] = remainder;
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t load(const uint8_t* data) {
  return data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24;
}

/// The remainder of `crc` and the next kSlices bytes.
uint32_t step(uint32_t crc, const uint8_t* data) {
  uint32_t next = 0;
  for (int word = 0; word < kSlices / 4; ++word) {
    const uint32_t value = load(data + 4 * word) ^ (word == 0 ? crc : 0);
    for (int byte = 0; byte < 4; ++byte) {
      next ^= kTables[kSlices - 1 - 4 * word - byte][value >> 8 * byte & 0xff];
    }
  }
  return next;
}

/// CRC-32 of each of so many stretches of `bytes` that follow each other. Each step waits for the
/// one before, so several stretches at a time are faster than one.
template <int stretches>
void crc32(const uint8_t* data, int64_t bytes, uint32_t* results) {
  uint32_t crcs[stretches];
  std::fill_n(crcs, stretches, ~0u);
  int64_t done = 0;
  for (; done + kSlices <= bytes; done += kSlices) {
    for (int i = 0; i < stretches; ++i) crcs[i] = step(crcs[i], data + i * bytes + done);
  }
  for (; done < bytes; ++done) {
    for (int i = 0; i < stretches; ++i) {
      crcs[i] = (crcs[i] >> 8) ^ kTables[0][(crcs[i] ^ data[i * bytes + done]) & 0xff];
    }
  }
  for (int i = 0; i < stretches; ++i) results[i] = ~crcs[i];
}

uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a != 0; a <<= 1, b = times_x(b)) product ^= a & kOne ? b : 0;
  return product;
}

uint32_t power_of_x(int64_t exponent) {
  uint32_t result = kOne;
  for (uint32_t square = kX; exponent != 0; exponent >>= 1, square = multiply(square, square)) {
    if (exponent & 1) result = multiply(result, square);
  }
  return result;
}

}  // namespace

uint32_t checksum(const void* data, int64_t bytes, int64_t threads) {
  const auto* first = static_cast<const uint8_t*>(data);
  const int64_t groups = bytes / kGroup, rest = bytes % kGroup;
  std::vector<uint32_t> crcs(groups * kStretches + 1);
  parallel_for(groups + 1, threads, [&](int64_t i) {
    const uint8_t* const group = first + i * kGroup;
    uint32_t* const results = crcs.data() + i * kStretches;
    if (i < groups) crc32<kStretches>(group, kGroup / kStretches, results);
    else crc32<1>(group, rest, results);
  });
  // What stands before a stretch has that many more bytes behind it.
  const uint32_t shift = power_of_x(8 * kGroup / kStretches);
  uint32_t crc = 0;
  for (int64_t i = 0; i < groups * kStretches; ++i) crc = multiply(crc, shift) ^ crcs[i];
  return multiply(crc, power_of_x(8 * rest)) ^ crcs.back();
}

}  // namespace fastdistill::arena
