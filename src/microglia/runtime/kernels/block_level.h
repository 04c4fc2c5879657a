// What the block-sparse convolution asks of an instruction set. Internal: the C interface is kernels.h.
//
// Activations are computed from a copy in "lines": 64 bytes of consecutive channels of one pixel, 16 of float32, 32 of
// bfloat16 or 64 of 8 bits. Neighbouring pixels of an output row lie one line apart whatever the stride, so a tile reaches all its pixels by constant displacements: every
// multiply-add takes its activation as a broadcast memory operand without any address arithmetic. Only 8-bit activations of a
// pointwise convolution are read where they are, any number of bytes apart, without a copy.
//
// A "place" is what one step of a kernel multiplies: 32 bits of a line (one float32 activation, two neighbours in bfloat16 or
// four in 8 bits) with a line of weights (16, or 16 pairs, or 16 quads). So all types share everything but the step itself.
// Only neighbours make a pair or a quad: channels that lie apart would have to be put together for every pixel, which takes a
// shuffle for each, where the multiplications that they save take one instruction.
#ifndef MICROGLIA_BLOCK_LEVEL_H
#define MICROGLIA_BLOCK_LEVEL_H

#include <cstdint>

namespace microglia::block {

constexpr int line_floats = 16;
constexpr int64_t line_bytes = 64, place_bytes = 4;
constexpr int64_t stripe_outputs = 16;
constexpr int64_t most_pixels = 64;  // of a tile, at any level

// Kernels look ahead in the lists of places, so that many entries past the end are readable (and lead to readable data).
constexpr int64_t places_ahead = 7;

// Older compilers do not know the instructions of the levels avx512vnni, avx512bf16 and amx, which are then not there.
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define MICROGLIA_AVX512BF16
#endif
#if defined(MICROGLIA_AVX512BF16) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define MICROGLIA_AMX
#endif
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 7) || (!defined(__clang__) && __GNUC__ >= 8))
#define MICROGLIA_AVX512VNNI
#endif

// How the sums of 8-bit activations and weights become outputs: min(max(sum * scale + bias + residual * other, low), high), rounded
// to uint8 unless they are wide. Arrays have a number for each output, those past the last one included.
struct Rescale {
  const int32_t* start;  // where the sums begin
  const float* scale;
  float other, low, high;
  bool wide;  // outputs and residual are float32, not uint8

  int64_t element_bytes() const { return wide ? 4 : 1; }
};

// One stripe of outputs for rows x columns pixels: what a kernel computes in one call. Steps are in bytes.
struct Tile {
  const char* values;              // a line for each place
  const uint32_t* places;          // byte offset of each place's activation from `source`
  const uint32_t* value_offsets;   // where the weights of each place lie, in bytes from `values`; unused unless listed
  int64_t count;
  const char* source;              // the first pixel
  int64_t source_row;
  char* target;
  int64_t target_row, target_pixel;
  const char* residual;            // or null
  int64_t residual_row, residual_pixel;
  const float* bias;               // 16 of them, or null
  int32_t activation;
  const Rescale* rescale;          // of 8 bits alone, with the pointers of this stripe
  const int32_t* start;
  const float* scale;
  int64_t source_pixel;            // of 8 bits alone: others lie one line apart
  int64_t rows, columns;           // of pixels
};

using TileKernel = void (*)(const Tile&);

// Where a tile's weights come from, which decides how its kernel reads them.
enum class Weights { warm, cold, listed };  // in order and in L2; in order and prefetched; by value_offsets

// How blocks become places. A table entry past the taps is never used; it is there so that any uint8 may index it.
struct PlaceTable {
  uint32_t taps, channels;
  uint32_t element_bytes;
  uint32_t group_bytes;      // between groups of as many channels as a line holds
  uint32_t tap_offset[256];

  uint32_t of_channel(uint32_t channel) const { return of_channel(channel, element_bytes); }

  uint32_t of_channel(uint32_t channel, uint32_t bytes) const {
    constexpr uint32_t line = line_bytes;
    const uint32_t byte = channel * bytes;
    return byte / line * group_bytes + byte % line;
  }
};

enum PlaceFault : uint32_t { channel_fault = 1, tap_fault = 2 };

struct Level {
  int64_t element_bytes;  // of activations; of residual and output too, but in 8 bits (see Rescale)
  int64_t pixels;  // at most this many in a tile; any rows up to 4 and columns whose product keeps to it has a kernel
  TileKernel (*kernel)(int64_t rows, int64_t columns, Weights weights);

  // Copies pixels of so many bytes, `pixel_step` bytes apart and their lines `line_step`, to lines: those of one group of
  // channels follow each other, groups lie `group_bytes` apart. The last line is filled with zeros.
  void (*copy)(const char* source, int64_t pixel_step, int64_t line_step, int64_t bytes, int64_t pixels, char* lines,
               int64_t group_bytes);

  // Writes the places of `count` blocks; returns what was wrong with any of them, as PlaceFault bits. tap may be null.
  uint32_t (*locate)(const PlaceTable& table, const int32_t* channel, const uint8_t* tap, int64_t count, uint32_t* places);

  int64_t line = line_bytes;  // of the copy: what it has of a pixel side by side, and the distance of neighbouring pixels
  int64_t columns = 1;        // neighbouring pixels of a row that are computed at once

  // Around the calls of kernels on a thread, where there is something to set up.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
};

const Level& generic_level();
const Level& avx2_level();
const Level& avx512_level();

// In bfloat16: all but the last widen each half of a pair by a shift or a mask and multiply twice.
const Level& generic_pair_level();
const Level& avx2_pair_level();
const Level& avx512_pair_level();
const Level& avx512bf16_pair_level();

// In 8 bits: activations without a sign, weights with one. AVX2 adds neighbouring products in 16 bits; see mg_blocks_int8.
const Level& generic_quad_level();
const Level& avx2_quad_level();
const Level& avx512vnni_quad_level();

// The same by tiles: lines of four channels, blocks in the order of mg_blocks_int8's tiles, which begin at multiples of four.
const Level& amx_tile_level();

}  // namespace microglia::block

#endif
