// The block convolution's inner routine in 8 bits, one for all levels: a level gives vectors of 16 sums and what is done with
// them. Include once in each level's file, after the target pragma.
#ifndef MICROGLIA_BLOCK_QUAD_H
#define MICROGLIA_BLOCK_QUAD_H

#include "block_inline.h"

namespace microglia::block {
namespace {

// A level's Vectors has
//   Sums, Floats, Weights16     16 of int32, of float, 16 quads of weights (kept in registers over the pixels of a place);
//   load(const int32_t*), load(const float*), weights(const char*), splat(float);
//   dot(Sums&, Weights16, const char*)   adds the products of 16 quads of weights with one quad of activations;
//   scaled(Sums, Floats, Floats)         sum * scale + bias, the product not rounded;
//   added(Floats, Floats, const T*)      value + factor * 16 residuals, the product not rounded;
//   clamped(Floats, Floats, Floats)      between low and high;
//   put(T*, Floats)                      stores float, or uint8 rounded to the nearest, to the even one in the middle.
template <class Vectors, int rows, int columns, Weights kind>
struct QuadKernel {
  using Sums = typename Vectors::Sums;
  using Floats = typename Vectors::Floats;

  static void run(const Tile& tile) {
    Sums sum[rows][columns];
    const Sums start = Vectors::load(tile.start);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) sum[row][column] = start;
    }
    Ahead<kind> ahead(tile);
    for (int64_t index = 0; index < tile.count; ++index) {
      const char* values = ahead.values;
      const char* pixel = ahead.pixel;
      ahead.advance(tile, index + 1);
      accumulate(tile, values, pixel, sum);
    }
    if (tile.rescale->wide) {
      store<float>(tile, sum);
    } else {
      store<uint8_t>(tile, sum);
    }
  }

  static inline void accumulate(const Tile& tile, const char* values, const char* pixel, Sums (&sum)[rows][columns]) {
    if (kind == Weights::cold) Vectors::prefetch(values + 1024);
    const auto weights = Vectors::weights(values);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      if (row > 0) pixel = keep_in_register(pixel + tile.source_row);
      const char* at = pixel;
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) {
        if (column > 0) at = keep_in_register(at + tile.source_pixel);
        Vectors::dot(sum[row][column], weights, at);
      }
    }
  }

  template <class Target>
  static inline void store(const Tile& tile, const Sums (&sum)[rows][columns]) {
    const Floats scale = Vectors::load(tile.scale), bias = Vectors::load(tile.bias);
    const Floats low = Vectors::splat(tile.rescale->low), high = Vectors::splat(tile.rescale->high);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 28
      for (int column = 0; column < columns; ++column) {
        Floats value = Vectors::scaled(sum[row][column], scale, bias);
        if (tile.residual) {
          const char* from = tile.residual + row * tile.residual_row + column * tile.residual_pixel;
          value = Vectors::added(value, Vectors::splat(tile.rescale->other), reinterpret_cast<const Target*>(from));
        }
        char* to = tile.target + row * tile.target_row + column * tile.target_pixel;
        Vectors::put(reinterpret_cast<Target*>(to), Vectors::clamped(value, low, high));
      }
    }
  }
};

}  // namespace
}  // namespace microglia::block

#endif
