// How one convolution is cut into chunks whose lines are copied to scratch memory, and each chunk into tiles. Internal.
#ifndef MICROGLIA_BLOCK_PLAN_H
#define MICROGLIA_BLOCK_PLAN_H

#include <cstdint>

#include "block_level.h"
#include "kernels.h"

namespace microglia::block {

// The size of an output along one dimension.
inline int64_t output_size(int64_t input, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  return (input + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
}

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// One dimension of the image. The copy has a line for each input position that some tap of some output reads: where the
// kernel is one tap wide it has only every stride-th position, so that outputs follow each other.
struct Axis {
  int64_t input, output, taps, padding, dilation;
  int64_t step;   // lines of the copy between neighbouring outputs
  int64_t scale;  // input positions between neighbouring lines of the copy

  int64_t lines(int64_t outputs) const { return (outputs - 1) * step + (taps - 1) * dilation + 1; }
};

// Where the elements of a batch of images lie, in bytes: the 16 channels of a stripe side by side, everything else as the steps say.
struct Image {
  char* data;
  int64_t pixel, row, image, stripe;

  char* at(int64_t image_, int64_t row_, int64_t column) const { return data + image_ * image + row_ * row + column * pixel; }
};

// NHWC, pixels `stride` elements apart.
inline Image pixels_of(const void* data, int64_t stride, int64_t height, int64_t width, int64_t element) {
  const int64_t pixel = stride * element;
  return {const_cast<char*>(static_cast<const char*>(data)), pixel, pixel * width, pixel * width * height, stripe_outputs * element};
}

// A box of outputs. Of a pointwise convolution (a 1x1 kernel) all pixels of the batch are one row, where they follow each other.
struct Chunk {
  int64_t image, images, row, rows, column, columns;
};

struct Plan {
  const Level* level;
  Axis rows, columns;
  bool pointwise;
  uint8_t fill = 0;  // each byte of the padding: the zero of 8-bit activations
  bool direct;  // x lies in lines: computed from where it is, without a copy
  Image x;
  int64_t channels;
  int64_t groups;  // of as many channels as a line holds, in the copy
  Chunk space;                         // all outputs
  Chunk chunk;                         // the size of a chunk; the last ones are smaller
  int64_t tile_rows, tile_columns;
  int64_t row_bytes, image_bytes, group_bytes;  // steps in the copy; a row holds its lines by their phase of the step
  int64_t pixel_bytes = line_bytes;             // between neighbouring pixels of a tile

  // Says what is read: element (pixel, channel) is x[pixel * stride + channel], of the level's type.
  void read(const void* data, int64_t stride) { x = pixels_of(data, stride, rows.input, columns.input, level->element_bytes); }

  // How many rows of so many columns lie within the neighbouring pixels that are computed at once.
  int64_t rows_at_once(int64_t columns_) const;

  int64_t chunks() const;
  Chunk chunk_at(int64_t index) const;
  int64_t scratch_bytes() const { return group_bytes * groups + line_bytes; }  // kernels may read some pixels past the last

  // What is copied independently: pixels of a pointwise chunk, input rows of another.
  int64_t copy_units(const Chunk& part) const;
  void copy(const Chunk& part, int64_t begin, int64_t end, char* scratch) const;

  // The lines that a chunk is computed from, where they need no copy.
  const char* lines_of(const Chunk& part) const { return x.at(part.image, part.row - rows.padding, part.column - columns.padding); }

 private:
  void copy_pixels(const Chunk& part, int64_t begin, int64_t end, char* scratch) const;
  void copy_row(int64_t image, int64_t row, char* lines) const;
  void copy_valid(const char* row, int64_t first, int64_t count, char* lines) const;
  void copy_run(const char* source, int64_t step, int64_t pixels, char* lines) const;
  void clear(char* lines, int64_t first_group, int64_t pixels) const;
};

// How the pixels of input and output may be gone through.
enum class Order { follow, by_rows };  // all pixels follow each other; rows and images lie somewhere

// Fills in everything but x, for blocks that reach `channels` of them; MG_OK, or MG_BAD_SIZE for a
// problem whose scratch offsets would not fit 32 bits.
int make_plan(const mg_conv2d& conv, const Level& level, int64_t channels, int64_t value_bytes, Order order, Plan& plan);

// Whether a convolution of float32 can be computed from lines without a copy: neighbouring outputs must read neighbouring lines.
bool reads_lines(const mg_conv2d& conv);

// As make_plan, for an input in lines: x.stripe between its groups, around it at least as many lines of zeros as there is padding.
int make_direct_plan(const mg_conv2d& conv, const Level& level, int64_t value_bytes, const Image& x, Plan& plan);

// The place of each tap in the copy; for taps past the table, tap_place alone is to be used.
int64_t tap_place(const Plan& plan, int64_t tap);

}  // namespace microglia::block

#endif
