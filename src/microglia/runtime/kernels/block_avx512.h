// The block-sparse convolution's inner routines for AVX-512 of any kind: 28 accumulators, activations as broadcast memory
// operands. What multiplies and adds is the parameter Step. Include once in each level's file, after the target pragma.
#ifndef MICROGLIA_BLOCK_AVX512_H
#define MICROGLIA_BLOCK_AVX512_H

#include <immintrin.h>

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

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load(const uint16_t* from) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void put(float* to, __m512 value) { _mm512_storeu_ps(to, value); }

// As `rounded` does.
inline void put(uint16_t* to, __m512 value) {
  const __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  nearest = _mm512_mask_mov_epi32(nearest, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(nearest));
}

inline int32_t pair_at(const char* pixel) {
  int32_t pair;
  __builtin_memcpy(&pair, pixel, sizeof pair);  // at any channel: not on a multiple of four bytes
  return pair;
}

template <class Step, int rows, int columns, Weights weights>
struct Kernel {
  using Element = typename Step::Element;

  template <int pass>
  static inline void accumulate(const Tile& tile, const char* values, const char* pixel, __m512 (&sum)[rows][columns]) {
    // Volatile keeps the prefetch where it is: a movable one makes the compiler spill accumulators.
    if (pass == 0 && weights == Weights::cold) asm volatile("prefetcht0 1024(%0)" ::"r"(values));
    const auto weight = Step::template weights<pass>(values);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      if (row > 0) pixel = keep_in_register(pixel + tile.source_row);
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) {
        sum[row][column] = Step::template add<pass>(sum[row][column], weight, pixel + column * line_bytes);
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
      const char* values = ahead.values;
      const char* pixel = ahead.pixel;
      ahead.advance(tile, index + 1);
      accumulate<0>(tile, values, pixel, sum);
      if constexpr (Step::passes == 2) accumulate<1>(tile, values, pixel, sum);
    }
    finish<Kernel, Element, rows, columns>(tile, sum);
  }

  template <class Target>
  static inline void store(const Tile& tile, char* target, int64_t row_step, int64_t pixel_step,
                           const __m512 (&sum)[rows][columns]) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) {
        __m512 value = sum[row][column];
        if (tile.residual) {
          const char* residual = tile.residual + row * tile.residual_row + column * tile.residual_pixel;
          value = _mm512_add_ps(value, load(reinterpret_cast<const Element*>(residual)));
        }
        put(reinterpret_cast<Target*>(target + row * row_step + column * pixel_step), activate(value, tile.activation));
      }
    }
  }
};

// For any type: the last line is masked by bytes.
void copy(const char* source, int64_t pixel_step, int64_t line_step, int64_t bytes, int64_t pixels, char* lines,
          int64_t group_bytes) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, source += pixel_step, lines += line_bytes) {
    char* line = lines;
    const char* from = source;
    int64_t byte = 0;
    for (; byte + line_bytes <= bytes; byte += line_bytes, from += line_step, line += group_bytes) {
      _mm512_store_si512(line, _mm512_loadu_si512(from));
    }
    if (byte < bytes) {
      const __mmask64 rest = (uint64_t{1} << (bytes - byte)) - 1;
      _mm512_store_si512(line, _mm512_maskz_loadu_epi8(rest, from));
    }
  }
}

template <class Element>
uint32_t locate(const PlaceTable& table, const int32_t* channel, const uint8_t* tap, int64_t count, uint32_t* places) {
  constexpr int line_elements = line_bytes / sizeof(Element), size_bits = sizeof(Element) == 4 ? 2 : 1;
  const __m512i channels = _mm512_set1_epi32(static_cast<int>(table.channels));
  const __m512i taps = _mm512_set1_epi32(static_cast<int>(table.taps));
  const __m512i group_bytes = _mm512_set1_epi32(static_cast<int>(table.group_bytes));
  const __m512i in_group = _mm512_set1_epi32(line_elements - 1), few_taps = _mm512_loadu_si512(table.tap_offset);
  __mmask16 bad_channel = 0, bad_tap = 0;
  for (int64_t at = 0; at < count; at += 16) {
    const __mmask16 here = count - at >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count - at)) - 1);
    const __m512i first = _mm512_maskz_loadu_epi32(here, channel + at);
    bad_channel |= _mm512_mask_cmpge_epu32_mask(here, first, channels);
    __m512i place = _mm512_mullo_epi32(_mm512_srli_epi32(first, 6 - size_bits), group_bytes);
    place = _mm512_add_epi32(place, _mm512_slli_epi32(_mm512_and_si512(first, in_group), size_bits));
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

#endif
