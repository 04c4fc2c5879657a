// Passes over the weights that rounds of pruning have left, given by their positions.
#include <cstdint>

#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

MG_EXPORT int mg_alive_products(const float* first, const float* second, const int32_t* places, int64_t count, float* result) {
  if (!first || !second || !places || !result) return MG_BAD_POINTER;
  if (count < 0) return MG_BAD_SIZE;
  for (int64_t i = 0; i < count; ++i) result[i] = first[places[i]] * second[places[i]];
  return MG_OK;
}

MG_EXPORT int mg_alive_keep(const int32_t* places, const uint8_t* stays, int64_t count, float* weights, int32_t* left,
                            int64_t* found) {
  if (!stays || !weights || !left || !found) return MG_BAD_POINTER;
  if (count < 0 || count > INT32_MAX) return MG_BAD_SIZE;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t place = places ? places[i] : static_cast<int32_t>(i);
    left[kept] = place;  // never beyond i, so that `left` may be `places`
    kept += stays[i] != 0;
    if (!stays[i]) weights[place] = 0.0f;
  }
  *found = kept;
  return MG_OK;
}
