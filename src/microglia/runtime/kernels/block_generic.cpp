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

template <int rows, int columns, Weights weights>
struct Kernel {
  static void run(const Tile& tile) {
    float sum[rows * columns][line_floats];
    for (auto& line : sum) {
      for (int i = 0; i < line_floats; ++i) line[i] = tile.bias ? tile.bias[i] : 0.0f;
    }
    Ahead<weights> ahead(tile);
    for (int64_t index = 0; index < tile.count; ++index) {
      const float* values = ahead.values;
      const char* first = ahead.pixel;
      ahead.advance(tile, index + 1);
      for (int pixel = 0; pixel < rows * columns; ++pixel) {
        const char* at = first + (pixel / columns) * tile.source_row + (pixel % columns) * line_bytes;
        const float activation = *reinterpret_cast<const float*>(at);
        for (int i = 0; i < line_floats; ++i) sum[pixel][i] += activation * values[i];
      }
    }
    store(tile, sum);
    if (tile.activation == MG_SILU) silu_tile(tile, rows, columns);
  }

  static void store(const Tile& tile, const float (&sum)[rows * columns][line_floats]) {
    for (int pixel = 0; pixel < rows * columns; ++pixel) {
      const int row = pixel / columns, column = pixel % columns;
      float* target = tile.target + row * tile.target_row + column * tile.target_pixel;
      const int64_t residual = row * tile.residual_row + column * tile.residual_pixel;
      for (int i = 0; i < line_floats; ++i) {
        target[i] = activate(sum[pixel][i] + (tile.residual ? tile.residual[residual + i] : 0.0f), tile.activation);
      }
    }
  }
};

}  // namespace

const Level& generic_level() {
  static constexpr Level level{tile_pixels, &find<Kernel, tile_pixels>, &copy_plainly, &locate_plainly};
  return level;
}

}  // namespace microglia::block
