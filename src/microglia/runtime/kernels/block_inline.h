// Parts of a level that are the same C++ at each, compiled for its instruction set: include once in each level's file,
// after the target pragma. Everything is internal to the file, so no two levels share an instantiation.
#ifndef MICROGLIA_BLOCK_INLINE_H
#define MICROGLIA_BLOCK_INLINE_H

#include "block_level.h"
#include "kernels.h"

namespace microglia::block {
namespace {

// e^x in float to about one unit in the last place; overflows to infinity and underflows to zero as it should.
inline float exponential(float x) {
  x = x > 120.0f ? 120.0f : x;
  x = x < -120.0f ? -120.0f : x;
  constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + rounder;
  const float whole = shifted - rounder;
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const int32_t power = bits - 0x4B400000, half = power >> 1;  // in two factors: 2^power alone may be out of range
  const uint32_t first = static_cast<uint32_t>(half + 127) << 23, second = static_cast<uint32_t>(power - half + 127) << 23;
  float low, high;
  __builtin_memcpy(&low, &first, sizeof low);
  __builtin_memcpy(&high, &second, sizeof high);
  return sum * low * high;
}

inline void silu_line(float* line) {
  for (int i = 0; i < line_floats; ++i) line[i] = line[i] / (1.0f + exponential(-line[i]));
}

inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest bfloat16, to the even one in the middle: what is cut off is below, at or above half of what stays.
inline uint16_t rounded(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

// The nearest whole number, the even one in the middle, of one from 0 to 255.
inline uint8_t nearest(float value) {
  const float shifted = value + 12582912.0f;  // 1.5 * 2^23: the sum is rounded, and its low bits are the number
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return static_cast<uint8_t>(bits);
}

// SiLU is applied to the stored tile, which is in L1: a kernel with it inline would be mostly SiLU.
__attribute__((noinline, unused)) void silu_tile(const Tile& tile, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      silu_line(reinterpret_cast<float*>(tile.target + row * tile.target_row + column * tile.target_pixel));
    }
  }
}

// The same of lines that follow each other, rounded into a tile of bfloat16.
__attribute__((noinline, unused)) void silu_rounded(float* line, const Tile& tile, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column, line += line_floats) {
      uint16_t* target = reinterpret_cast<uint16_t*>(tile.target + row * tile.target_row + column * tile.target_pixel);
      silu_line(line);
      for (int i = 0; i < line_floats; ++i) target[i] = rounded(line[i]);
    }
  }
}

// Where a tile's sums go: Kernel::store<type> adds the residual, activates and stores; SiLU comes behind it, in float32, so that
// bfloat16 is rounded once.
template <class Kernel, class Element, int rows, int columns, class Sums>
inline void finish(const Tile& tile, const Sums& sum) {
  if (sizeof(Element) == sizeof(float) || tile.activation != MG_SILU) {
    Kernel::template store<Element>(tile, tile.target, tile.target_row, tile.target_pixel, sum);
    if (tile.activation == MG_SILU) silu_tile(tile, rows, columns);
  } else {
    float lines[rows * columns * line_floats];
    Kernel::template store<float>(tile, reinterpret_cast<char*>(lines), columns * line_bytes, line_bytes, sum);
    silu_rounded(lines, tile, rows, columns);
  }
}

// The kernel of a shape, found by walking the columns, then the rows, at compile time: Kernels<rows, columns, weights>::run.
template <template <int, int, Weights> class Kernels, int most, Weights weights, int rows, int columns>
TileKernel find_kernel(int64_t wanted_rows, int64_t wanted_columns) {
  if (rows == wanted_rows && columns == wanted_columns) return &Kernels<rows, columns, weights>::run;
  if constexpr (rows * (columns + 1) <= most) {
    return find_kernel<Kernels, most, weights, rows, columns + 1>(wanted_rows, wanted_columns);
  } else {
    return nullptr;
  }
}

