// Row-sparse convolution with 512-bit vectors.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "rows_level.h"

// The intrinsics of GCC 12 begin from a value that is never set, which warns wherever they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,bmi2")

namespace {

struct Lanes {
  using Value = __m512;
  using Mask = __mmask16;
  using Quad = __m128;
  static constexpr int kCount = 16;

  static Mask first(int count) { return Mask((1u << count) - 1); }
  static Mask between(int begin, int end) { return Mask(first(end) & ~first(begin)); }
  static Value set(float value) { return _mm512_set1_ps(value); }
  static Value load(const float* from) { return _mm512_loadu_ps(from); }
  static Value load(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
  static void store(float* to, Value value) { _mm512_storeu_ps(to, value); }
  static void store(float* to, Mask mask, Value value) { _mm512_mask_storeu_ps(to, mask, value); }
  static Value permute(Value value, const int32_t* order) { return _mm512_permutexvar_ps(_mm512_loadu_si512(order), value); }
  static Value fma(Value a, Value b, Value c) { return _mm512_fmadd_ps(a, b, c); }
  static Value add(Value a, Value b) { return _mm512_add_ps(a, b); }
  static Value multiply(Value a, Value b) { return _mm512_mul_ps(a, b); }
  static Value divide(Value a, Value b) { return _mm512_div_ps(a, b); }
  static Value round(Value a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Value scale(Value a, Value exponent) { return _mm512_scalef_ps(a, exponent); }
  static Value minus_magnitude(Value a) { return _mm512_or_ps(a, _mm512_set1_ps(-0.0f)); }
  static Value where_negative(Value a, Value then, Value otherwise) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(a)), otherwise, then);
  }
  // The instruction returns its second operand where one is NaN.
  static Value at_least(Value a, Value bound) { return _mm512_max_ps(bound, a); }
  static Value at_most(Value a, Value bound) { return _mm512_min_ps(bound, a); }

  static Quad quad(float value) { return _mm_set1_ps(value); }
  static Quad quad_fma(const float* weights, float pixel, Quad sum) {
    return _mm_fmadd_ps(_mm_loadu_ps(weights), _mm_set1_ps(pixel), sum);
  }
  static void quad_store(float* to, Quad value) { _mm_storeu_ps(to, value); }
};

}  // namespace

#include "rows_tile.h"

namespace microglia {

const RowLevel kRowsAvx512 = {
    Lanes::kCount, {make_tiles<1, 14, 0>(), make_tiles<2, 10, 0>(), make_tiles<4, 6, 6>()}, copy_plane, translate};

}  // namespace microglia
#endif
