// The block-sparse convolution's inner routines for AVX2: a stripe is two registers, 12 accumulators are 6 pixels.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "block_level.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "block_inline.h"

namespace microglia::block {
namespace {

constexpr int tile_pixels = 6;  // a seventh pixel would not fit: 16 registers hold 12 sums, 2 weights and an activation

// The maximum is written so that NaN stays NaN: the instruction returns its second operand when either is NaN.
inline __m256 activate(__m256 value, int32_t activation) {
  if (activation == MG_RELU || activation == MG_RELU6) value = _mm256_max_ps(_mm256_setzero_ps(), value);
  if (activation == MG_RELU6) value = _mm256_min_ps(_mm256_set1_ps(6.0f), value);
  return value;
}

template <int rows, int columns, Weights weights>
struct Kernel {
  static inline void accumulate(const Tile& tile, const float* values, const char* pixel, __m256 (&sum)[rows][columns][2]) {
    if (weights == Weights::cold) asm volatile("prefetcht0 1024(%0)" ::"r"(values));
    const __m256 low = _mm256_loadu_ps(values), high = _mm256_loadu_ps(values + 8);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      if (row > 0) pixel = keep_in_register(pixel + tile.source_row);
#pragma GCC unroll 6
      for (int column = 0; column < columns; ++column) {
        const __m256 activation = _mm256_broadcast_ss(reinterpret_cast<const float*>(pixel + column * line_bytes));
        sum[row][column][0] = _mm256_fmadd_ps(activation, low, sum[row][column][0]);
        sum[row][column][1] = _mm256_fmadd_ps(activation, high, sum[row][column][1]);
      }
    }
  }

  static void run(const Tile& tile) {
    __m256 sum[rows][columns][2];
    const __m256 low = tile.bias ? _mm256_loadu_ps(tile.bias) : _mm256_setzero_ps();
    const __m256 high = tile.bias ? _mm256_loadu_ps(tile.bias + 8) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 6
      for (int column = 0; column < columns; ++column) sum[row][column][0] = low, sum[row][column][1] = high;
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

  static inline void store(const Tile& tile, const __m256 (&sum)[rows][columns][2]) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 6
      for (int column = 0; column < columns; ++column) {
        float* target = tile.target + row * tile.target_row + column * tile.target_pixel;
        const int64_t residual = row * tile.residual_row + column * tile.residual_pixel;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256 value = sum[row][column][half];
          if (tile.residual) value = _mm256_add_ps(value, _mm256_loadu_ps(tile.residual + residual + 8 * half));
          _mm256_storeu_ps(target + 8 * half, activate(value, tile.activation));
        }
      }
    }
  }
};

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& avx2_level() {
  static constexpr Level level{tile_pixels, &find<Kernel, tile_pixels>, &copy_plainly, &locate_plainly};
  return level;
}

}  // namespace microglia::block

#endif
