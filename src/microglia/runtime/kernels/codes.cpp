// A linear layer from codes: y = table[codes] x + bias. The codes of 4 or 8 bits are all that is read of the weight, so that a
// layer whose time is that of its memory takes less of it. Sixteen codes of 4 bits are eight bytes; byte j holds the codes of the
// inputs j (low bits) and j + 8.
#include <cstdint>
#include <immintrin.h>

#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::codes {
namespace {

constexpr int64_t width = 16;  // inputs of one step; a row of codes is a multiple of it

using Dot = float (*)(const uint8_t* codes, const float* table, const float* x, int64_t inputs);

template <int bits>
float dot_generic(const uint8_t* codes, const float* table, const float* x, int64_t inputs) {
  float sums[width] = {};
  for (int64_t at = 0; at < inputs; at += width) {
    const uint8_t* here = codes + at * bits / 8;
    for (int64_t j = 0; j < width; ++j) {
      const int code = bits == 8 ? here[j] : j < 8 ? here[j] & 15 : here[j - 8] >> 4;
      sums[j] += table[code] * x[at + j];
    }
  }
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

__attribute__((target("avx2,fma"))) inline float sum_of(__m256 a, __m256 b) {
  const __m256 both = _mm256_add_ps(a, b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

__attribute__((target("avx2,fma"))) float dot4_avx2(const uint8_t* codes, const float* table, const float* x, int64_t inputs) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
  for (int64_t at = 0; at < inputs; at += width) {
    const __m256i first = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at / 2)));
    const __m256i second = _mm256_srli_epi32(first, 4);
    // A permutation takes the low three bits of a code; the fourth, moved to the sign, chooses the half of the table.
    const __m256 one = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, first), _mm256_permutevar8x32_ps(high, first),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(first, 28)));
    const __m256 two = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, second), _mm256_permutevar8x32_ps(high, second),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(second, 28)));
    a = _mm256_fmadd_ps(one, _mm256_loadu_ps(x + at), a);
    b = _mm256_fmadd_ps(two, _mm256_loadu_ps(x + at + 8), b);
  }
  return sum_of(a, b);
}

__attribute__((target("avx2,fma"))) float dot8_avx2(const uint8_t* codes, const float* table, const float* x, int64_t inputs) {
  __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
  for (int64_t at = 0; at < inputs; at += width) {
    const __m256i first = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at)));
    const __m256i second = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at + 8)));
    a = _mm256_fmadd_ps(_mm256_i32gather_ps(table, first, 4), _mm256_loadu_ps(x + at), a);
    b = _mm256_fmadd_ps(_mm256_i32gather_ps(table, second, 4), _mm256_loadu_ps(x + at + 8), b);
  }
  return sum_of(a, b);
}

#define MG_AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

MG_AVX512_TARGET float dot4_avx512(const uint8_t* codes, const float* table, const float* x, int64_t inputs) {
  const __m512 values = _mm512_loadu_ps(table);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < inputs; at += width) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at / 2));
    const __m128i both = _mm_unpacklo_epi64(low, _mm_srli_epi16(low, 4));  // a permutation takes the low four bits alone
    sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), values), _mm512_loadu_ps(x + at), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

MG_AVX512_TARGET float dot8_avx512(const uint8_t* codes, const float* table, const float* x, int64_t inputs) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < inputs; at += width) {
    const __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at)));
    sum = _mm512_fmadd_ps(_mm512_i32gather_ps(places, table, 4), _mm512_loadu_ps(x + at), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

Dot dot_of(int bits, int level) {
  if (level >= MG_AVX512) return bits == 4 ? dot4_avx512 : dot8_avx512;
  if (level == MG_AVX2) return bits == 4 ? dot4_avx2 : dot8_avx2;
  return bits == 4 ? dot_generic<4> : dot_generic<8>;
}

}  // namespace
}  // namespace microglia::codes

MG_EXPORT int mg_code_linear(const uint8_t* codes, const float* table, const float* x, const float* bias, float* y, int64_t outputs,
                             int64_t inputs, int64_t batch, int32_t bits, int32_t level) {
  using namespace microglia::codes;
  if (outputs < 0 || inputs < 0 || inputs % width || batch < 0 || (bits != 4 && bits != 8)) return MG_BAD_SIZE;
  if (outputs == 0 || batch == 0) return MG_OK;
  if (!table || !y || (inputs && (!codes || !x))) return MG_BAD_POINTER;
  const Dot dot = dot_of(bits, level < mg_level() ? level : mg_level());
  for (int64_t row = 0; row < outputs; ++row) {
    const uint8_t* own = codes + row * (inputs * bits / 8);
    for (int64_t example = 0; example < batch; ++example) {
      y[example * outputs + row] = dot(own, table, x + example * inputs, inputs) + (bias ? bias[row] : 0.0f);
    }
  }
  return MG_OK;
}
