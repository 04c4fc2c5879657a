// The block-sparse convolution in bfloat16 where the processor multiplies and adds pairs in one instruction, vdpbf16ps.
#include "block_level.h"

#if defined(MICROGLIA_AVX512BF16)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false ones about the intrinsics of GCC 12
#endif
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")
#endif

#include "block_avx512.h"

namespace microglia::block {
namespace {

struct Pair {
  using Element = uint16_t;
  static constexpr int passes = 1;
  template <int pass>
  static inline __m512i weights(const char* line) { return _mm512_loadu_si512(line); }
  template <int pass>
  static inline __m512 add(__m512 sum, __m512i weight, const char* pixel) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(pair_at(pixel)));
  }
};

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

const Level& avx512bf16_pair_level() {
  static constexpr Level level{sizeof(uint16_t), accumulators, &find_in_order<PairKernel, accumulators>, &copy,
                               &locate<uint16_t>};
  return level;
}

}  // namespace microglia::block

#endif
