// The block convolution in 8 bits for AVX2. vpmaddubsw multiplies and adds neighbours in 16 bits, which is exact within the
// bound of mg_blocks_int8, then vpmaddwd with ones adds those in 32: three instructions for 32 products. Without the bound,
// weights and activations widened to 16 bits would take six.
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

#include "block_quad.h"

namespace microglia::block {
namespace {

constexpr int tile_pixels = 6;

struct Avx2 {
  struct Sums {
    __m256i low, high;
  };
  struct Floats {
    __m256 low, high;
  };
  using Weights16 = Sums;

  static inline __m256i half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static inline Sums load(const int32_t* from) { return {half(from), half(from + 8)}; }
  static inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static inline Weights16 weights(const char* line) { return {half(line), half(line + 32)}; }
  static inline void prefetch(const char* values) { asm volatile("prefetcht0 (%0)" ::"r"(values)); }
  static inline Floats splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

  static inline void dot(Sums& sum, const Weights16& weights, const char* pixel) {
    int32_t quad;
    __builtin_memcpy(&quad, pixel, sizeof quad);  // at any channel: not on a multiple of four bytes
    const __m256i x = _mm256_set1_epi32(quad), ones = _mm256_set1_epi16(1);
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights.low), ones));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights.high), ones));
  }

  static inline Floats scaled(const Sums& sum, const Floats& scale, const Floats& bias) {
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.low), scale.low, bias.low),
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.high), scale.high, bias.high)};
  }
  static inline Floats floats(const float* from) { return load(from); }
  static inline Floats floats(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  template <class Residual>
  static inline Floats added(const Floats& value, const Floats& factor, const Residual* residual) {
    const Floats other = floats(residual);
    return {_mm256_fmadd_ps(other.low, factor.low, value.low), _mm256_fmadd_ps(other.high, factor.high, value.high)};
  }
  // The instructions return their second operand when either is NaN: NaN stays NaN.
  static inline Floats clamped(const Floats& value, const Floats& low, const Floats& high) {
    return {_mm256_min_ps(high.low, _mm256_max_ps(low.low, value.low)),
            _mm256_min_ps(high.high, _mm256_max_ps(low.high, value.high))};
  }
  static inline void put(float* target, const Floats& value) {
    _mm256_storeu_ps(target, value.low), _mm256_storeu_ps(target + 8, value.high);
  }
  static inline void put(uint8_t* target, const Floats& value) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(value.low), _mm256_cvtps_epi32(value.high));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
  }
};

template <int rows, int columns, Weights kind>
using Avx2Kernel = QuadKernel<Avx2, rows, columns, kind>;

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& avx2_quad_level() {
  static constexpr Level level{sizeof(uint8_t), tile_pixels, &find_in_order<Avx2Kernel, tile_pixels>, &copy_plainly<uint8_t>,
                               &locate_plainly<uint8_t>};
  return level;
}

}  // namespace microglia::block

#endif
