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

inline __m256 load(const float* from) { return _mm256_loadu_ps(from); }

inline __m256 load(const uint16_t* from) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

inline void put(float* to, __m256 value) { _mm256_storeu_ps(to, value); }

// As `rounded` does.
inline void put(uint16_t* to, __m256 value) {
  const __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7FC0), nan);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
}

// One place of float32.
struct Single {
  using Element = float;
  static constexpr int passes = 1;
  template <int pass>
  static inline __m256 weights(const char* line) { return _mm256_loadu_ps(reinterpret_cast<const float*>(line)); }
  template <int pass>
  static inline __m256 activation(const char* pixel) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(pixel)); }
};

// One place of bfloat16 in two passes, odd channels and even ones, for which alone there are registers.
struct Pair {
  using Element = uint16_t;
  static constexpr int passes = 2;
  template <int pass>
  static inline __m256 half(__m256i pairs) {
    return _mm256_castsi256_ps(pass == 0 ? _mm256_and_si256(pairs, _mm256_set1_epi32(-65536)) : _mm256_slli_epi32(pairs, 16));
  }
  template <int pass>
  static inline __m256 weights(const char* line) {
    return half<pass>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
  }
  template <int pass>
  static inline __m256 activation(const char* pixel) {
    int32_t pair;
    __builtin_memcpy(&pair, pixel, sizeof pair);
    return half<pass>(_mm256_set1_epi32(pair));
  }
};

template <class Step, int rows, int columns, Weights weights>
struct Kernel {
  using Element = typename Step::Element;

  template <int pass>
  static inline void accumulate(const Tile& tile, const char* values, const char* pixel, __m256 (&sum)[rows][columns][2]) {
    if (pass == 0 && weights == Weights::cold) asm volatile("prefetcht0 1024(%0)" ::"r"(values));
    const __m256 low = Step::template weights<pass>(values), high = Step::template weights<pass>(values + 32);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      if (row > 0) pixel = keep_in_register(pixel + tile.source_row);
#pragma GCC unroll 6
      for (int column = 0; column < columns; ++column) {
        const __m256 activation = Step::template activation<pass>(pixel + column * line_bytes);
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
      const char* values = ahead.values;
      const char* pixel = ahead.pixel;
      ahead.advance(tile, index + 1);
      accumulate<0>(tile, values, pixel, sum);
      if constexpr (Step::passes == 2) accumulate<1>(tile, values, pixel, sum);
    }
    finish<Kernel, Element, rows, columns>(tile, sum);
  }

  template <class Target>
  static inline void store(const Tile& tile, char* to, int64_t row_step, int64_t pixel_step,
                           const __m256 (&sum)[rows][columns][2]) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 6
      for (int column = 0; column < columns; ++column) {
        Target* target = reinterpret_cast<Target*>(to + row * row_step + column * pixel_step);
        const int64_t from = row * tile.residual_row + column * tile.residual_pixel;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256 value = sum[row][column][half];
          if (tile.residual) value = _mm256_add_ps(value, load(reinterpret_cast<const Element*>(tile.residual + from) + 8 * half));
          put(target + 8 * half, activate(value, tile.activation));
        }
      }
    }
  }
};

template <int rows, int columns, Weights weights>
using SingleKernel = Kernel<Single, rows, columns, weights>;
template <int rows, int columns, Weights weights>
using PairKernel = Kernel<Pair, rows, columns, weights>;

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& avx2_level() {
  static constexpr Level level{sizeof(float), tile_pixels, &find<SingleKernel, tile_pixels>, &copy_plainly<float>,
                               &locate_plainly<float>};
  return level;
}

const Level& avx2_pair_level() {
  static constexpr Level level{sizeof(uint16_t), tile_pixels, &find_in_order<PairKernel, tile_pixels>, &copy_plainly<uint16_t>,
                               &locate_plainly<uint16_t>};
  return level;
}

}  // namespace microglia::block

#endif