template <template <int, int, Weights> class Kernels, int most, Weights weights>
TileKernel find_rows(int64_t rows, int64_t columns) {
  if (rows == 1) return find_kernel<Kernels, most, weights, 1, 1>(rows, columns);
  if constexpr (most >= 2) {
    if (rows == 2) return find_kernel<Kernels, most, weights, 2, 1>(rows, columns);
  }
  if constexpr (most >= 3) {
    if (rows == 3) return find_kernel<Kernels, most, weights, 3, 1>(rows, columns);
  }
  if constexpr (most >= 4) {
    if (rows == 4) return find_kernel<Kernels, most, weights, 4, 1>(rows, columns);
  }
  return nullptr;
}

template <template <int, int, Weights> class Kernels, int most>
TileKernel find_in_order(int64_t rows, int64_t columns, Weights weights) {  // there is no listed kernel
  if (weights == Weights::warm) return find_rows<Kernels, most, Weights::warm>(rows, columns);
  return find_rows<Kernels, most, Weights::cold>(rows, columns);
}

template <template <int, int, Weights> class Kernels, int most>
TileKernel find(int64_t rows, int64_t columns, Weights weights) {
  if (weights == Weights::listed) return find_rows<Kernels, most, Weights::listed>(rows, columns);
  return find_in_order<Kernels, most>(rows, columns, weights);
}

// The compiler would otherwise fold a row's pointer into indexed addresses, which cost an extra instruction slot each.
template <typename Pointer>
inline Pointer* keep_in_register(Pointer* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

// The weights and the first pixel of a place, read one place ahead of their use. A place's loads could otherwise not start
// before the load of its own offset, which waits behind all loads of the place before it: a fifth of the time.
template <Weights weights>
struct Ahead {
  const char* values;
  const char* pixel;

  inline explicit Ahead(const Tile& tile) : values(tile.values) { advance(tile, 0); }

  inline void advance(const Tile& tile, int64_t index) {
    pixel = keep_in_register(tile.source + tile.places[index]);
    if constexpr (weights == Weights::listed) {
      values = tile.values + tile.value_offsets[index];
      __builtin_prefetch(tile.values + tile.value_offsets[index + places_ahead - 1]);
    } else {
      values = tile.values + index * line_bytes;
    }
  }
};

// Level::copy and Level::locate in plain C++, which the compiler vectorizes as far as the instruction set goes.
template <class Element>
void copy_plainly(const char* source, int64_t pixel_step, int64_t line_step, int64_t bytes, int64_t pixels, char* lines,
                  int64_t group_bytes) {
  constexpr int64_t elements = line_bytes / static_cast<int64_t>(sizeof(Element));
  for (int64_t pixel = 0; pixel < pixels; ++pixel, source += pixel_step, lines += line_bytes) {
    char* line = lines;
    const char* from = source;
    int64_t byte = 0;
    for (; byte + line_bytes <= bytes; byte += line_bytes, from += line_step, line += group_bytes) {
      __builtin_memcpy(line, from, line_bytes);
    }
    if (byte == bytes) continue;
    const int64_t left = (bytes - byte) / static_cast<int64_t>(sizeof(Element));
    Element* rest = reinterpret_cast<Element*>(line);
    for (int64_t i = 0; i < elements; ++i) rest[i] = i < left ? reinterpret_cast<const Element*>(from)[i] : Element{0};
  }
}

template <class Element>
uint32_t locate_plainly(const PlaceTable& table, const int32_t* channel, const uint8_t* tap, int64_t count, uint32_t* places) {
  uint32_t faults = 0;
  for (int64_t at = 0; at < count; ++at) {
    const uint32_t first = static_cast<uint32_t>(channel[at]);  // a negative one becomes too large
    faults |= first >= table.channels ? channel_fault : 0u;
    places[at] = table.of_channel(first, sizeof(Element));
  }
  for (int64_t at = 0; tap && at < count; ++at) {
    faults |= tap[at] >= table.taps ? tap_fault : 0u;
    places[at] += table.tap_offset[tap[at]];
  }
  return faults;
}

}  // namespace
}  // namespace microglia::block

#endif
