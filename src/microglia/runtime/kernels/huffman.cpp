// Decodes blocks of Huffman codes (microglia.compress.entropy). Four blocks run side by side, so that the table look-up of one
// hides that of another; a look-up gives up to six symbols, and no bounds are checked between look-ups that are safe together.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::huffman {
namespace {

constexpr int lanes = 4, most = 6;  // symbols of one look-up
constexpr int room = 8;             // bytes that a look-up writes
constexpr int longest_code = 15;
constexpr int usual_window = 11;    // bits of a look-up where codes are not longer: the table takes half of the nearest cache
constexpr int64_t few = 4096;       // symbols for which a larger table than necessary does not pay

// What the next bits say: in the low byte how many bits its symbols take, so that a shift by it needs no mask; then how many
// they are; then the symbols, the first in the lowest byte.
using Entry = uint64_t;

struct Lane {
  const uint8_t* in;  // where the bits of `word` were read
  uint64_t word;      // the next bits, the first in the high bits; behind 57 or more of them a 1, whose place counts those used
  uint8_t *out, *end;
};

inline uint64_t word_at(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return __builtin_bswap64(word);
}

// The 57 bits or more from a place on, in the high bits. It reads eight bytes.
inline uint64_t bits_at(const uint8_t* data, uint64_t bit) { return word_at(data + (bit >> 3)) << (bit & 7); }

// As bits_at, where fewer than eight bytes may be left: those behind the end are 0.
inline uint64_t last_bits_at(const uint8_t* data, uint64_t bytes, uint64_t bit) {
  uint64_t word = 0;
  for (uint64_t place = bit >> 3, index = 0; index < 8; ++index) {
    word = word << 8 | (place + index < bytes ? data[place + index] : 0);
  }
  return word << (bit & 7);
}

std::vector<Entry> several(const uint16_t* single, int longest, int window) {
  const uint32_t size = uint32_t{1} << window;
  std::vector<Entry> table(size);
  for (uint32_t index = 0; index < size; ++index) {
    uint64_t symbols = 0;
    uint32_t bits = 0, count = 0;
    while (count < most) {
      const uint32_t next = single[((index << bits) & (size - 1)) >> (window - longest)], length = next >> 8;
      if (bits + length > static_cast<uint32_t>(window)) break;
      symbols |= static_cast<uint64_t>(next & 255) << (8 * count++);
      bits += length;
    }
    table[index] = bits | count << 8 | symbols << 16;
  }
  return table;
}

template <int steps>  // look-ups of one read: steps times the bits of a look-up are at most 56
inline __attribute__((always_inline)) void step(Lane& lane, const Entry* table, int shift) {
  for (int look = 0; look < steps; ++look) {
    const Entry entry = table[lane.word >> shift];
    const uint64_t symbols = entry >> 16;
    std::memcpy(lane.out, &symbols, 8);  // what is written behind the symbols is written over by the next
    lane.out += entry >> 8 & 255;
    lane.word <<= entry & 63;
  }
  const int used = __builtin_ctzll(lane.word);
  lane.in += used >> 3;
  lane.word = (word_at(lane.in) | 1) << (used & 7);
}

// How often all lanes can step before one could leave its input or its output.
template <int steps>
inline int64_t safe(const Lane* all, int count, const uint8_t* data_end) {
  int64_t least = INT64_MAX;
  for (int index = 0; index < count; ++index) {
    const int64_t written = all[index].end - all[index].out - (steps - 1) * most - room, read = data_end - all[index].in - 8;
    const int64_t own = written < 0 || read < 0 ? 0 : std::min(written / (steps * most) + 1, read / 7);
    least = std::min(least, own);
  }
  return least;
}

template <int steps>
inline __attribute__((always_inline)) void together(Lane* all, int count, const uint8_t* data_end, const Entry* table, int shift) {
  if (count != lanes) return;
  while (int64_t times = safe<steps>(all, count, data_end)) {
    Lane a = all[0], b = all[1], c = all[2], d = all[3];
    do {
      step<steps>(a, table, shift);
      step<steps>(b, table, shift);
      step<steps>(c, table, shift);
      step<steps>(d, table, shift);
    } while (--times);
    all[0] = a;
    all[1] = b;
    all[2] = c;
    all[3] = d;
  }
}

inline __attribute__((always_inline)) void every(Lane* all, int count, const uint8_t* data_end, const Entry* table, int window) {
  const int shift = 64 - window;
  if (window <= 14) {
    together<4>(all, count, data_end, table, shift);
  } else {
    together<3>(all, count, data_end, table, shift);
  }
  together<1>(all, count, data_end, table, shift);
  for (int index = 0; index < count; ++index) {
    Lane lane = all[index];
    for (int64_t times; (times = safe<1>(&lane, 1, data_end)) > 0;) {
      do step<1>(lane, table, shift);
      while (--times);
    }
    all[index] = lane;
  }
}

__attribute__((target("bmi,bmi2"))) void every_bmi(Lane* all, int count, const uint8_t* data_end, const Entry* table, int window) {
  every(all, count, data_end, table, window);
}

void every_generic(Lane* all, int count, const uint8_t* data_end, const Entry* table, int window) {
  every(all, count, data_end, table, window);
}

// Decodes the last symbols of a stream one by one, from a place in all the data; returns where it ends.
uint64_t finish(const uint8_t* data, uint64_t size, uint64_t bit, const uint16_t* single, int longest, uint8_t* out, uint8_t* end) {
  while (out < end && bit < 8 * size) {
    const bool inside = (bit >> 3) + 8 <= size;
    uint64_t word = inside ? bits_at(data, bit) : last_bits_at(data, size, bit);
    for (int left = 57; out < end && left >= longest;) {
      const uint16_t next = single[word >> (64 - longest)];
      const int length = next >> 8;
      *out++ = static_cast<uint8_t>(next & 255);
      word <<= length;
      left -= length;
      bit += static_cast<uint64_t>(length);
    }
  }
  return out < end ? UINT64_MAX : bit;
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
  const int window = count < few ? longest : std::max(longest, usual_window);
  const std::vector<Entry> table = several(single, longest, window);
  const auto decode = mg_level() > 0 && __builtin_cpu_supports("bmi2") ? every_bmi : every_generic;
  const uint64_t size = static_cast<uint64_t>(bytes);
  uint64_t begin = 0;
  for (int64_t first = 0; first < blocks; first += lanes) {
    Lane all[lanes];
    uint64_t ends[lanes];
    const int here = static_cast<int>(blocks - first < lanes ? blocks - first : lanes);
    for (int index = 0; index < here; ++index) {
      const int64_t from = (first + index) * block, to = from + block < count ? from + block : count;
      const uint8_t* in = data + begin;
      all[index] = {in, (begin + 8 <= size ? word_at(in) : last_bits_at(data, size, 8 * begin)) | 1, symbols + from, symbols + to};
      begin += sizes[first + index];
      ends[index] = begin;
    }
    decode(all, here, data + size, table.data(), window);
    for (int index = 0; index < here; ++index) {
      const Lane& lane = all[index];
      const uint64_t place = 8 * static_cast<uint64_t>(lane.in - data) + static_cast<uint64_t>(__builtin_ctzll(lane.word));
      const uint64_t bit = finish(data, size, place, single, longest, lane.out, lane.end), end = 8 * ends[index];
      if (bit > end || end - bit > 7) return MG_BAD_LIST;
      if (end > bit && (data[ends[index] - 1] & ((1u << (end - bit)) - 1))) return MG_BAD_LIST;
    }
  }
  return MG_OK;
}
