// The block-sparse convolution's inner routines for AVX-512: 28 accumulators, activations as broadcast memory operands.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false ones about the intrinsics of GCC 12
#endif
#include <immintrin.h>

#include <cstdint>

#include "block_level.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif

#include "block_inline.h"

namespace microglia::block {
namespace {

constexpr int accumulators = 28;  // of 32 registers; one more holds the weights

// The maximum is written so that NaN stays NaN: the instruction returns its second operand when either is NaN.
inline __m512 activate(__m512 value, int32_t activation) {
  if (activation == MG_RELU || activation == MG_RELU6) value = _mm512_max_ps(_mm512_setzero_ps(), value);
  if (activation == MG_RELU6) value = _mm512_min_ps(_mm512_set1_ps(6.0f), value);
  return value;
}

template <int rows, int columns, Weights weights>
struct Kernel {
  static inline void accumulate(const Tile& tile, const float* values, const char* pixel, __m512 (&sum)[rows][columns]) {
    // Volatile keeps the prefetch where it is: a movable one makes the compiler spill accumulators.
    if (weights == Weights::cold) asm volatile("prefetcht0 1024(%0)" ::"r"(values));
    const __m512 weight = _mm512_loadu_ps(values);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      if (row > 0) pixel = keep_in_register(pixel + tile.source_row);
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) {
        const float activation = *reinterpret_cast<const float*>(pixel + column * line_bytes);
        sum[row][column] = _mm512_fmadd_ps(_mm512_set1_ps(activation), weight, sum[row][column]);
      }
    }
  }

  static void run(const Tile& tile) {
    __m512 sum[rows][columns];
    const __m512 bias = tile.bias ? _mm512_loadu_ps(tile.bias) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) sum[row][column] = bias;
    }
    Ahead<weights> ahead(tile);
    for (int64_t index = 0; index < tile.count; ++index) {
      const float* values = ahead.values;
      const char* pixel = ahead.pixel;
      ahead.advance(tile, index + 1);
      accumulate(tile, values, pixel, sum);
    }
    store(tile, sum);
    if (tile.activation == MG_SILU) silu_tile(tile, rows, columns);
  }

  static inline void store(const Tile& tile, const __m512 (&sum)[rows][columns]) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) {
        __m512 value = sum[row][column];
        if (tile.residual) {
          value = _mm512_add_ps(value, _mm512_loadu_ps(tile.residual + row * tile.residual_row + column * tile.residual_pixel));
        }
        _mm512_storeu_ps(tile.target + row * tile.target_row + column * tile.target_pixel, activate(value, tile.activation));
      }
    }
  }
};

void copy(const float* source, int64_t pixel_step, int64_t channels, int64_t pixels, char* lines, int64_t group_bytes) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, source += pixel_step, lines += line_bytes) {
    char* line = lines;
    int64_t channel = 0;
    for (; channel + line_floats <= channels; channel += line_floats, line += group_bytes) {
      _mm512_store_ps(line, _mm512_loadu_ps(source + channel));
    }
    if (channel < channels) {
      const __mmask16 rest = static_cast<__mmask16>((1u << (channels - channel)) - 1);
      _mm512_store_ps(line, _mm512_maskz_loadu_ps(rest, source + channel));
    }
  }
}

uint32_t locate(const PlaceTable& table, const int32_t* channel, const uint8_t* tap, int64_t count, uint32_t* places) {
  const __m512i channels = _mm512_set1_epi32(static_cast<int>(table.channels));
  const __m512i taps = _mm512_set1_epi32(static_cast<int>(table.taps));
  const __m512i group_bytes = _mm512_set1_epi32(static_cast<int>(table.group_bytes)), in_group = _mm512_set1_epi32(15);
  const __m512i few_taps = _mm512_loadu_si512(table.tap_offset);
  __mmask16 bad_channel = 0, bad_tap = 0;
  for (int64_t at = 0; at < count; at += 16) {
    const __mmask16 here = count - at >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count - at)) - 1);
    const __m512i first = _mm512_maskz_loadu_epi32(here, channel + at);
    bad_channel |= _mm512_mask_cmpge_epu32_mask(here, first, channels);
    __m512i place = _mm512_mullo_epi32(_mm512_srli_epi32(first, 4), group_bytes);
    place = _mm512_add_epi32(place, _mm512_slli_epi32(_mm512_and_si512(first, in_group), 2));
    if (tap) {
      const __m512i position = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, tap + at));
      bad_tap |= _mm512_cmpge_epu32_mask(position, taps);
      // A permutation indexes by four bits and a gather by any uint8: neither can leave the table.
      place = _mm512_add_epi32(place, table.taps <= 16 ? _mm512_permutexvar_epi32(position, few_taps)
                                                       : _mm512_i32gather_epi32(position, table.tap_offset, 4));
    }
    _mm512_mask_storeu_epi32(places + at, here, place);
  }
  return (bad_channel ? channel_fault : 0u) | (bad_tap ? tap_fault : 0u);
}

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& avx512_level() {
  static constexpr Level level{accumulators, &find<Kernel, accumulators>, &copy, &locate};
  return level;
}

}  // namespace microglia::block

#endif
