// Packing a part's weights with AVX-512: one masked permutation for each source of a line.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false ones about the intrinsics of GCC 12
#endif
#include <immintrin.h>

#include <cstdint>

#include "part_level.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

namespace microglia::part {
namespace {

constexpr int64_t lines_ahead = 16;  // prefetched: what is left out of the list leaves holes in the stream

template <int sources_count>  // 0: any number
void pack_some(const Sources& sources, const Move* moves, int64_t count, char* values) {
  const __m512i lane = _mm512_load_si512(sources.lane);
  const int64_t several = sources_count ? sources_count : sources.count;
  for (int64_t index = 0; index < count; ++index) {
    const int64_t later = index + lines_ahead < count ? index + lines_ahead : index;
    __m512 line = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t source = 0; source < several; ++source) {
      _mm_prefetch(sources.stripe[source] + moves[later].from, _MM_HINT_T0);
      const __m512 given = _mm512_loadu_ps(sources.stripe[source] + moves[index].from);
      line = _mm512_mask_permutexvar_ps(line, sources.mask[source], lane, given);
    }
    _mm512_storeu_ps(values + moves[index].to, line);
  }
}

void pack(const Sources& sources, const Move* moves, int64_t count, char* values) {
  switch (sources.count) {
    case 1: return pack_some<1>(sources, moves, count, values);
    case 2: return pack_some<2>(sources, moves, count, values);
    case 3: return pack_some<3>(sources, moves, count, values);
    case 4: return pack_some<4>(sources, moves, count, values);
    default: return pack_some<0>(sources, moves, count, values);
  }
}

}  // namespace
}  // namespace microglia::part

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace microglia::part {

Pack avx512_pack() { return &pack; }

}  // namespace microglia::part

#endif
