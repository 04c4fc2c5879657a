// Rounding of activations to 8 bits, also of an image whose channels lie in planes, and the way back.
#include <algorithm>
#include <cstdint>

#include "block_inline.h"
#include "block_plan.h"
#include "block_run.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::quantize {
namespace {

constexpr int64_t grain = 1 << 16;
constexpr int64_t most_planes = 4;  // their bytes of one pixel fit the 32 bits of a lane

struct Work {
  const float* x;
  uint8_t* y;
  float scale, zero;
  int64_t planes = 1, pixels = 0;  // of an image

  uint8_t one(float number) const {
    const float value = number * scale + zero;
    const float positive = value > 0.0f ? value : 0.0f;  // NaN, too, becomes 0
    return block::nearest(positive < 255.0f ? positive : 255.0f);
  }
};

#if defined(__x86_64__)
constexpr int64_t lanes = 8;

// Without FMA, so that product and sum are rounded each, as everywhere.
struct Avx2 {
  __m256 scale, zero;

  __attribute__((target("avx2"))) explicit Avx2(const Work& work)
      : scale(_mm256_set1_ps(work.scale)), zero(_mm256_set1_ps(work.zero)) {}

  __attribute__((target("avx2"))) __m256i of(const float* x) const {
    const __m256 value = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(x), scale), zero);
    const __m256 positive = _mm256_max_ps(value, _mm256_setzero_ps());  // the second where one is NaN
    return _mm256_cvtps_epi32(_mm256_min_ps(positive, _mm256_set1_ps(255.0f)));
  }
};

// Packing works within halves of a register; the permutation puts its result right.
__attribute__((target("avx2"))) int64_t row_avx2(const Work& work, int64_t begin, int64_t end) {
  const Avx2 rounded(work);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; begin + 4 * lanes <= end; begin += 4 * lanes) {
    const float* x = work.x + begin;
    const __m256i low = _mm256_packs_epi32(rounded.of(x), rounded.of(x + lanes));
    const __m256i high = _mm256_packs_epi32(rounded.of(x + 2 * lanes), rounded.of(x + 3 * lanes));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(work.y + begin), bytes);
  }
  return begin;
}

// Four pixels are stored as 16 bytes, of which the next four write over what is too much: the last ones are left.
__attribute__((target("avx2"))) int64_t pixels_avx2(const Work& work, const float* x, uint8_t* y, int64_t begin, int64_t end) {
  const Avx2 rounded(work);
  alignas(16) uint8_t order[16];
  for (int64_t byte = 0; byte < 16; ++byte) {
    const int64_t pixel = byte / work.planes;
    order[byte] = pixel < 4 ? static_cast<uint8_t>(4 * pixel + byte % work.planes) : 0x80;
  }
  const __m256i together = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  const int64_t written = 4 + block::divide_up(16, work.planes);  // pixels that the second store reaches, at least all lanes
  for (; begin + written <= end; begin += lanes) {
    __m256i bytes = rounded.of(x + begin);
    for (int64_t plane = 1; plane < work.planes; ++plane) {
      const __m256i more = rounded.of(x + plane * work.pixels + begin);
      bytes = _mm256_or_si256(bytes, _mm256_slli_epi32(more, static_cast<int>(8 * plane)));
    }
    bytes = _mm256_shuffle_epi8(bytes, together);
    uint8_t* to = y + begin * work.planes;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * work.planes), _mm256_extracti128_si256(bytes, 1));
  }
  return begin;
}
#endif

bool has_avx2() { return mg_level() >= MG_AVX2; }

void row(int64_t begin, int64_t end, void* context) {
  const Work work = *static_cast<Work*>(context);
#if defined(__x86_64__)
  if (has_avx2()) begin = row_avx2(work, begin, end);
#endif
  for (; begin < end; ++begin) work.y[begin] = work.one(work.x[begin]);
}

// Pixels from begin to end, counted over the images.
void pixels(int64_t begin, int64_t end, void* context) {
  const Work work = *static_cast<Work*>(context);
  for (int64_t first = begin; first < end;) {
    const int64_t image = first / work.pixels, before = image * work.pixels;
    const float* x = work.x + before * work.planes;
    uint8_t* y = work.y + before * work.planes;
    int64_t pixel = first - before;
    const int64_t last = std::min(end - before, work.pixels);
    first = before + last;
#if defined(__x86_64__)
    if (has_avx2()) pixel = pixels_avx2(work, x, y, pixel, last);
#endif
    for (; pixel < last; ++pixel) {
      for (int64_t plane = 0; plane < work.planes; ++plane) y[pixel * work.planes + plane] = work.one(x[plane * work.pixels + pixel]);
    }
  }
}

struct Back {
  const uint8_t* x;
  float* y;
  float unit, zero;
};

void back(int64_t begin, int64_t end, void* context) {
  const Back work = *static_cast<Back*>(context);
  for (int64_t index = begin; index < end; ++index) work.y[index] = (static_cast<float>(work.x[index]) - work.zero) * work.unit;
}

int run(const Work& work, int64_t count, int64_t step, mg_body body, mg_parallel parallel) {
  if (count > 0 && (!work.x || !work.y)) return MG_BAD_POINTER;
  Work given = work;
  block::in_parallel(count > 2 * step ? parallel : nullptr, count, step, body, &given);
  return MG_OK;
}

}  // namespace
}  // namespace microglia::quantize

using namespace microglia::quantize;

MG_EXPORT int mg_quantize(const float* x, int64_t count, float scale, float zero, uint8_t* y, mg_parallel parallel) {
  if (count < 0) return MG_BAD_SIZE;
  return run({x, y, scale, zero}, count, grain, row, parallel);
}

MG_EXPORT int mg_quantize_planes(const float* x, int64_t images, int64_t planes, int64_t size, float scale, float zero, uint8_t* y,
                                 mg_parallel parallel) {
  int64_t count = 0, bytes = 0;
  if (images < 0 || planes < 1 || planes > most_planes || size < 0) return MG_BAD_SIZE;
  if (__builtin_mul_overflow(images, size, &count) || __builtin_mul_overflow(count, 4 * planes, &bytes)) return MG_BAD_SIZE;
  return run({x, y, scale, zero, planes, size}, count, grain / planes, pixels, parallel);
}

MG_EXPORT int mg_dequantize(const uint8_t* x, int64_t count, float unit, float zero, float* y, mg_parallel parallel) {
  if (count < 0) return MG_BAD_SIZE;
  if (count > 0 && (!x || !y)) return MG_BAD_POINTER;
  Back work{x, y, unit, zero};
  microglia::block::in_parallel(count > 2 * grain ? parallel : nullptr, count, grain, back, &work);
  return MG_OK;
}
