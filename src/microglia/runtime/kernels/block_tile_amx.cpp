// The block convolution in 8 bits for AMX: tdpbsud, 16 outputs x 16 pixels x 16 quads, 16,384 products in one instruction.
//
// The copy is in planes: a plane has the same four channels of every pixel, neighbours 4 bytes apart, so that the activations of
// one quad for 16 pixels are 64 bytes side by side. Those of 16 quads, wherever they lie, are put together as one tile by a load and
// a store each; weights are stored as tiles. So a sparse list of quads costs what a dense one does.
#include "block_level.h"

#if defined(MICROGLIA_AMX)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false ones about the intrinsics of GCC 12
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,amx-tile,amx-int8"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,amx-tile,amx-int8")
#endif

#include "block_transpose.h"

namespace microglia::block {
namespace {

constexpr int tile_bytes = 1024, most_tiles = 4;

// ---- The copy ----

// Level::copy: up to 16 pixels of up to 64 channels at a time.
void copy_planes(const char* source, int64_t pixel_step, int64_t, int64_t bytes, int64_t pixels, char* planes, int64_t plane_bytes) {
  for (int64_t first = 0; first < pixels; first += side) {
    const int64_t count = std::min<int64_t>(side, pixels - first);
    const __mmask16 in_pixels = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t byte = 0; byte < bytes; byte += line_bytes) {
      const int64_t left = std::min<int64_t>(line_bytes, bytes - byte);
      const __mmask64 in_bytes = left == line_bytes ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      __m512i row[side];
      for (int64_t pixel = 0; pixel < side; ++pixel) {
        row[pixel] = _mm512_maskz_loadu_epi8(pixel < count ? in_bytes : 0, source + (first + pixel) * pixel_step + byte);
      }
      transpose(row);
      char* to = planes + byte / place_bytes * plane_bytes + first * place_bytes;
      for (int64_t quad = 0; quad * place_bytes < left; ++quad, to += plane_bytes) {
        _mm512_mask_storeu_epi32(to, in_pixels, row[quad]);
      }
    }
  }
}

// Level::locate. A quad begins at a multiple of four.
uint32_t locate_planes(const PlaceTable& table, const int32_t* channel, const uint8_t* tap, int64_t count, uint32_t* places) {
  uint32_t faults = 0;
  for (int64_t at = 0; at < count; ++at) {
    const uint32_t first = static_cast<uint32_t>(channel[at]);  // a negative one becomes too large
    faults |= first >= table.channels || first % place_bytes ? channel_fault : 0u;
    places[at] = first / place_bytes * table.group_bytes;
  }
  for (int64_t at = 0; tap && at < count; ++at) {
    faults |= tap[at] >= table.taps ? tap_fault : 0u;
    places[at] += table.tap_offset[tap[at]];
  }
  return faults;
}

// ---- Sums ----

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[side] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[side] = {side, side, side, side, side, side, side, side};
};

void begin_tiles() {
  static constexpr Config config;
  _tile_loadconfig(&config);
}

void end_tiles() { _tile_release(); }

// Puts the activations of up to 16 quads together, for 16 pixels. Whole numbers of any value meet the zeros of a tile's other quads.
inline void gather(const char* pixels, const uint32_t* places, int64_t quads, char* tile) {
  if (quads == side) {
#pragma GCC unroll 16
    for (int quad = 0; quad < side; ++quad) _mm512_store_si512(tile + quad * line_bytes, _mm512_loadu_si512(pixels + places[quad]));
  } else {
    for (int quad = 0; quad < quads; ++quad) _mm512_store_si512(tile + quad * line_bytes, _mm512_loadu_si512(pixels + places[quad]));
  }
}

// How many quads of a tile there are: the last one is repeated up to the end.
inline int64_t quads_of(const uint32_t* places) {
  int64_t quads = side;
  while (quads > 1 && places[quads - 1] == places[quads - 2]) --quads;
  return quads;
}

