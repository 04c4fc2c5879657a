// The block convolution in 8 bits in plain C++, for any processor.
#include <cstdint>

#include "block_level.h"
#include "block_quad.h"
#include "kernels.h"

namespace microglia::block {
namespace {

constexpr int tile_pixels = 2;

struct Plain {
  struct Sums {
    int32_t lane[line_floats];
  };
  struct Floats {
    float lane[line_floats];
  };
  using Weights16 = const int8_t*;

  static inline Sums load(const int32_t* from) {
    Sums sums;
    __builtin_memcpy(&sums, from, sizeof sums);
    return sums;
  }
  static inline Floats load(const float* from) {
    Floats floats;
    __builtin_memcpy(&floats, from, sizeof floats);
    return floats;
  }
  static inline Weights16 weights(const char* line) { return reinterpret_cast<const int8_t*>(line); }
  static inline void prefetch(const char*) {}
  static inline Floats splat(float value) {
    Floats floats;
    for (float& lane : floats.lane) lane = value;
    return floats;
  }

  static inline void dot(Sums& sum, Weights16 weights, const char* pixel) {
    const uint8_t* x = reinterpret_cast<const uint8_t*>(pixel);
    for (int i = 0; i < line_floats; ++i) {
      for (int input = 0; input < 4; ++input) sum.lane[i] += x[input] * weights[4 * i + input];
    }
  }

  // In double the product is exact, and the sum nearly always rounds to the float that one rounding gives.
  static inline float multiplied(float left, float right, float sum) {
    return static_cast<float>(static_cast<double>(left) * right + sum);
  }
  static inline Floats scaled(const Sums& sum, const Floats& scale, const Floats& bias) {
    Floats value;
    for (int i = 0; i < line_floats; ++i) value.lane[i] = multiplied(static_cast<float>(sum.lane[i]), scale.lane[i], bias.lane[i]);
    return value;
  }
  template <class Residual>
  static inline Floats added(Floats value, const Floats& factor, const Residual* residual) {
    for (int i = 0; i < line_floats; ++i) {
      value.lane[i] = multiplied(static_cast<float>(residual[i]), factor.lane[i], value.lane[i]);
    }
    return value;
  }
  static inline Floats clamped(Floats value, const Floats& low, const Floats& high) {  // NaN stays NaN
    for (int i = 0; i < line_floats; ++i) {
      value.lane[i] = value.lane[i] < low.lane[i] ? low.lane[i] : value.lane[i];
      value.lane[i] = value.lane[i] > high.lane[i] ? high.lane[i] : value.lane[i];
    }
    return value;
  }
  static inline void put(float* target, const Floats& value) { __builtin_memcpy(target, &value, sizeof value); }
  static inline void put(uint8_t* target, const Floats& value) {
    for (int i = 0; i < line_floats; ++i) target[i] = nearest(value.lane[i]);
  }
};

template <int rows, int columns, Weights kind>
using PlainKernel = QuadKernel<Plain, rows, columns, kind>;

}  // namespace

const Level& generic_quad_level() {
  static constexpr Level level{sizeof(uint8_t), tile_pixels, &find_in_order<PlainKernel, tile_pixels>, &copy_plainly<uint8_t>,
                               &locate_plainly<uint8_t>};
  return level;
}

}  // namespace microglia::block
