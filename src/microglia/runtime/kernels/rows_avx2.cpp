// Row-sparse convolution with 256-bit vectors.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "rows_level.h"

#pragma GCC target("avx2,fma,bmi2")

namespace {

struct Lanes {
  using Value = __m256;
  using Mask = __m256i;
  using Quad = __m128;
  static constexpr int kCount = 8;

  static __m256i numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static Mask first(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), numbers()); }
  static Mask between(int begin, int end) { return _mm256_andnot_si256(first(begin), first(end)); }
  static Value set(float value) { return _mm256_set1_ps(value); }
  static Value load(const float* from) { return _mm256_loadu_ps(from); }
  static Value load(const float* from, Mask mask) { return _mm256_maskload_ps(from, mask); }
  static void store(float* to, Value value) { _mm256_storeu_ps(to, value); }
  static void store(float* to, Mask mask, Value value) { _mm256_maskstore_ps(to, mask, value); }
  static Value permute(Value value, const int32_t* order) {
    return _mm256_permutevar8x32_ps(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order)));
  }
  static Value fma(Value a, Value b, Value c) { return _mm256_fmadd_ps(a, b, c); }
  static Value add(Value a, Value b) { return _mm256_add_ps(a, b); }
  static Value multiply(Value a, Value b) { return _mm256_mul_ps(a, b); }
  static Value divide(Value a, Value b) { return _mm256_div_ps(a, b); }
  static Value round(Value a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // In two steps, since 2 ** exponent alone may be too small for a float.
  static Value scale(Value a, Value exponent) {
    const __m256i whole = _mm256_cvtps_epi32(exponent), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }
  static __m256 power_of_two(__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  }
  static Value minus_magnitude(Value a) { return _mm256_or_ps(a, _mm256_set1_ps(-0.0f)); }
  static Value where_negative(Value a, Value then, Value otherwise) { return _mm256_blendv_ps(otherwise, then, a); }
  // The instruction returns its second operand where one is NaN.
  static Value at_least(Value a, Value bound) { return _mm256_max_ps(bound, a); }
  static Value at_most(Value a, Value bound) { return _mm256_min_ps(bound, a); }

  static Quad quad(float value) { return _mm_set1_ps(value); }
  static Quad quad_fma(const float* weights, float pixel, Quad sum) {
    return _mm_fmadd_ps(_mm_loadu_ps(weights), _mm_set1_ps(pixel), sum);
  }
  static void quad_store(float* to, Quad value) { _mm_storeu_ps(to, value); }
};

}  // namespace

#include "rows_tile.h"

namespace microglia {

const RowLevel kRowsAvx2 = {
    Lanes::kCount, {make_tiles<1, 12, 0>(), make_tiles<2, 5, 0>(), make_tiles<4, 3, 2>()}, copy_plane, translate};

}  // namespace microglia
#endif