// The sums of 16 outputs for up to four times 16 pixels, a tile of 16 x 16 after another.
template <int tiles>
void add_up(const char* values, const uint32_t* places, int64_t count, const char* const* pixels, char* sums) {
  alignas(64) char gathered[2][most_tiles][tile_bytes];
  _tile_zero(0);
  if constexpr (tiles > 1) _tile_zero(1);
  if constexpr (tiles > 2) _tile_zero(2);
  if constexpr (tiles > 3) _tile_zero(3);
  const auto fill = [&](int64_t index) {  // one tile ahead of the products, for what is stored takes a while to be read again
    const int64_t quads = quads_of(places + index);
    for (int at = 0; at < tiles; ++at) gather(pixels[at], places + index, quads, gathered[index / side % 2][at]);
  };
  if (count) fill(0);
  for (int64_t index = 0; index < count; index += side, values += tile_bytes) {
    auto& tile = gathered[index / side % 2];
    if (index + side < count) {
      for (int line = 0; line < side; ++line) _mm_prefetch(values + tile_bytes + line * line_bytes, _MM_HINT_T0);
      fill(index + side);
    }
    _tile_loadd(4, values, line_bytes);
    _tile_loadd(5, tile[0], line_bytes);
    _tile_dpbsud(0, 4, 5);
    if constexpr (tiles > 1) {
      _tile_loadd(6, tile[1], line_bytes);
      _tile_dpbsud(1, 4, 6);
    }
    if constexpr (tiles > 2) {
      _tile_loadd(7, tile[2], line_bytes);
      _tile_dpbsud(2, 4, 7);
    }
    if constexpr (tiles > 3) {
      _tile_loadd(5, tile[3], line_bytes);
      _tile_dpbsud(3, 4, 5);
    }
  }
  _tile_stored(0, sums, line_bytes);
  if constexpr (tiles > 1) _tile_stored(1, sums + tile_bytes, line_bytes);
  if constexpr (tiles > 2) _tile_stored(2, sums + 2 * tile_bytes, line_bytes);
  if constexpr (tiles > 3) _tile_stored(3, sums + 3 * tile_bytes, line_bytes);
}

// ---- Outputs ----

// Of 16 pixels: the residuals of four outputs each in 32 bits, the first in the low byte. Pixels past `count` are not read.
inline void load_quads(const char* residual, int64_t step, int64_t count, __m512i (&quads)[4]) {
  const auto outputs_of = [&](int64_t pixel) {
    return pixel < count ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual + pixel * step)) : _mm_setzero_si128();
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // in registers: what is stored in parts takes long to be read as a whole
    __m512i line = _mm512_castsi128_si512(outputs_of(i));
    line = _mm512_inserti32x4(line, outputs_of(i + 4), 1);
    line = _mm512_inserti32x4(line, outputs_of(i + 8), 2);
    quads[i] = _mm512_inserti32x4(line, outputs_of(i + 12), 3);
  }
  transpose_lanes(quads);
}

inline void store_quads(__m512i (&quads)[4], char* target, int64_t step, int64_t count) {
  transpose_lanes(quads);
  if (count == side) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, target += step) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_castsi512_si128(quads[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 4 * step), _mm512_extracti32x4_epi32(quads[i], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 8 * step), _mm512_extracti32x4_epi32(quads[i], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 12 * step), _mm512_extracti32x4_epi32(quads[i], 3));
    }
    return;
  }
  alignas(64) char lines[4][line_bytes];
  for (int i = 0; i < 4; ++i) _mm512_store_si512(lines[i], quads[i]);
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    __builtin_memcpy(target + pixel * step, lines[pixel % 4] + pixel / 4 * side, side);
  }
}

struct Bounds {
  __m512 other, low, high;

  explicit Bounds(const Rescale& rescale)
      : other(_mm512_set1_ps(rescale.other)), low(_mm512_set1_ps(rescale.low)), high(_mm512_set1_ps(rescale.high)) {}

  // The instructions return their second operand when either is NaN: NaN stays NaN.
  __m512 clamped(__m512 value) const { return _mm512_min_ps(high, _mm512_max_ps(low, value)); }
};

// One output for 16 pixels: the sum * scale + bias, the product not rounded.
inline __m512 scaled(const Tile& tile, const char* sums, int output) {
  const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + output * line_bytes), _mm512_set1_epi32(tile.start[output]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(tile.scale[output]), _mm512_set1_ps(tile.bias[output]));
}

