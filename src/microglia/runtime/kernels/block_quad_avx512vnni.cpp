// The block convolution in 8 bits for AVX-512 with VNNI: vpdpbusd, 64 products in one instruction, 28 accumulators.
#include "block_level.h"

#if defined(MICROGLIA_AVX512VNNI)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false ones about the intrinsics of GCC 12
#endif
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")
#endif

#include "block_quad.h"

namespace microglia::block {
namespace {

constexpr int accumulators = 28;  // of 32 registers; one more holds the weights, the rest activations

struct Vnni {
  using Sums = __m512i;
  using Floats = __m512;
  using Weights16 = __m512i;

  static inline Sums load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static inline Weights16 weights(const char* line) { return _mm512_loadu_si512(line); }
  // Volatile keeps the prefetch where it is: a movable one makes the compiler spill accumulators.
  static inline void prefetch(const char* values) { asm volatile("prefetcht0 (%0)" ::"r"(values)); }
  static inline Floats splat(float value) { return _mm512_set1_ps(value); }

  // The operand that may come from memory is the one with a sign, so activations are broadcast to a register. Both instructions
  // stand together: free to move, the compiler begins too many of the loads and spills accumulators.
  static inline void dot(Sums& sum, Weights16 weights, const char* pixel) {
    struct __attribute__((packed, may_alias)) Quad {
      int32_t inputs;
    };
    __m512i x;
    asm volatile("vpbroadcastd %2, %1\n\tvpdpbusd %3, %1, %0"
                 : "+v"(sum), "=&v"(x)
                 : "m"(*reinterpret_cast<const Quad*>(pixel)), "v"(weights));
  }

  static inline Floats scaled(Sums sum, Floats scale, Floats bias) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias); }
  static inline Floats floats(const float* from) { return load(from); }
  static inline Floats floats(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  template <class Residual>
  static inline Floats added(Floats value, Floats factor, const Residual* residual) {
    return _mm512_fmadd_ps(floats(residual), factor, value);
  }
  // The instructions return their second operand when either is NaN: NaN stays NaN.
  static inline Floats clamped(Floats value, Floats low, Floats high) {
    return _mm512_min_ps(high, _mm512_max_ps(low, value));
  }
  static inline void put(float* target, Floats value) { _mm512_storeu_ps(target, value); }
  static inline void put(uint8_t* target, Floats value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)));
  }
};

template <int rows, int columns, Weights kind>
using VnniKernel = QuadKernel<Vnni, rows, columns, kind>;

}  // namespace
}  // namespace microglia::block

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::block {

const Level& avx512vnni_quad_level() {
  static constexpr Level level{sizeof(uint8_t), accumulators, &find_in_order<VnniKernel, accumulators>, &copy_plainly<uint8_t>,
                               &locate_plainly<uint8_t>};
  return level;
}

}  // namespace microglia::block

#endif
