// What the block-sparse convolution asks of an instruction set. Internal: the C interface is kernels.h.
//
// Activations are computed from a copy in "lines": 16 consecutive channels of one pixel, 64 bytes. Neighbouring pixels of
// an output row lie one line apart whatever the stride, so a tile reaches all its pixels by constant displacements: every
// multiply-add takes its activation as a broadcast memory operand without any address arithmetic.
#ifndef MICROGLIA_BLOCK_LEVEL_H
#define MICROGLIA_BLOCK_LEVEL_H

#include <cstdint>

namespace microglia::block {

constexpr int line_floats = 16;
constexpr int64_t line_bytes = 64;
constexpr int64_t stripe_outputs = 16;
constexpr int64_t most_pixels = 28;  // of a tile, at any level

// Kernels look ahead in the lists of places, so that many entries past the end are readable (and lead to readable data).
constexpr int64_t places_ahead = 7;

// One stripe of outputs for rows x columns pixels: what a kernel computes in one call. Steps are in floats unless said.
struct Tile {
  const float* values;             // 16 weights for each place
  const uint32_t* places;          // byte offset of each place's activation from `source`
  const uint32_t* value_offsets;   // where the weights of each place lie, in bytes from `values`; unused unless listed
  int64_t count;
  const char* source;              // the first pixel
  int64_t source_row;              // bytes between rows
  float* target;
  int64_t target_row, target_pixel;
  const float* residual;           // or null
  int64_t residual_row, residual_pixel;
  const float* bias;               // 16 of them, or null
  int32_t activation;
};

using TileKernel = void (*)(const Tile&);

// Where a tile's weights come from, which decides how its kernel reads them.
enum class Weights { warm, cold, listed };  // in order and in L2; in order and prefetched; by value_offsets

// How blocks become places. A table entry past the taps is never used; it is there so that any uint8 may index it.
struct PlaceTable {
  uint32_t taps, channels;
  uint32_t group_bytes;      // between groups of 16 channels
  uint32_t tap_offset[256];

  uint32_t of_channel(uint32_t channel) const {
    return channel / line_floats * group_bytes + channel % line_floats * 4;
  }
};

enum PlaceFault : uint32_t { channel_fault = 1, tap_fault = 2 };

struct Level {
  int64_t pixels;  // at most this many in a tile; any rows up to 4 and columns whose product keeps to it has a kernel
  TileKernel (*kernel)(int64_t rows, int64_t columns, Weights weights);

  // Copies pixels of `channels` floats, `pixel_step` floats apart, to lines: those of one group of 16 channels follow each
  // other, groups lie `group_bytes` apart. The last line is filled with zeros.
  void (*copy)(const float* source, int64_t pixel_step, int64_t channels, int64_t pixels, char* lines, int64_t group_bytes);

  // Writes the places of `count` blocks; returns what was wrong with any of them, as PlaceFault bits. tap may be null.
  uint32_t (*locate)(const PlaceTable& table, const int32_t* channel, const uint8_t* tap, int64_t count, uint32_t* places);
};

const Level& generic_level();
const Level& avx2_level();
const Level& avx512_level();

}  // namespace microglia::block

#endif
