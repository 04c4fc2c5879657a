// The block-sparse convolution for AVX-512: float32, and bfloat16 by shifts where there is no instruction for it.
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

#include "block_avx512.h"

namespace microglia::block {
namespace {

// One place of float32.
struct Single {
  using Element = float;
  static constexpr int passes = 1;
  template <int pass>
  static inline __m512 weights(const char* line) { return _mm512_loadu_ps(line); }
  template <int pass>
  static inline __m512 add(__m512 sum, __m512 weight, const char* pixel) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*reinterpret_cast<const float*>(pixel)), weight, sum);
  }
};

// One place of bfloat16 in two passes, odd channels and even ones: both at once would need more than 32 registers.
struct ShiftedPair {
  using Element = uint16_t;
  static constexpr int passes = 2;
  template <int pass>
  static inline __m512 half(__m512i pairs) {
    return _mm512_castsi512_ps(pass == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(pairs, 16));
  }
  template <int pass>
  static inline __m512 weights(const char* line) { return half<pass>(_mm512_loadu_si512(line)); }
  template <int pass>
  static inline __m512 add(__m512 sum, __m512 weight, const char* pixel) {
    return _mm512_fmadd_ps(half<pass>(_mm512_set1_epi32(pair_at(pixel))), weight, sum);
  }
};

template <int rows, int columns, Weights weights>
using SingleKernel = Kernel<Single, rows, columns, weights>;
template <int rows, int columns, Weights weights>
using PairKernel = Kernel<ShiftedPair, rows, columns, weights>;

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& avx512_level() {
  static constexpr Level level{sizeof(float), accumulators, &find<SingleKernel, accumulators>, &copy, &locate<float>};
  return level;
}

const Level& avx512_pair_level() {
  static constexpr Level level{sizeof(uint16_t), accumulators, &find_in_order<PairKernel, accumulators>, &copy,
                               &locate<uint16_t>};
  return level;
}

}  // namespace microglia::block

#endif
