// Row-sparse convolution in portable code: vectors of four floats, which every processor of interest has.
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "rows_level.h"

namespace {

struct Lanes {
  typedef float Value __attribute__((vector_size(16)));
  typedef int32_t Integers __attribute__((vector_size(16)));
  struct Mask {
    int begin, end;
  };
  using Quad = Value;
  static constexpr int kCount = 4;

  static Mask first(int count) { return {0, count}; }
  static Mask between(int begin, int end) { return {begin, end}; }
  static Value set(float value) { return Value{value, value, value, value}; }
  static Value load(const float* from) {
    Value value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static Value load(const float* from, Mask mask) {
    if (mask.begin == 0 && mask.end == kCount) return load(from);
    Value value = set(0.0f);
    for (int lane = mask.begin; lane < mask.end; lane++) value[lane] = from[lane];
    return value;
  }
  static void store(float* to, Value value) { memcpy(to, &value, sizeof value); }
  static void store(float* to, Mask mask, Value value) {
    if (mask.end == kCount) return static_cast<void>(memcpy(to, &value, sizeof value));
    for (int lane = 0; lane < mask.end; lane++) to[lane] = value[lane];
  }
  static Value permute(Value value, const int32_t* order) {
    return Value{value[order[0]], value[order[1]], value[order[2]], value[order[3]]};
  }
  static Value fma(Value a, Value b, Value c) { return a * b + c; }
  static Value add(Value a, Value b) { return a + b; }
  static Value multiply(Value a, Value b) { return a * b; }
  static Value divide(Value a, Value b) { return a / b; }
  static Value round(Value a) {
    for (int lane = 0; lane < kCount; lane++) a[lane] = nearbyintf(a[lane]);
    return a;
  }
  static Value scale(Value a, Value exponent) {
    for (int lane = 0; lane < kCount; lane++) a[lane] = ldexpf(a[lane], exponent[lane] >= -200 ? int(exponent[lane]) : 0);
    return a;
  }
  static Value minus_magnitude(Value a) {
    for (int lane = 0; lane < kCount; lane++) a[lane] = -fabsf(a[lane]);
    return a;
  }
  static Value where_negative(Value a, Value then, Value otherwise) { return a < set(0.0f) ? then : otherwise; }
  static Value at_least(Value a, Value bound) { return a < bound ? bound : a; }
  static Value at_most(Value a, Value bound) { return a > bound ? bound : a; }

  static Quad quad(float value) { return set(value); }
  static Quad quad_fma(const float* weights, float pixel, Quad sum) { return load(weights) * set(pixel) + sum; }
  static void quad_store(float* to, Quad value) { memcpy(to, &value, sizeof value); }
};

}  // namespace

#include "rows_tile.h"

namespace microglia {

const RowLevel kRowsGeneric = {
    Lanes::kCount, {make_tiles<1, 8, 0>(), make_tiles<2, 4, 0>(), make_tiles<4, 2, 2>()}, copy_plane, translate};

}  // namespace microglia
