// Decodes blocks of Huffman codes (microglia.compress.entropy). Four blocks run side by side, so that the table look-up of one
// hides that of another; a look-up gives up to three symbols.
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::huffman {
namespace {

constexpr int lanes = 4, most = 3;   // symbols of one look-up
constexpr int room = 16;             // symbols that must be left: four look-ups, each of which writes four bytes
constexpr int longest_code = 15;

// What the next bits say, in four bytes, so that a table of 2^12 fits in half of the nearest cache: the symbols, the first in
// the low byte; then how many bits they take (4 bits), and how many they are (2 bits).
using Entry = uint32_t;
inline uint32_t bits_of(Entry entry) { return entry >> 24 & 15; }
inline uint32_t count_of(Entry entry) { return entry >> 28; }

struct Lane {
  uint64_t bit;  // place of the next code in all the data
  uint8_t *out, *end;
};

// The 57 bits or more from a place on, in the high bits. It reads eight bytes.
inline uint64_t bits_at(const uint8_t* data, uint64_t bit) {
  uint64_t word;
  std::memcpy(&word, data + (bit >> 3), 8);
  return __builtin_bswap64(word) << (bit & 7);
}

// As bits_at, where fewer than eight bytes may be left: those behind the end are 0.
inline uint64_t last_bits_at(const uint8_t* data, uint64_t bytes, uint64_t bit) {
  uint64_t word = 0;
  for (uint64_t place = bit >> 3, index = 0; index < 8; ++index) {
    word = word << 8 | (place + index < bytes ? data[place + index] : 0);
  }
  return word << (bit & 7);
}

std::vector<Entry> several(const uint16_t* single, int longest) {
  const uint32_t size = uint32_t{1} << longest;
  std::vector<Entry> table(size);
  for (uint32_t window = 0; window < size; ++window) {
    uint32_t symbols = 0, bits = 0, count = 0;
    while (count < most) {
      const uint32_t next = single[(window << bits) & (size - 1)], length = next >> 8;
      if (bits + length > static_cast<uint32_t>(longest)) break;
      symbols |= (next & 255) << (8 * count++);
      bits += length;
    }
    table[window] = symbols | bits << 24 | count << 28;
  }
  return table;
}

template <int steps>  // look-ups of one read: steps * longest bits are at most 57
void together(const uint8_t* data, uint64_t bytes, const Entry* table, int longest, Lane* all, int count) {
  const int shift = 64 - longest;
  const auto ready = [&](const Lane& lane) { return lane.end - lane.out >= room && (lane.bit >> 3) + 8 <= bytes; };
  const auto step = [&](Lane& lane) {
    uint64_t word = bits_at(data, lane.bit);
    uint64_t used = 0;
    for (int look = 0; look < steps; ++look) {
      const Entry entry = table[word >> shift];
      std::memcpy(lane.out, &entry, 4);  // what is written behind the symbols is written over by the next
      lane.out += count_of(entry);
      word <<= bits_of(entry);
      used += bits_of(entry);
    }
    lane.bit += used;
  };
  if (count == lanes) {
    Lane a = all[0], b = all[1], c = all[2], d = all[3];
    while (ready(a) && ready(b) && ready(c) && ready(d)) {
      step(a);
      step(b);
      step(c);
      step(d);
    }
    all[0] = a;
    all[1] = b;
    all[2] = c;
    all[3] = d;
  }
  for (int index = 0; index < count; ++index) {
    while (ready(all[index])) step(all[index]);
  }
}

}  // namespace
}  // namespace microglia::huffman

MG_EXPORT int mg_huffman_decode(const uint8_t* data, int64_t bytes, const uint16_t* sizes, int64_t blocks, int64_t block,
                                const uint16_t* single, int32_t longest, uint8_t* symbols, int64_t count) {
  using namespace microglia::huffman;
  if (bytes < 0 || blocks < 0 || block < 1 || count < 0 || longest < 1 || longest > longest_code ||
      blocks != (count + block - 1) / block) {
    return MG_BAD_SIZE;
  }
  if (count == 0) return MG_OK;
  if (!data || !sizes || !single || !symbols) return MG_BAD_POINTER;
  for (int64_t window = 0; window < (int64_t{1} << longest); ++window) {
    if (single[window] >> 8 < 1 || single[window] >> 8 > longest) return MG_BAD_LIST;
  }
  int64_t total = 0;
  for (int64_t index = 0; index < blocks; ++index) total += sizes[index];
  if (total != bytes) return MG_BAD_SIZE;
  const std::vector<Entry> table = several(single, longest);
  const uint64_t size = static_cast<uint64_t>(bytes);
  uint64_t begin = 0;
  for (int64_t first = 0; first < blocks; first += lanes) {
    Lane all[lanes];
    uint64_t ends[lanes];
    const int here = static_cast<int>(blocks - first < lanes ? blocks - first : lanes);
    for (int index = 0; index < here; ++index) {
      const int64_t from = (first + index) * block, to = from + block < count ? from + block : count;
      all[index] = {8 * begin, symbols + from, symbols + to};
      begin += sizes[first + index];
      ends[index] = begin;
    }
    if (longest <= 14) {
      together<4>(data, size, table.data(), longest, all, here);
    } else {
      together<3>(data, size, table.data(), longest, all, here);
    }
    for (int index = 0; index < here; ++index) {
      Lane& lane = all[index];
      while (lane.out < lane.end && lane.bit < 8 * size) {
        const bool inside = (lane.bit >> 3) + 8 <= size;
        const uint64_t word = inside ? bits_at(data, lane.bit) : last_bits_at(data, size, lane.bit);
        const uint16_t next = single[word >> (64 - longest)];
        *lane.out++ = static_cast<uint8_t>(next & 255);
        lane.bit += next >> 8;
      }
      const uint64_t end = 8 * ends[index];
      if (lane.out < lane.end || lane.bit > end || end - lane.bit > 7) return MG_BAD_LIST;
      if (end > lane.bit && (data[ends[index] - 1] & ((1u << (end - lane.bit)) - 1))) return MG_BAD_LIST;
    }
  }
  return MG_OK;
}
