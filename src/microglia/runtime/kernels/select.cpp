// One pass of a selection: which values are at least `high`, and where those lie that are neither that nor at most `low`.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::select {
namespace {

struct Pass {
  const float* values;
  float low, high;
  uint8_t* mask;
  int32_t* inside;
  int64_t at_least = 0, at_most = 0, count = 0;

  void one(int64_t place) {
    const float value = values[place];
    const bool above = value >= high, below = value <= low;
    mask[place] = above, at_least += above, at_most += below;
    if (!above && !below) inside[count++] = static_cast<int32_t>(place);
  }
};

#if defined(__x86_64__)
constexpr int64_t width = 32;

// A comparison's bytes, 1 where it is true, in order: packing works within halves of a register, the permutation puts it right.
__attribute__((target("avx2"))) inline __m256i bytes_of(const __m256i* flags) {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(flags[0], flags[1]), _mm256_packs_epi32(flags[2], flags[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_and_si256(ordered, _mm256_set1_epi8(1));
}

__attribute__((target("avx2,popcnt"))) int64_t pass_avx2(Pass& pass, int64_t length) {
  const __m256 high = _mm256_set1_ps(pass.high), low = _mm256_set1_ps(pass.low);
  int64_t place = 0;
  for (; place + width <= length; place += width) {
    __m256i above[4];
    uint32_t ups = 0, downs = 0;
    for (int part = 0; part < 4; ++part) {
      const __m256 value = _mm256_loadu_ps(pass.values + place + 8 * part);
      const __m256 up = _mm256_cmp_ps(value, high, _CMP_GE_OQ), down = _mm256_cmp_ps(value, low, _CMP_LE_OQ);
      above[part] = _mm256_castps_si256(up);
      ups |= static_cast<uint32_t>(_mm256_movemask_ps(up)) << 8 * part;
      downs |= static_cast<uint32_t>(_mm256_movemask_ps(down)) << 8 * part;
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pass.mask + place), bytes_of(above));
    pass.at_least += __builtin_popcount(ups), pass.at_most += __builtin_popcount(downs);
    for (uint32_t rest = ~(ups | downs); rest; rest &= rest - 1) {
      pass.inside[pass.count++] = static_cast<int32_t>(place + __builtin_ctz(rest));
    }
  }
  return place;
}
#endif

}  // namespace
}  // namespace microglia::select

MG_EXPORT int mg_select_pass(const float* values, int64_t length, float low, float high, uint8_t* mask, int32_t* inside,
                             int64_t* counts) {
  if (!values || !mask || !inside || !counts) return MG_BAD_POINTER;
  if (length < 0 || length > INT32_MAX) return MG_BAD_SIZE;
  microglia::select::Pass pass{values, low, high, mask, inside};
  int64_t place = 0;
#if defined(__x86_64__)
  if (mg_level() >= MG_AVX2) place = microglia::select::pass_avx2(pass, length);
#endif
  for (; place < length; ++place) pass.one(place);
  counts[0] = pass.at_least, counts[1] = pass.at_most, counts[2] = pass.count;
  return MG_OK;
}