void finish_bytes(const Tile& tile, const Bounds& bounds, const char* sums, char* target, const char* residual, int64_t count) {
  const __m512i by_pixel = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i others[4], quads[4];
  if (residual) {  // with a constant count no load has a condition
    if (count == side) load_quads(residual, tile.residual_pixel, side, others);
    else load_quads(residual, tile.residual_pixel, count, others);
  }
#pragma GCC unroll 4
  for (int quad = 0; quad < 4; ++quad) {
    __m512i whole[4];
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; ++byte) {
      __m512 value = scaled(tile, sums, 4 * quad + byte);
      if (residual) {
        const __m512i other = _mm512_and_si512(_mm512_srli_epi32(others[quad], 8 * byte), _mm512_set1_epi32(255));
        value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(other), bounds.other, value);
      }
      whole[byte] = _mm512_cvtps_epi32(bounds.clamped(value));
    }
    const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
    quads[quad] = _mm512_shuffle_epi8(packed, by_pixel);
  }
  store_quads(quads, target, tile.target_pixel, count);
}

void finish_floats(const Tile& tile, const Bounds& bounds, const char* sums, char* target, const char* residual, int64_t count) {
  __m512i row[side];
  for (int output = 0; output < side; ++output) row[output] = _mm512_castps_si512(scaled(tile, sums, output));
  transpose(row);
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    __m512 value = _mm512_castsi512_ps(row[pixel]);
    if (residual) value = _mm512_fmadd_ps(_mm512_loadu_ps(residual + pixel * tile.residual_pixel), bounds.other, value);
    _mm512_storeu_ps(target + pixel * tile.target_pixel, bounds.clamped(value));
  }
}

// ---- A kernel ----

// 16 pixels of a tile: some of a row, or several narrow rows with what lies between them in the copy.
struct Part {
  int64_t row, rows, column, columns;
};

// The outputs of several rows go by a buffer, as if there were 16 pixels side by side.
void finish_rows(const Tile& tile, const Bounds& bounds, const char* sums, const Part& part) {
  const auto finish = tile.rescale->wide ? &finish_floats : &finish_bytes;
  char* target = tile.target + part.row * tile.target_row + part.column * tile.target_pixel;
  const char* residual = tile.residual ? tile.residual + part.row * tile.residual_row + part.column * tile.residual_pixel : nullptr;
  if (part.rows == 1) return finish(tile, bounds, sums, target, residual, part.columns);
  alignas(64) char outputs[tile_bytes], others[tile_bytes] = {};
  const int64_t bytes = side * tile.rescale->element_bytes(), row_bytes = tile.source_row / place_bytes * bytes;
  const auto each = [&](const auto& copy) {
    for (int64_t row = 0; row < part.rows; ++row) {
      for (int64_t column = 0; column < part.columns; ++column) copy(row, column, row * row_bytes + column * bytes);
    }
  };
  if (residual) {
    each([&](int64_t row, int64_t column, int64_t at) {
      std::memcpy(others + at, residual + row * tile.residual_row + column * tile.residual_pixel, static_cast<size_t>(bytes));
    });
  }
  Tile own = tile;
  own.target_pixel = own.residual_pixel = bytes;
  finish(own, bounds, sums, outputs, residual ? others : nullptr, side);
  each([&](int64_t row, int64_t column, int64_t at) {
    std::memcpy(target + row * tile.target_row + column * tile.target_pixel, outputs + at, static_cast<size_t>(bytes));
  });
}

void run(const Tile& tile) {
  alignas(64) char sums[most_tiles * tile_bytes];
  const char* pixels[most_tiles];
  Part parts[most_tiles];
  int tiles = 0;
  const int64_t at_once = 1 + std::max<int64_t>(0, side - tile.columns) / (tile.source_row / place_bytes);
  for (int64_t row = 0; row < tile.rows; row += at_once) {
    for (int64_t column = 0; column < tile.columns; column += side, ++tiles) {
      parts[tiles] = {row, std::min(at_once, tile.rows - row), column, std::min<int64_t>(side, tile.columns - column)};
      pixels[tiles] = tile.source + row * tile.source_row + column * place_bytes;
    }
  }
  constexpr decltype(&add_up<1>) kernels[most_tiles] = {&add_up<1>, &add_up<2>, &add_up<3>, &add_up<4>};
  kernels[tiles - 1](tile.values, tile.places, tile.count, pixels, sums);
  const Bounds bounds(*tile.rescale);
  for (int at = 0; at < tiles; ++at) finish_rows(tile, bounds, sums + at * tile_bytes, parts[at]);
}

TileKernel find_tiles(int64_t, int64_t, Weights) { return &run; }

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& amx_tile_level() {
  static constexpr Level level{sizeof(uint8_t), most_tiles * side, &find_tiles, &copy_planes, &locate_planes, place_bytes, side,
                               &begin_tiles, &end_tiles};
  return level;
}

}  // namespace microglia::block

#endif
