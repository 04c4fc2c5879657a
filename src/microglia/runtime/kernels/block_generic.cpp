// The block-sparse convolution's inner routines in plain C++, for any processor: two pixels in eight 4-float registers.
#include <cstdint>

#include "block_inline.h"
#include "block_level.h"
#include "kernels.h"

namespace microglia::block {
namespace {

constexpr int tile_pixels = 2;

// Comparisons are written so that NaN stays NaN.
inline float activate(float value, int32_t activation) {
  if (activation == MG_RELU || activation == MG_RELU6) value = value < 0.0f ? 0.0f : value;
  if (activation == MG_RELU6) value = value > 6.0f ? 6.0f : value;
  return value;
}

inline float widened(float value) { return value; }
inline void put(float* target, float value) { *target = value; }
inline void put(uint16_t* target, float value) { *target = rounded(value); }

// One place of float32: 16 weights times an activation.
struct Single {
  using Element = float;
  static inline void add(const char* line, const char* pixel, float (&sum)[line_floats]) {
    const float* values = reinterpret_cast<const float*>(line);
    const float activation = *reinterpret_cast<const float*>(pixel);
    for (int i = 0; i < line_floats; ++i) sum[i] += activation * values[i];
  }
};

// One place of bfloat16: 16 pairs of weights times a pair of activations, the odd one first.
struct Pair {
  using Element = uint16_t;
  static inline void add(const char* line, const char* pixel, float (&sum)[line_floats]) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(line);
    const uint16_t* activation = reinterpret_cast<const uint16_t*>(pixel);
    for (int half = 1; half >= 0; --half) {
      for (int i = 0; i < line_floats; ++i) sum[i] += widened(activation[half]) * widened(values[2 * i + half]);
    }
  }
};

template <class Step, int rows, int columns, Weights weights>
struct Kernel {
  using Element = typename Step::Element;

  static void run(const Tile& tile) {
    float sum[rows * columns][line_floats];
    for (auto& line : sum) {
      for (int i = 0; i < line_floats; ++i) line[i] = tile.bias ? tile.bias[i] : 0.0f;
    }
    Ahead<weights> ahead(tile);
    for (int64_t index = 0; index < tile.count; ++index) {
      const char* values = ahead.values;
      const char* first = ahead.pixel;
      ahead.advance(tile, index + 1);
      for (int pixel = 0; pixel < rows * columns; ++pixel) {
        Step::add(values, first + (pixel / columns) * tile.source_row + (pixel % columns) * line_bytes, sum[pixel]);
      }
    }
    finish<Kernel, Element, rows, columns>(tile, sum);
  }

  template <class Target>
  static void store(const Tile& tile, char* target, int64_t row_step, int64_t pixel_step,
                    const float (&sum)[rows * columns][line_floats]) {
    for (int pixel = 0; pixel < rows * columns; ++pixel) {
      const int row = pixel / columns, column = pixel % columns;
      Target* to = reinterpret_cast<Target*>(target + row * row_step + column * pixel_step);
      const int64_t from = row * tile.residual_row + column * tile.residual_pixel;
      const Element* residual = tile.residual ? reinterpret_cast<const Element*>(tile.residual + from) : nullptr;
      for (int i = 0; i < line_floats; ++i) {
        put(to + i, activate(sum[pixel][i] + (residual ? widened(residual[i]) : 0.0f), tile.activation));
      }
    }
  }
};

template <int rows, int columns, Weights weights>
using SingleKernel = Kernel<Single, rows, columns, weights>;
template <int rows, int columns, Weights weights>
using PairKernel = Kernel<Pair, rows, columns, weights>;

}  // namespace

const Level& generic_level() {
  static constexpr Level level{sizeof(float), tile_pixels, &find<SingleKernel, tile_pixels>, &copy_plainly<float>,
                               &locate_plainly<float>};
  return level;
}

const Level& generic_pair_level() {
  static constexpr Level level{sizeof(uint16_t), tile_pixels, &find_in_order<PairKernel, tile_pixels>, &copy_plainly<uint16_t>,
                               &locate_plainly<uint16_t>};
  return level;
}

}  // namespace microglia::block
